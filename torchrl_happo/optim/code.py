"""What the code of an inner step reads besides its data, for whoever compiles it."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager

from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_happo.optim.flat import data_layout, network_tensors, network_with, settings
from torchrl_happo.optim.graphs import GraphCompiler
from torchrl_happo.validation.arguments import first_line

__all__ = ["Code"]

logger = logging.getLogger(__name__)


class Code:
    """The code of an inner step: its compiler, and the modules that it reads.

    Args:
        compiler (GraphCompiler): shared by the agents of a team.
        networks (sequence of nn.Module): modules whose parameters and buffers are read. They
            become arguments of what is compiled.

    Keyword Args:
        owner (nn.Module, optional): a module whose own settings and buffers are read besides. What
            is compiled is made anew if they change. Defaults to ``None``.
        template (nn.Module, optional): stands for the code: where it is the same, only tensors
            differ. Defaults to ``None``: no other step's code is like this.
    """

    def __init__(
        self,
        compiler: GraphCompiler,
        networks: Sequence[nn.Module],
        *,
        owner: nn.Module | None = None,
        template: nn.Module | None = None,
    ) -> None:
        self.compiler = compiler
        self.networks = nn.ModuleList(networks)
        self.owner = owner
        self.template = self.networks if template is None else template
        self.is_given_up = False

    def tensors(self) -> list[Tensor]:
        """The parameters and buffers of the networks, without gradients."""
        return [tensor.detach() for tensor in network_tensors(self.networks)]

    def places(self, parameters: Iterable[nn.Parameter]) -> list[int]:
        """Where some of the parameters stand among :meth:`tensors`."""
        places = {id(tensor): place for place, tensor in enumerate(network_tensors(self.networks))}
        return [places[id(parameter)] for parameter in parameters]

    def reading(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        """A context in which the networks hold other tensors, in the order of :meth:`tensors`."""
        return network_with(self.networks, tensors)

    def key(self, data: TensorDictBase) -> tuple[Hashable, ...]:
        """Whatever is no argument of what is compiled, and may yet change."""
        modules, buffers = list(self.networks.modules()), []
        if self.owner is not None:
            modules.append(self.owner)
            # A buffer is read where it is; one that was replaced is another.
            buffers = [id(buffer) for buffer in self.owner.buffers(recurse=False)]
        return self.template, data_layout(data), settings(modules), tuple(buffers)

    def give_up(self, error: Exception) -> None:
        """Leaves the step as it is, uncompiled, and says why, once."""
        self.is_given_up = True
        logger.warning("A step is not compiled, and slower than it could be: %s", first_line(error))
