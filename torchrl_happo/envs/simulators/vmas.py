"""VMAS with partial resets of all environments at once."""

from __future__ import annotations

from types import FunctionType, ModuleType
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import expand_as_right
from torch import Tensor, nn
from torchrl.envs import VmasEnv

from torchrl_happo.versions import simulator

__all__ = ["BatchedResetVmasEnv"]


class BatchedResetVmasEnv(VmasEnv):
    """TorchRL's :class:`~torchrl.envs.VmasEnv`, whose partial resets cost as much as a full one.

    VMAS resets some of its environments one by one, which takes longer than a step of them all as
    soon as a few episodes have ended. Here all are reset at once, and all tensors with a row for
    each environment, wherever the simulator and the scenario keep them, get back the rows of those
    that continue. What has no such rows, such as the masses of ``het_mass``, stays as it was while
    any environment continues. Where episodes end together, all environments are reset as VMAS does
    it, with the same random numbers; a partial reset draws other numbers than VMAS would. Whether
    all end is the only number read back from the device.

    The recipe's tasks of VMAS run in it. ``python benchmarks/resets.py`` measures both in turn. Of
    1024 environments, 102 are reset, on one core of a CPU: 53 times as fast for ``balance``, 8 for
    ``navigation``, 22 for ``simple_spread``.

    State per environment must be in tensors, or lists, tuples, dicts and objects of tensors. Where
    a reset changes the length of a list of them, environments are reset one by one.

    Args:
        *args: arguments of :class:`~torchrl.envs.VmasEnv`.
        **kwargs: keyword arguments of :class:`~torchrl.envs.VmasEnv`.

    Example:
        >>> env = BatchedResetVmasEnv("balance", num_envs=4, seed=0)
        >>> data = env.reset()
        >>> data["_reset"] = torch.tensor([[True], [False], [True], [False]])
        >>> now = env.reset(data.clone())
        >>> (now["agents", "observation"] == data["agents", "observation"]).flatten(1).all(1)
        tensor([False,  True, False,  True])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TorchRL asks the simulator for these at every step, through a search of all attributes.
        for name in ("n_agents", "continuous_actions"):
            setattr(self, name, getattr(self, name))
        self._one_by_one = False

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None or bool(mask.all()):  # no state is kept, not even one without rows
            return super()._reset(None, **kwargs)
        if self._one_by_one:
            return super()._reset(tensordict, **kwargs)
        state = _State(simulator(self), self.num_envs)
        # The rows of environments that go on are wrong in this data: TorchRL keeps the old ones.
        data = super()._reset(None, **kwargs)
        if state.restore(~mask.flatten()):
            return data
        self._one_by_one = True
        state.restore(torch.ones_like(mask.flatten()))
        return super()._reset(tensordict, **kwargs)


class _State:
    """All that a simulator keeps: its own attributes and those of every object that it reaches.

    Args:
        root (object): the simulator.
        num_envs (int): number of its environments.
    """

    def __init__(self, root: Any, num_envs: int) -> None:
        self.num_envs = num_envs
        self.attributes: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        pending = [root]
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                pending += value.values()
            elif isinstance(value, (list, tuple)):
                pending += value
            elif id(value) not in self.attributes and _is_part(value):
                now = vars(value)
                self.attributes[id(value)] = now, {k: self._copy(v) for k, v in now.items()}
                pending += now.values()

    def _has_rows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.num_envs

    def _copy(self, value: Any) -> Any:
        """Copy what a reset may write into: rows of environments, and containers of them."""
        if self._has_rows(value):
            return value.clone()
        if type(value) in (list, tuple):
            return type(value)(map(self._copy, value))
        if type(value) is dict:
            return {key: self._copy(entry) for key, entry in value.items()}
        return value

    def restore(self, rows: Tensor) -> bool:
        """Restore the rows of some environments, and all values without rows.

        Args:
            rows (Tensor): which, ``[num_envs]`` booleans.

        Returns:
            whether all values with rows could be restored.
        """
        self.is_complete = True
        merged: dict[int, tuple[Tensor, Tensor]] = {}
        for now, before in list(self.attributes.values()):
            self._merge_attributes(before, now, rows, merged)
        return self.is_complete

    def _merge_attributes(
        self,
        old: dict[str, Any],
        new: dict[str, Any],
        rows: Tensor,
        merged: dict[int, tuple[Tensor, Tensor]],
    ) -> None:
        for key in old.keys() & new.keys():
            new[key] = self._merge(old[key], new[key], rows, merged)

    def _merge(
        self, old: Any, new: Any, rows: Tensor, merged: dict[int, tuple[Tensor, Tensor]]
    ) -> Any:
        if self._has_rows(new) and self._has_rows(old) and new.shape == old.shape:
            # One tensor under two names stays one.
            if id(new) not in merged:
                result = torch.where(expand_as_right(rows, new), old, new)
                # Both stay alive, so that no other tensor gets their identity.
                merged[id(new)] = new, result
                merged[id(result)] = result, result
            return merged[id(new)][1]
        if type(new) is type(old) and type(new) in (list, tuple):
            if len(new) != len(old):
                self.is_complete &= not any(map(self._has_rows, [*old, *new]))
                return old
            pairs = [self._merge(*pair, rows, merged) for pair in zip(old, new, strict=True)]
            if isinstance(new, tuple):
                return tuple(pairs)
            new[:] = pairs
            return new
        if type(new) is dict and type(old) is dict:
            self._merge_attributes(old, new, rows, merged)
            return new
        if type(new) is type(old) and id(old) in self.attributes and id(new) not in self.attributes:
            # The reset has made another object in place of an old one.
            self._merge_attributes(self.attributes[id(old)][1], vars(new), rows, merged)
            return new
        # It concerns all environments, as the goal does in a scenario of MPE.
        return old


def _is_part(value: Any) -> bool:
    """Return whether an object has attributes that a simulator may keep its state in."""
    is_other = isinstance(value, (type, ModuleType, FunctionType, nn.Module, Tensor))
    return hasattr(value, "__dict__") and not is_other
