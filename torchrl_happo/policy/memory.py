"""Networks with memory: which states they read, and how a critic's states are made.

TorchRL evaluates a recurrent network in two ways: step by step, from the state that each step of
the data holds, and over sequences (:class:`~torchrl.modules.set_recurrent_mode`), from the state
at their first step. Losses do the latter. Values for the advantage are the critic's step by step:
the value of a next observation needs the memory of all that went before it, but in a sequence the
true last observation of an episode has no place, since the next episode follows.
"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import expand_as_right, unravel_key
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

__all__ = [
    "INIT",
    "StepwiseCritic",
    "has_memory",
    "memory_of",
    "next_key",
    "state_specs",
    "write_states",
]

#: Where :class:`~torchrl.envs.InitTracker` says that an episode begins.
INIT = "is_init"


def has_memory(network: nn.Module | None) -> bool:
    """Whether a network has recurrent modules.

    Example:
        >>> has_memory(nn.Linear(2, 2)), has_memory(GRUModule(2, 3, in_key="x", out_key="y"))
        (False, True)
    """
    return network is not None and any(
        isinstance(module, (GRUModule, LSTMModule)) for module in network.modules()
    )


def state_specs(network: nn.Module) -> dict[NestedKey, Unbounded]:
    """The states that a network reads, by their keys, without the dimensions of a batch.

    It writes the new ones to the same keys under ``"next"``.
    """
    states: dict[NestedKey, Unbounded] = {}
    for module in network.modules() if isinstance(network, nn.Module) else ():  # or any callable
        if isinstance(module, (GRUModule, LSTMModule)):
            primers = module.make_tensordict_primer().primers
            keys = primers.keys(True, True)
            states.update({unravel_key(key): primers[key] for key in keys})
    return states


def memory_of(critic: TensorDictModuleBase) -> TensorDictModuleBase:
    """What of a critic has to be rolled out to keep its states: all but the layers behind them."""
    if not isinstance(critic, TensorDictSequential):
        return critic
    return critic.select_subsequence(out_keys=[next_key(key) for key in state_specs(critic)])


class StepwiseCritic(TensorDictModuleBase):
    """Evaluates a critic with memory step by step, from the states in the data.

    Args:
        critic (TensorDictModuleBase): reads and writes its states; see :func:`write_states`.
        value_key (NestedKey): where it writes the value.
    """

    def __init__(self, critic: TensorDictModuleBase, value_key: NestedKey) -> None:
        super().__init__()
        self.critic = critic
        self.value_key = value_key
        # States are zero already where an episode begins.
        self.in_keys = [key for key in critic.in_keys if key != INIT]
        self.out_keys = [value_key]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the value of each step, whatever lies before and after it."""
        steps = tensordict.select(*self.in_keys).reshape(-1)
        steps.set(INIT, torch.zeros(len(steps), 1, dtype=torch.bool, device=steps.device))
        with set_recurrent_mode(False):
            value = self.critic(steps).get(self.value_key)
        shape = (*tensordict.batch_size, *value.shape[1:])
        return tensordict.set(self.value_key, value.reshape(shape))


@torch.no_grad()
def write_states(critic: TensorDictModuleBase, batch: TensorDictBase) -> None:
    """Writes the states of a critic's memory: before each step, and under ``"next"`` after it.

    The critic is run step by step along the rows of the batch. It begins with the state that the
    first step holds, if it holds one, and with zero otherwise and where an episode begins.

    Args:
        critic (TensorDictModuleBase): a critic with memory.
        batch (TensorDictBase): joint data of batch size ``[*B, T]``; modified in place.
    """
    specs, weight = state_specs(critic), next(critic.parameters())
    steps = batch.select(*critic.in_keys, strict=False).unbind(-1)
    rows = steps[0].reshape(-1)
    state = TensorDict(
        {key: weight.new_zeros(len(rows), *spec.shape) for key, spec in specs.items()},
        [len(rows)],
    ).update(rows.select(*specs, strict=False))
    before, after = [], []
    with set_recurrent_mode(False):
        for step in steps:
            data = step.reshape(-1)
            begins: Tensor = data.get(INIT)
            state = state.apply(lambda s, b=begins: s.masked_fill(expand_as_right(b, s), 0.0))
            before.append(state)
            state = critic(data.update(state)).get("next").select(*specs)
            after.append(state)
    batch.update(torch.stack(before, -1).reshape(batch.batch_size))
    batch.get("next").update(torch.stack(after, -1).reshape(batch.batch_size))


def next_key(key: NestedKey) -> NestedKey:
    """Where the same entry of the next step lies."""
    return ("next", key) if isinstance(key, str) else ("next", *key)
