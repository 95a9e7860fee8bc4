"""Multi-agent MuJoCo, in batches: a robot whose joints are moved by different agents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torchrl.envs import TransformedEnv

from torchrl_happo.arguments import check_choice, check_counts, check_positive
from torchrl_happo.envs.partition import check_partition
from torchrl_happo.envs.simulators.envpool import EnvPoolEnv
from torchrl_happo.envs.simulators.robots import ROBOTS, Robot
from torchrl_happo.envs.split import AgentSplit

__all__ = ["make_mujoco"]

# The version whose state the tables of robots describe; older ones have other entries.
_DESCRIBED = "v5"


def make_mujoco(
    robot: str,
    partition: str | Sequence[Sequence[int]],
    *,
    num_envs: int = 1,
    nearest: int | None = None,
    identity: bool = True,
    standardize: bool = True,
    bounded_actions: bool = False,
    version: str = "v5",
    max_steps: int | None = None,
    num_threads: int = 1,
    seed: int | None = None,
    cost: str | None = None,
    max_velocity: float | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> TransformedEnv:
    r"""Build a batch of multi-agent MuJoCo tasks (`Peng et al., 2021 <https://arxiv.org/abs/2003.06709>`_).

    It is an :class:`~torchrl_happo.envs.EnvPoolEnv` behind an
    :class:`~torchrl_happo.envs.AgentSplit`. The defaults are the setting of the reference
    implementation of HAPPO: every agent observes the whole state and its identity, standardised,
    and actions have no bounds.

    ===================  ===================================================================
    robot                partitions
    ===================  ===================================================================
    ``Ant``              ``2x4`` (front and back), ``2x4d`` (diagonals), ``4x2``, ``8x1``
    ``HalfCheetah``      ``2x3``, ``6x1``
    ``Hopper``           ``3x1``
    ``Humanoid``         ``9|8`` (upper and lower body), ``17x1``
    ``HumanoidStandup``  ``9|8``, ``17x1``
    ``Reacher``          ``2x1``
    ``Swimmer``          ``2x1``
    ``Walker2d``         ``2x3``, ``6x1``
    ===================  ===================================================================

    Args:
        robot (str): name of the robot.
        partition (str or sequence of sequence of int): its name in the table, or for each agent
            the entries of the joint action that it chooses.

    Keyword Args:
        num_envs (int): copies stepped together. Defaults to ``1``.
        nearest (int, optional): an agent observes the trunk, its own joints, and the positions
            of those up to this many links away (``agent_obsk`` of gymnasium-robotics).
            Defaults to ``None``: it observes the whole state.
        identity (bool): whether an agent observes its one-hot identity. Defaults to ``True``.
        standardize (bool): whether each observation and the state have mean 0 and standard
            deviation 1 over their own entries. Defaults to ``True``.
        bounded_actions (bool): whether the actions have the bounds of the motors. Without
            them a policy is Gaussian, MuJoCo clamps the forces that it applies, and the cost of
            control is that of the action itself. Defaults to ``False``.
        version (str): version of the Gymnasium task. Defaults to ``"v5"``, the only one that fits
            ``nearest``, as long as no argument of the task changes its state.
        max_steps (int, optional): steps after which an episode is truncated. Defaults to the
            task's own limit: 1000, or 50 for ``Reacher``.
        num_threads (int): threads that step the copies. Defaults to ``1``.
        seed (int, optional): see :class:`~torchrl_happo.envs.EnvPoolEnv`. Defaults to ``None``.
        cost (str, optional): ``"velocity"`` adds the cost of Safety-Gymnasium's multi-agent
            velocity tasks as ``"cost"`` ``[num_envs, 1]``, beside the reward: 1 at a step
            on which the robot is faster than ``max_velocity``, otherwise 0. The velocity is
            :math:`|v_x|` of planar robots, :math:`v_x` of ``Swimmer`` and
            :math:`\sqrt{v_x^2 + v_y^2}` of ``Ant`` and ``Humanoid``. Defaults to ``None``: there
            is no cost.
        max_velocity (float, optional): bound of the velocity. Defaults to that of
            Safety-Gymnasium for the same robot and partition.
        device (torch.device or str, optional): device of the data. Defaults to ``"cpu"``.
        **kwargs: arguments of the task, for instance ``ctrl_cost_weight``.

    Returns:
        an environment with the team's ``"reward"`` and ``"state"`` at the root.

    Raises:
        ValueError: if there is no such robot or partition, if ``nearest`` does not fit the
            ``version`` or the task's arguments, or if ``cost`` is unknown, the robot has no
            velocity, or its bound is neither known nor given.

    Examples:
        >>> env = make_mujoco("HalfCheetah", "2x3", num_envs=4, seed=0)  # doctest: +SKIP
        >>> env.rollout(5)["agents", "action"].shape  # doctest: +SKIP
        torch.Size([4, 5, 2, 3])
    """
    body = _lookup("robot", robot, ROBOTS)
    if isinstance(partition, str):
        team = _lookup(f"partition of {robot}", partition, body.partitions)
        actuators = body.actuators(team)
    else:
        actuators = check_partition(partition)
    check_counts(nearest=nearest, at_least=0, optional=True)
    base = EnvPoolEnv(
        f"{robot}-{version}",
        num_envs=num_envs,
        max_steps=max_steps,
        num_threads=num_threads,
        seed=seed,
        device=device,
        cost=_velocity_cost(robot, body, partition, cost, max_velocity),
        **kwargs,
    )
    _check_size(robot, actuators, base.action_spec.shape[-1])
    split = AgentSplit(
        actuators,
        observations=None if nearest is None else _nearest(body, actuators, nearest, base),
        identity=identity,
        standardize=standardize,
        bounded_actions=bounded_actions,
    )
    base.group_map = split.group_map  # where scripts look for it, as with VmasEnv
    return TransformedEnv(base, split)


def _velocity_cost(
    robot: str, body: Robot, partition: Any, cost: str | None, max_velocity: float | None
) -> Callable[[Mapping[str, np.ndarray]], np.ndarray] | None:
    """Return the cost of a step from its info, ``None`` if none is asked for."""
    if cost is None:
        if max_velocity is not None:
            raise ValueError(
                f"max_velocity={max_velocity} bounds the velocity of a cost, but there is none; "
                "pass cost='velocity', or leave max_velocity out."
            )
        return None
    check_choice("cost", cost, ("velocity",))
    measure = body.velocity
    if measure is None:
        raise ValueError(f"{robot} has no velocity for cost='velocity'; leave cost out.")
    check_positive(max_velocity=max_velocity)
    if max_velocity is None:
        max_velocity = body.max_velocities.get(partition) if isinstance(partition, str) else None
    if max_velocity is None:
        raise ValueError(
            f"Safety-Gymnasium has no bound of the velocity for {robot} {partition!r}, only for "
            f"{list(body.max_velocities)}; pass max_velocity."
        )
    bound = max_velocity

    def velocity_cost(info: Mapping[str, np.ndarray]) -> np.ndarray:
        velocities = [info[name] for name in ("x_velocity", "y_velocity") if name in info]
        return measure(*velocities) > bound

    return velocity_cost


def _check_size(robot: str, actuators: Sequence[Sequence[int]], wanted: int) -> None:
    got = sum(map(len, actuators))
    if got != wanted:
        raise ValueError(
            f"The partition {actuators} has {got} entries, but the action of {robot} has {wanted}; "
            "give each to one agent."
        )


def _nearest(
    body: Robot, actuators: Sequence[Sequence[int]], nearest: int, base: EnvPoolEnv
) -> list[list[int]]:
    robot, _, version = base.task.rpartition("-")
    if version != _DESCRIBED:
        raise ValueError(
            f"nearest={nearest} needs the state of version={_DESCRIBED!r}, got {version!r}; leave "
            "one of them out."
        )
    got, wanted = (
        env.observation_spec["observation"].shape[-1] for env in (base, EnvPoolEnv(base.task))
    )
    if got != wanted:
        raise ValueError(
            f"nearest={nearest} needs the state of {robot} with its {wanted} entries, but the "
            f"task's arguments make it one of {got}; leave nearest or these out."
        )
    return body.observations(body.team(actuators), nearest)


def _lookup(what: str, name: str, known: Any) -> Any:
    if name not in known:
        near = get_close_matches(name, known) or list(known)
        raise ValueError(f"There is no {what} {name!r}; did you mean one of {near}?")
    return known[name]
