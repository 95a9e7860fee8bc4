"""The reduction of an entry of each agent to one of the team."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, Transform, TransformedEnv

__all__ = ["TeamTotal", "written_keys"]

_REDUCTIONS = ("mean", "sum", None)


class TeamTotal(Transform):
    """Reduce an entry of each agent, their reward or their cost, to one of the team.

    Args:
        reduction (str or None): ``"mean"``, ``"sum"``, or ``None`` if the agents share it.
        in_keys (sequence of NestedKey or None): the agents' entries; ``None``: all there are.
        out_key (NestedKey): key of the team's entry.
        in_place (bool): whether the team's entry replaces the agents' entries.
    """

    #: The entry: ``"reward"`` or ``"cost"``.
    entry: ClassVar[str]
    unlike_error: ClassVar[type[ValueError]]

    def __init__(
        self,
        reduction: Literal["mean", "sum"] | None,
        in_keys: Sequence[NestedKey] | None,
        out_key: NestedKey,
        in_place: bool = False,
    ) -> None:
        name = type(self).__name__
        if reduction not in _REDUCTIONS:
            raise ValueError(
                f"{name} got reduction={reduction!r}, but it is one of 'mean', 'sum' and None."
            )
        if in_keys is not None and not in_keys:
            raise ValueError(
                f"{name} got empty in_keys; name a {self.entry} of each group of the team, or "
                f"leave them out to take all the {self.entry}s of the environment."
            )
        self._named: list[NestedKey] | None = None
        self.in_place = in_place
        super().__init__(in_keys=in_keys, out_keys=[out_key])
        self.reduction = reduction
        self._verified = False

    def _entries(self, env: EnvBase) -> list[NestedKey]:
        """Return the keys of the agents' entries in an environment."""
        raise NotImplementedError

    @property
    def out_key(self) -> NestedKey:
        """The key that the team's entry is written to."""
        return self.out_keys[0]

    @property
    def out_keys(self) -> Sequence[NestedKey]:
        """The keys that are written: the team's one or, in place, the keys of its agents."""
        return self.in_keys if self.in_place else self._written

    @out_keys.setter
    def out_keys(self, value: Sequence[NestedKey]) -> None:
        self._written = [unravel_key(key) for key in value]

    @property
    def in_keys(self) -> Sequence[NestedKey]:
        """The entries of the team's agents: those that were named, or all there are."""
        if self._named is not None:
            return self._named
        parent = self.parent
        if parent is None:
            return []
        # Searched for once: TorchRL makes another parent whenever the environment changes.
        kept = parent.__dict__
        key = f"_{self.entry}s_of_agents"
        if key not in kept:
            kept[key] = self._entries(parent)
        return kept[key]

    @in_keys.setter
    def in_keys(self, value: Sequence[NestedKey]) -> None:
        self._named = [unravel_key(key) for key in value]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the team's entry to a batch that was collected without it.

        Args:
            tensordict (TensorDictBase): a batch with the agents' entries under ``"next"``,
                or the content of its ``"next"`` itself.

        Returns:
            the same tensordict, with the team's entry beside those of the agents.
        """
        self._call(tensordict.get("next", default=tensordict))
        return tensordict

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        if self._is_there(next_tensordict):
            return next_tensordict
        values = self._of_agents(next_tensordict)
        if self.reduction is None:
            self._verify_shared(values)
        total = self._reduce(values)
        if not self.in_place:
            return next_tensordict.set(self.out_key, total)
        for key in self.in_keys:
            value = next_tensordict.get(key)
            is_group = value.ndim > total.ndim
            # A copy: the agents of a group would share memory, which collectors write to.
            team = total.unsqueeze(-2).expand_as(value).clone() if is_group else total
            next_tensordict.set(key, team)
        return next_tensordict

    def _add_spec(self, spec: Composite) -> Composite:
        """Add the team's entry to the specs that hold those of the agents."""
        self._check_keys(spec)
        if self.in_place:
            for key in self.in_keys:  # a sum may leave the bounds of one agent's entry
                spec[key] = Unbounded(spec[key].shape, device=spec.device, dtype=spec[key].dtype)
            return spec
        value = self._reduce(self._of_agents(spec.zero()))
        spec[self.out_key] = Unbounded(shape=value.shape, dtype=value.dtype, device=value.device)
        return spec

    def _of_agents(self, tensordict: TensorDictBase) -> torch.Tensor:
        """Return the entries of all agents of the team in one tensor ``[*B, n, 1]``."""
        if not self.in_keys:
            raise ValueError(
                f"{type(self).__name__} has no environment to find the agents' {self.entry}s in; "
                f"pass in_keys, such as in_keys=[('agents', '{self.entry}')]."
            )
        values = [self._of_group(key, tensordict) for key in self.in_keys]
        return values[0] if len(values) == 1 else torch.cat(values, dim=-2)

    def _of_group(self, key: NestedKey, tensordict: TensorDictBase) -> torch.Tensor:
        """Return the entry of one group, ``[*B, n, 1]``; a single agent is a group of one."""
        value = tensordict.get(key, default=None)
        name = type(self).__name__
        if value is None:
            raise KeyError(
                f"{name} finds no {self.entry} {key!r} to reduce; name by in_keys those that exist."
            )
        event_shape = value.shape[tensordict.batch_dims :]
        if len(event_shape) not in (1, 2) or event_shape[-1] != 1:
            raise ValueError(
                f"{name} got the {self.entry} {key!r} of shape {tuple(value.shape)} in a batch of "
                f"shape {tuple(tensordict.batch_size)}, but it reduces {self.entry}s of shape "
                "[*B, 1] (a single agent) or [*B, n, 1] (a group); reshape it first."
            )
        return value.unsqueeze(-2) if len(event_shape) == 1 else value

    def _is_there(self, tensordict: TensorDictBase) -> bool:
        """Return whether the only entry is the team's already, ``[*B, 1]`` under its key."""
        if self.in_place or list(self.in_keys) != self.out_keys:
            return False
        value = tensordict.get(self.out_key, default=None)
        return value is not None and value.shape == (*tensordict.batch_size, 1)

    def _reduce(self, values: torch.Tensor) -> torch.Tensor:
        if self.reduction == "sum":
            return values.sum(-2)
        if self.reduction == "mean":
            return values.mean(-2)
        return values[..., 0, :]

    def _verify_shared(self, values: torch.Tensor) -> None:
        if values.shape[-2] == 1 or (values.is_cuda and self._verified):
            return  # nothing to compare, or it would wait for the device at every step
        if not torch.allclose(values, values[..., :1, :].expand_as(values), equal_nan=True):
            raise self.unlike_error(
                f"{type(self).__name__}(None) takes the {self.entry} that the agents share, but "
                f"{self.in_keys} differ between agents; choose reduction='mean' or "
                "reduction='sum'."
            )
        self._verified = True

    def _check_keys(self, spec: Composite) -> None:
        """Refuse keys that the environment lacks, and to write over what it has."""
        in_keys, name = list(self.in_keys), type(self).__name__
        existing = list(spec.keys(True, True))
        unknown = [key for key in in_keys if key not in existing]
        if unknown or not in_keys:
            got = f"{unknown}, which are" if unknown else "none: there are"
            raise ValueError(
                f"{name} got in_keys {got} no {self.entry}s of this environment; choose among "
                f"{existing}."
            )
        if self.in_place:
            return
        out_key = self.out_key
        if out_key in existing:
            if in_keys == [out_key] and spec[out_key].ndim == spec.ndim + 1:
                return  # it is the team's entry already
            raise ValueError(
                f"{name} would write over the {self.entry} {out_key!r} of this environment; choose "
                f"another out_key, or leave {name} out if that is the team's {self.entry} already."
            )
        group = out_key[0] if isinstance(out_key, tuple) else out_key
        held = spec.get(group, None)
        if held is not None and (group == out_key or held.ndim != spec.ndim):
            raise ValueError(
                f"{name} got the out_key {out_key!r}, but {group!r} is a group with an agent "
                f"dimension and the team's {self.entry} has none; choose a key at the root, or one "
                "under a name of its own."
            )


def written_keys(env: EnvBase, kind: type[TeamTotal]) -> list[NestedKey]:
    """Return the keys that all transforms of a kind write in an environment."""
    keys, inner = [], env
    while isinstance(inner, TransformedEnv):
        transforms = [each for each in inner.transform.modules() if isinstance(each, kind)]
        keys += [each.out_key for each in transforms if not each.in_place]
        inner = inner.base_env
    return keys
