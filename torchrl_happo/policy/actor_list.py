"""A group whose agents have an actor object each, of whatever kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import nn

__all__ = ["ActorList"]


class ActorList(TensorDictModuleBase):
    """Rolls out one actor for each agent of a group with an agent dimension.

    A stack (:class:`~torchrl.modules.MultiAgentMLP`) evaluates all agents in one batched product,
    but only if their networks are alike and feed-forward. This list calls the actors one after the
    other instead, and so holds anything: recurrent policies
    (:class:`~torchrl.modules.GRUModule`, :class:`~torchrl.modules.LSTMModule`), agents with unlike
    networks, or with observations and actions of unlike sizes in one group.

    Args:
        actors (sequence of ProbabilisticTensorDictSequential): one for each agent, in the order of
            the agent dimension. Each reads and writes the keys of the group, such as
            ``("agents", "observation")``, without the agent dimension.

    Raises:
        ValueError: if there is no actor, or an actor's action lies at the root or in another group.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.modules import ProbabilisticActor
        >>> def actor(hidden):
        ...     net = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3))
        ...     return ProbabilisticActor(
        ...         TensorDictModule(
        ...             net, in_keys=[("agents", "observation")], out_keys=[("agents", "logits")]
        ...         ),
        ...         in_keys=[("agents", "logits")],
        ...         out_keys=[("agents", "action")],
        ...         distribution_class=torch.distributions.Categorical,
        ...         return_log_prob=True,
        ...     )
        >>> policy = ActorList([actor(8), actor(16)])
        >>> agents = TensorDict({"observation": torch.randn(5, 2, 4)}, batch_size=[5, 2])
        >>> policy(TensorDict({"agents": agents}, batch_size=[5]))["agents", "action"].shape
        torch.Size([5, 2])
    """

    def __init__(self, actors: Sequence[ProbabilisticTensorDictSequential]) -> None:
        super().__init__()
        if not actors:
            raise ValueError("An ActorList needs an actor for each agent of its group, got none.")
        keys = [_path_of(key) for actor in actors for key in actor.dist_sample_keys]
        groups = {key[:-1] for key in keys}
        if len(groups) != 1 or () in groups:
            raise ValueError(
                "The actors of an ActorList must write their actions into one group, such as "
                f"('agents', 'action'), got {[actor.dist_sample_keys for actor in actors]}."
            )
        self._path = groups.pop()
        self.group = unravel_key(self._path)
        self.actors = nn.ModuleList(actors)
        self.in_keys = _union(actor.in_keys for actor in actors)
        self.out_keys = _union(actor.out_keys for actor in actors)

    @property
    def dist_sample_keys(self) -> list[NestedKey]:
        """Keys of the actions."""
        return _union(actor.dist_sample_keys for actor in self.actors)

    @property
    def log_prob_keys(self) -> list[NestedKey]:
        """Keys of the log-probabilities of the actions."""
        return _union(actor.log_prob_keys for actor in self.actors)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Calls each actor on its row of the group and stacks what they write.

        Args:
            tensordict (TensorDictBase): batch size ``[*B]``, with a group of batch size
                ``[*B, n_agents]``.

        Returns:
            the same tensordict, with the out-keys of all actors.

        Raises:
            ValueError: if the group has another number of agents.
        """
        group = tensordict.get(self.group)
        if group.batch_dims <= tensordict.batch_dims or group.shape[-1] != len(self.actors):
            raise ValueError(
                f"The group {self.group!r} has batch size {list(group.batch_size)}, but there are "
                f"{len(self.actors)} actors; it must be "
                f"{[*tensordict.batch_size, len(self.actors)]}."
            )
        shared = tensordict.select(
            *(key for key in self.in_keys if not self._inside([key])), strict=False
        )
        written = []
        actors: list[Any] = list(self.actors)
        for actor, row in zip(actors, group.unbind(-1), strict=True):
            own = row.select(*self._inside(actor.in_keys), strict=False)
            view = shared.copy().set(self.group, own)
            written.append(actor(view).select(*actor.out_keys))
        for owner in ("root", "next"):
            rows = [td if owner == "root" else td.get("next", None) for td in written]
            rows = [None if td is None else td.get(self.group, None) for td in rows]
            if any(row is None for row in rows):
                continue
            stack = LazyStackedTensorDict.maybe_dense_stack(rows, tensordict.batch_dims)
            place = self._path if owner == "root" else ("next", *self._path)
            target = tensordict.get(place, None)
            tensordict.set(place, stack if target is None else target.update(stack))
        return tensordict

    def _inside(self, keys: Sequence[NestedKey]) -> list[NestedKey]:
        """Return the keys that lie in the group, as they are called there."""
        depth, paths = len(self._path), map(_path_of, keys)
        return [unravel_key(path[depth:]) for path in paths if path[:depth] == self._path]


def _path_of(key: NestedKey) -> tuple[str, ...]:
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else key


def _union(lists: Iterable[Any]) -> list[NestedKey]:
    return list(dict.fromkeys(unravel_key(key) for keys in lists for key in keys))
