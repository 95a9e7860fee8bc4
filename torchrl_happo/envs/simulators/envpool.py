"""Batches of environments that EnvPool steps in C++ threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_happo.arguments import check_counts

__all__ = ["EnvPoolEnv"]

# The largest number EnvPool accepts. As a time limit it disables EnvPool's own, which would report
# an episode that terminates in its last step as truncated.
_LARGEST = 2**31 - 1

# Arguments of EnvPool that are set here, or would change the layout of its data.
_OWN = {
    "num_envs",
    "batch_size",
    "num_threads",
    "max_num_players",
    "base_path",
    "seed",
    "env_seed",
    "gym_reset_return_info",
    "max_episode_steps",
}


class EnvPoolEnv(EnvBase):
    """A batch of continuous control tasks, stepped by `EnvPool <https://envpool.readthedocs.io>`_.

    All copies take a step in one call, and their data are one tensordict of batch size
    ``[num_envs]``, in float32: ``"observation"`` ``[num_envs, d]``, ``"action"``
    ``[num_envs, a]``, and ``"reward"``, ``"done"``, ``"terminated"`` and ``"truncated"``
    ``[num_envs, 1]``.

    The last observation of an episode is the true one. EnvPool resets a copy by itself in the
    step that follows; here TorchRL resets it before that step. A time limit
    truncates, and an episode that also terminates at its last step is both.

    Actions are passed on unchanged. MuJoCo clamps the controls that it applies to their range,
    whereas the tasks' cost of control is computed from the action itself.

    A seed takes effect at the next reset of all copies, which makes a new pool. Resets of some
    copies before it continue with the old seed.

    Args:
        task (str): name of an EnvPool task whose observation and action are vectors,
            such as ``"HalfCheetah-v5"``.

    Keyword Args:
        num_envs (int): copies stepped together. Defaults to ``1``.
        max_steps (int, optional): steps after which an episode is truncated. Defaults to the
            task's own limit.
        num_threads (int): threads that step them; results do not depend on it.
            Defaults to ``1``.
        seed (int, optional): seed from which each copy derives its own. Equal seeds give equal
            data. Defaults to ``None``: drawn from torch's global generator. A seed of ``set_seed``
            waits for the next reset of all copies.
        device (torch.device or str, optional): device of the data; the simulation is on the CPU.
            Defaults to ``"cpu"``.
        cost (callable, optional): maps the info of a step to the cost of each copy
            ``[num_envs]``, which a step then pays as ``"cost"`` ``[num_envs, 1]`` beside the
            reward, for a constraint. Defaults to ``None``: there is none.
        **kwargs: arguments of the task, for instance ``ctrl_cost_weight``.

    Raises:
        ImportError: if EnvPool is not installed.
        ValueError: if EnvPool has no such task, the task no such arguments, observation or action
            are no vectors, or there are no copies or steps.

    Examples:
        >>> env = EnvPoolEnv("HalfCheetah-v5", num_envs=3, seed=0)  # doctest: +SKIP
        >>> env.rollout(4)["next", "reward"].shape  # doctest: +SKIP
        torch.Size([3, 4, 1])
    """

    def __init__(
        self,
        task: str,
        *,
        num_envs: int = 1,
        max_steps: int | None = None,
        num_threads: int = 1,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        cost: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = None,
        **kwargs: Any,
    ) -> None:
        check_counts(num_envs=num_envs, num_threads=num_threads)
        check_counts(max_steps=max_steps, optional=True)
        envpool = _import_envpool()
        if task not in envpool.list_all_envs():
            raise ValueError(f"EnvPool has no task {task!r}; see envpool.list_all_envs().")
        super().__init__(device=torch.device(device), batch_size=[num_envs])
        spec = _make_spec(envpool, task, kwargs)
        self.task = task
        self.max_steps = spec.config.max_episode_steps if max_steps is None else max_steps
        self._make = {
            **kwargs,
            "num_envs": num_envs,
            "num_threads": num_threads,
            "max_episode_steps": _LARGEST,
        }
        self.cost = cost
        self._make_specs(spec.gymnasium_observation_space, spec.gymnasium_action_space)
        self._pool: Any = None
        self._seed: int | None = None
        self._is_seeded_anew = False
        if seed is not None:
            self.set_seed(seed)

    def _make_specs(self, observation: Any, action: Any) -> None:
        for name, space in (("observation", observation), ("action", action)):
            if len(getattr(space, "shape", None) or ()) != 1 or space.dtype.kind != "f":
                raise ValueError(
                    f"The {name} of {self.task!r} is {space}, but EnvPoolEnv takes tasks with a "
                    "vector of floats."
                )
        shape, place = self.batch_size, {"device": self.device}
        self.observation_spec = Composite(
            observation=Unbounded((*shape, *observation.shape), **place), shape=shape, **place
        )
        low, high = (torch.from_numpy(bound).float() for bound in (action.low, action.high))
        self.action_spec = Bounded(
            low.expand(*shape, -1), high.expand(*shape, -1), dtype=torch.float32, **place
        )
        paid = Unbounded((*shape, 1), **place)
        if self.cost is None:
            self.reward_spec = paid
        else:  # TorchRL's RewardSum adds up what is a reward
            self.reward_spec = Composite(reward=paid, cost=paid.clone(), shape=shape, **place)
        flag = Binary(1, shape=(*shape, 1), dtype=torch.bool, **place)
        self.done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=shape, **place
        )

    def _set_seed(self, seed: int | None) -> None:
        self._seed = seed
        self._is_seeded_anew = True  # EnvPool is seeded when it is made, at the next full reset

    def _start(self) -> None:
        """Make the pool, each copy with a seed of its own, in place of an older one.

        EnvPool's own numbering (seed, seed + 1, ...) would give runs with neighbouring seeds the
        same episodes but for one.
        """
        entropy = int(torch.randint(2**31, ())) if self._seed is None else self._seed
        seeds = np.random.SeedSequence(entropy).generate_state(self.batch_size[0]) % _LARGEST
        old = self._pool
        self._pool = _import_envpool().make_gymnasium(self.task, seed=seeds, **self._make)
        self._is_seeded_anew = False
        if old is not None:
            old.close()

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        is_due = self._is_seeded_anew and (mask is None or bool(mask.all()))
        if self._pool is None or is_due:
            self._start()
            mask = None
        if mask is None:
            observation = self._tensor(self._pool.reset()[0])
        else:
            # TorchRL keeps the observations of the other copies, and drops these zeros.
            chosen = mask.flatten().nonzero().squeeze(-1)
            observation = self.observation_spec["observation"].zero()
            if len(chosen):
                fresh = self._pool.reset(chosen.cpu().numpy().astype(np.int32))[0]
                observation[chosen] = self._tensor(fresh)
        return TensorDict(
            {**self.observation_spec.zero(), "observation": observation, **self.done_spec.zero()},
            self.batch_size,
            device=self.device,
        )

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        if self._pool is None:
            raise RuntimeError("The environment has not been reset; reset it before it steps.")
        action = tensordict.get("action").detach().cpu().numpy()
        observation, reward, ended, _, info = self._pool.step(action)
        terminated = self._flag(ended)
        truncated = self._flag(info["elapsed_step"] >= self.max_steps)
        costs = {}
        if self.cost is not None:
            costs["cost"] = self._tensor(self.cost(info)).unsqueeze(-1)
        return TensorDict(
            {
                **costs,
                "observation": self._tensor(observation),
                "reward": self._tensor(reward).unsqueeze(-1),
                "done": terminated | truncated,
                "terminated": terminated,
                "truncated": truncated,
            },
            self.batch_size,
            device=self.device,
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, torch.float32)

    def _flag(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device).unsqueeze(-1)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """End the threads."""
        super().close(raise_if_closed=raise_if_closed)
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _import_envpool() -> Any:
    try:
        import envpool
    except ImportError as error:
        raise ImportError(
            "EnvPoolEnv needs EnvPool; install it by: pip install 'torchrl_happo[mujoco]'."
        ) from error
    return envpool


def _make_spec(envpool: Any, task: str, arguments: dict[str, Any]) -> Any:
    """Return the task with ``arguments``, some of which may be unknown or of a wrong type."""
    known = [name for name in envpool.make_spec(task).config._fields if name not in _OWN]
    try:
        if arguments.keys() <= set(known):
            return envpool.make_spec(task, **arguments)
        error = None
    except TypeError as raised:
        error = raised
    raise ValueError(
        f"{task!r} does not take the arguments {arguments}; what it can be given is "
        f"{', '.join(known)}."
    ) from error
