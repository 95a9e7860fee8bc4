"""From the entries that an agent observes to the one vector that its network reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from torchrl.data import Categorical, MultiCategorical, TensorSpec
from torchrl.modules import ConvNet, MultiAgentConvNet

from torchrl_happo.networks.architecture import Architecture

__all__ = ["Entry", "ObservationEncoder", "encode_inputs", "read_entry"]

# Padding and stride halve an image at each layer, so that images of any size fit.
_CONVOLUTIONS: dict[str, Any] = {
    "num_cells": [32, 32, 32],
    "kernel_sizes": 3,
    "strides": 2,
    "paddings": 1,
}


@dataclass(frozen=True)
class Entry:
    """One entry of an agent's observation.

    Attributes:
        key (NestedKey): key of the entry.
        shape (torch.Size): shape for one agent, without the batch.
        dtype (torch.dtype): dtype in the data.
        nvec (tuple of int): number of values of each number of a categorical entry; empty for
            all others.
    """

    key: NestedKey
    shape: torch.Size
    dtype: torch.dtype
    nvec: tuple[int, ...] = ()

    @property
    def is_image(self) -> bool:
        """Whether the entry is an image ``[C, H, W]``."""
        return len(self.shape) == 3

    @property
    def is_plain(self) -> bool:
        """Whether a network can read the entry as it is, flattened at most."""
        return len(self.shape) not in (0, 3) and self.dtype == torch.get_default_dtype()

    @property
    def size(self) -> int:
        """Size of the vector that stands for the entry, unless it is an image."""
        return sum(self.nvec) if self.nvec else self.shape.numel()


def read_entry(key: NestedKey, spec: TensorSpec, *, is_state: bool = False) -> Entry:
    """Return an entry from its spec.

    Args:
        key (NestedKey): its key.
        spec (TensorSpec): its spec for one agent, without the batch.

    Keyword Args:
        is_state (bool): whether it is the global state, which is flattened whatever its shape.
            Defaults to ``False``.

    Raises:
        ValueError: if the entry is neither a number nor a vector nor an image, or of another
            floating dtype than the networks.
    """
    shape = spec.shape
    if spec.dtype.is_floating_point and spec.dtype != torch.get_default_dtype():
        raise ValueError(
            f"The observation {key!r} is of {spec.dtype}, but the networks are of "
            f"{torch.get_default_dtype()}; append a transform that casts it, such as DoubleToFloat."
        )
    nvec: tuple[int, ...] = ()
    # A boolean is a number already: one-hot encoding it would say the same twice.
    if isinstance(spec, (Categorical, MultiCategorical)) and spec.dtype != torch.bool:
        is_multi = isinstance(spec, MultiCategorical)
        nvec = tuple(spec.nvec.tolist()) if is_multi else (spec.space.n,) * shape.numel()
    if len(shape) not in (0, 1, 3) and not (is_state and not nvec):
        raise ValueError(
            f"The observation {key!r} has shape {tuple(shape)} for one agent, but a network reads "
            "a number, a vector [d] or an image [C, H, W] per agent; flatten it by a transform "
            "such as FlattenObservation, or build the network by hand."
        )
    return Entry(key, shape, spec.dtype, nvec)


class ObservationEncoder(nn.Module):
    """Encodes the entries of an observation and concatenates them.

    Vectors and numbers are cast to the default dtype, categorical entries become one-hot vectors,
    and images ``[C, H, W]`` pass through a :class:`~torchrl.modules.MultiAgentConvNet` of the
    entry (a :class:`~torchrl.modules.ConvNet` without an agent dimension). Images of bytes are
    divided by 255 first.

    Args:
        entries (sequence of Entry): the entries.
        architecture (Architecture): activation, initialisation and device of the convolutions.

    Keyword Args:
        n_agents (int, optional): size of the agent dimension, if each agent has convolutions of
            its own. Defaults to ``None``: all leading dimensions are those of a batch.
        share_params (bool): whether the agents share the convolutions. Defaults to ``False``.

    Attributes:
        n_features (int): size of the vector.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        architecture: Architecture,
        *,
        n_agents: int | None = None,
        share_params: bool = False,
    ) -> None:
        super().__init__()
        self.entries = tuple(entries)
        self.convolutions = nn.ModuleDict()
        self.n_features = 0
        for index, entry in enumerate(self.entries):
            if not entry.is_image:
                self.n_features += entry.size
                continue
            net, n_features = _convolutions(entry.shape, architecture, n_agents, share_params)
            self.convolutions[str(index)] = net
            self.n_features += n_features

    @property
    def is_identity(self) -> bool:
        """Whether the only entry is a vector that a network can read as it is."""
        return len(self.entries) == 1 and self.entries[0].is_plain

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the vectors ``[*B, n_features]`` of entries ``[*B, *shape]``, one an input."""
        vectors = [
            self._encode(index, entry, tensor)
            for index, (entry, tensor) in enumerate(zip(self.entries, inputs, strict=True))
        ]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors, -1)

    def _encode(self, index: int, entry: Entry, tensor: Tensor) -> Tensor:
        dtype = torch.get_default_dtype() if not tensor.is_floating_point() else tensor.dtype
        if entry.is_image:
            image = tensor.to(dtype)
            return self.convolutions[str(index)](
                image / 255 if tensor.dtype == torch.uint8 else image
            )
        vector = tensor.flatten(-len(entry.shape)) if entry.shape else tensor.unsqueeze(-1)
        if not entry.nvec:
            return vector.to(dtype)
        # torch's one_hot reads the largest value back to the host to check it.
        numbers = [
            number.unsqueeze(-1) == torch.arange(n, device=tensor.device)
            for number, n in zip(vector.unbind(-1), entry.nvec, strict=True)
        ]
        return torch.cat(numbers, -1).to(dtype)


def _convolutions(
    shape: torch.Size, architecture: Architecture, n_agents: int | None, share_params: bool
) -> tuple[nn.Module, int]:
    """Build the convolutions of an image, and count their features."""
    kwargs = {
        **_CONVOLUTIONS,
        "in_features": shape[0],
        "activation_class": architecture.activation_class,
        "device": architecture.device,
    }
    net: nn.Module = ConvNet(**kwargs)
    image = torch.zeros(1, *shape, device=architecture.device)
    if n_agents is not None:
        net = MultiAgentConvNet(n_agents, centralized=False, share_params=share_params, **kwargs)
        image = image.expand(1, n_agents, *shape)
    architecture.initialize(net)
    with torch.no_grad():
        return net, net(image).shape[-1]


def encode_inputs(net: nn.Module, encoders: Sequence[ObservationEncoder]) -> nn.Module:
    """Put encoders before a network, one for each of its inputs; plain vectors need none."""
    return net if all(each.is_identity for each in encoders) else _Encoded(net, encoders)


class _Encoded(nn.Module):
    """A network whose inputs are encoded first."""

    def __init__(self, net: nn.Module, encoders: Sequence[ObservationEncoder]) -> None:
        super().__init__()
        self.encoders: Any = nn.ModuleList(encoders)
        self.net = net

    def forward(self, *inputs: Tensor) -> Any:
        """Call the network on one vector for each encoder."""
        remaining, vectors = list(inputs), []
        for encoder in self.encoders:
            count = len(encoder.entries)
            vectors.append(encoder(*remaining[:count]))
            del remaining[:count]
        return self.net(*vectors)
