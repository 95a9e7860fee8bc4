"""MuJoCo's robots as teams: their joints, the links between them, and their partitions.

The names, the links, the partitions and the order in which an agent observes are those of
gymnasium-robotics' multi-agent MuJoCo (``mamujoco_v1``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

__all__ = ["ROBOTS", "Joint", "Robot"]


@dataclass(frozen=True)
class Joint:
    """A joint with a motor, and its entries of the action and the state.

    Attributes:
        actuator (int): entry of the joint action that moves it.
        own (tuple of int): entries of the state that the agent observes that moves it.
        near (tuple of int): entries that agents with neighbouring joints observe.
    """

    actuator: int
    own: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class Robot:
    """A robot: its state is the observation of the ``v5`` task of the same name.

    Attributes:
        joints (dict of str to Joint): by name.
        links (tuple of tuple of str): joints that are neighbours of each other.
        trunk (tuple of int): entries of the state that every agent observes.
        partitions (dict of str to tuple): for each name of a partition the joints of each agent.
        max_velocities (dict of str to float): for each name of a partition the velocity above
            which Safety-Gymnasium's multi-agent tasks have a cost.
        velocity (callable or None): maps the velocities in x and in y of a step, the second of
            which planar robots lack, to the velocity that is bounded.
    """

    joints: Mapping[str, Joint]
    links: tuple[tuple[str, ...], ...]
    trunk: tuple[int, ...]
    partitions: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    max_velocities: Mapping[str, float] = field(default_factory=dict)
    velocity: Callable[..., np.ndarray] | None = None

    def actuators(self, team: Sequence[Sequence[str]]) -> list[list[int]]:
        """Return for each agent the entries of the joint action that move its joints."""
        return [[self.joints[name].actuator for name in joints] for joints in team]

    def team(self, actuators: Sequence[Sequence[int]]) -> list[list[str]]:
        """Return for each agent its joints, from the entries of the joint action."""
        names = {joint.actuator: name for name, joint in self.joints.items()}
        return [[names[actuator] for actuator in own] for own in actuators]

    def observations(self, team: Sequence[Sequence[str]], distance: int) -> list[list[int]]:
        """Return for each agent the entries of the state that it observes.

        These are, in this order, those of its own joints, of the joints at distance 1, 2, ...,
        and of the trunk. Within a distance joints are in the order of their names.

        Args:
            team (sequence of sequence of str): the joints of each agent.
            distance (int): links between an agent's joints and the furthest that it observes.
        """
        return [self._observed(set(joints), distance) for joints in team]

    def _observed(self, joints: set[str], distance: int) -> list[int]:
        entries = [entry for name in sorted(joints) for entry in self.joints[name].own]
        for ring in self._rings(joints, distance):
            entries += [entry for name in sorted(ring) for entry in self.joints[name].near]
        return list(dict.fromkeys([*entries, *self.trunk]))  # joints share bodies

    def _rings(self, joints: set[str], distance: int) -> Iterator[set[str]]:
        """Yield the joints at distance 1, 2, ... from the given ones."""
        seen, ring = set(joints), joints
        for _ in range(distance):
            ring = {name for link in self.links if ring & set(link) for name in link} - seen
            seen |= ring
            yield ring


def _tree(
    joints: Mapping[str, tuple[int, tuple[int, ...]]],
    trunk: tuple[int, int],
    bodies: Sequence[tuple[int, int]] = (),
    forces: int | None = None,
) -> dict[str, Joint]:
    """Return the joints of a robot whose state is positions of trunk and joints, then velocities.

    Args:
        joints (dict): in the order of the state; their actuator and the bodies at them.
        trunk (tuple of int): numbers of positions and of velocities that belong to no joint.
        bodies (sequence of tuple of int): the blocks of the state with a row for each body
            (counted from 1): where they start, and the size of a row.
        forces (int, optional): where the block of the joints' own forces starts.
    """
    positions, velocities = trunk
    found = {}
    for index, (name, (actuator, at)) in enumerate(joints.items()):
        position = positions + index
        own = [position, positions + len(joints) + velocities + index]
        blocks = [_rows(start, size, at) for start, size in bodies]
        if forces is not None:
            blocks.insert(-1, [forces + index])
        own += [entry for block in blocks for entry in block]
        found[name] = Joint(actuator, tuple(own), (position,))
    return found


def _rows(start: int, size: int, bodies: Sequence[int]) -> list[int]:
    return [start + (body - 1) * size + entry for body in bodies for entry in range(size)]


def _chain(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple(pairwise(names))


def _each(joints: Sequence[str]) -> tuple[tuple[str], ...]:
    return tuple((name,) for name in joints)


def _half_cheetah() -> Robot:
    back, front = ("bthigh", "bshin", "bfoot"), ("fthigh", "fshin", "ffoot")
    names = (*back, *front)
    return Robot(
        _tree({name: (i, ()) for i, name in enumerate(names)}, trunk=(2, 3)),
        links=_chain("bfoot", "bshin", "bthigh", "fthigh", "fshin", "ffoot"),
        trunk=(0, 1, 8, 9, 10),
        partitions={"2x3": (back, front), "6x1": _each(names)},
        max_velocities={"6x1": 2.932, "2x3": 3.227},
        velocity=np.abs,
    )


def _walker() -> Robot:
    names = ("thigh_joint", "leg_joint", "foot_joint")
    left = ("thigh_left_joint", "leg_left_joint", "foot_left_joint")
    return Robot(
        _tree({name: (i, ()) for i, name in enumerate((*names, *left))}, trunk=(2, 3)),
        links=(*_chain(*names[::-1], *left),),
        trunk=(0, 1, 8, 9, 10),
        partitions={"2x3": (names[::-1], left[::-1]), "6x1": _each((*names, *left))},
        max_velocities={"2x3": 1.641},
        velocity=np.abs,
    )


def _hopper() -> Robot:
    names = ("thigh_joint", "leg_joint", "foot_joint")
    return Robot(
        _tree({name: (i, ()) for i, name in enumerate(names)}, trunk=(2, 3)),
        links=_chain(*names),
        trunk=(0, 1, 5, 6, 7),
        partitions={"3x1": _each(names)},
        max_velocities={"3x1": 0.9613},
        velocity=np.abs,
    )


def _ant() -> Robot:
    legs = [(f"hip{leg}", f"ankle{leg}") for leg in (1, 2, 3, 4)]
    first_actuator = (2, 4, 6, 0)
    joints: dict[str, tuple[int, tuple[int, ...]]] = {}
    for (hip, ankle), actuator, body in zip(legs, first_actuator, (2, 5, 8, 11), strict=True):
        joints[hip] = actuator, (1, body)  # the torso and the leg
        joints[ankle] = actuator + 1, (body, body + 1, body + 2)
    one, two, three, four = legs
    return Robot(
        _tree(joints, trunk=(5, 6), bodies=[(27, 6)]),
        links=(*legs, ("hip1", "hip2", "hip3", "hip4")),
        trunk=(*range(5), *range(13, 19)),
        partitions={
            "2x4": ((*one, *two), (*three, *four)),
            "2x4d": ((*one, *four), (*two, *three)),
            "4x2": (one, two, three, four),
            "8x1": _each([name for leg in legs for name in leg]),
        },
        max_velocities={"2x4": 2.522, "4x2": 2.418},
        velocity=np.hypot,
    )


def _humanoid() -> Robot:
    torso, lower_waist, pelvis = 1, 2, 3
    abdomen = ("abdomen_x", "abdomen_y", "abdomen_z")
    # gymnasium-robotics files the states of abdomen_y and abdomen_z under each other's names. Here
    # they are MuJoCo's. The agent who moves both observes the same, in another order.
    joints: dict[str, tuple[int, tuple[int, ...]]] = {
        "abdomen_z": (1, (torso, lower_waist, pelvis)),
        "abdomen_y": (0, (torso, lower_waist, pelvis)),
        "abdomen_x": (2, (pelvis, 4, 7)),
    }
    sides = ("right", 4, 3), ("left", 7, 7)
    legs, arms = {}, {}
    for side, thigh, actuator in sides:
        legs[side] = tuple(f"{side}_{joint}" for joint in ("hip_x", "hip_z", "hip_y", "knee"))
        for index, name in enumerate(legs[side]):
            joints[name] = actuator + index, (thigh + index // 3, thigh + 1 + index // 3)
    for side, upper_arm, actuator in (("right", 10, 11), ("left", 12, 14)):
        arms[side] = tuple(f"{side}_{joint}" for joint in ("shoulder1", "shoulder2", "elbow"))
        for index, name in enumerate(arms[side]):
            at = (torso, upper_arm, upper_arm + 1) if index < 2 else (upper_arm + 1,)
            joints[name] = actuator + index, at
    links: list[tuple[str, ...]] = [abdomen]
    for side, _, _ in sides:
        hips, knee, shoulders = legs[side][:3], legs[side][3], arms[side][:2]
        links += [hips, (knee, *hips), arms[side], (*shoulders, *abdomen), (*abdomen, *hips)]
    in_state_order = list(joints)
    return Robot(
        _tree(joints, trunk=(5, 6), bodies=[(45, 10), (175, 6), (270, 6)], forces=253),
        links=tuple(links),
        trunk=(*range(5), *range(22, 28)),
        partitions={
            "9|8": (
                (*abdomen, *arms["right"], *arms["left"]),
                (*sorted(legs["right"]), *sorted(legs["left"])),
            ),
            "17x1": _each(sorted(in_state_order, key=lambda name: joints[name][0])),
        },
        max_velocities={"9|8": 0.58},
        velocity=np.hypot,
    )


def _swimmer() -> Robot:
    return Robot(
        {"rot2": Joint(0, (1, 3, 6), (1,)), "rot3": Joint(1, (2, 4, 7), (2,))},
        links=(("rot2", "rot3"),),
        trunk=(0, 5),
        partitions={"2x1": (("rot2",), ("rot3",))},
        max_velocities={"2x1": 0.04891},
        velocity=lambda x, y: x,  # signed: swimming backwards costs nothing
    )


def _reacher() -> Robot:
    # Sine and cosine of each angle; the second joint also feels where the target is.
    return Robot(
        {"joint0": Joint(0, (2, 0, 6), (2, 0)), "joint1": Joint(1, (3, 1, 7, 8, 9), (3, 1))},
        links=(("joint0", "joint1"),),
        trunk=(4, 5),
        partitions={"2x1": (("joint0",), ("joint1",))},
    )


ROBOTS: dict[str, Robot] = {
    "Ant": _ant(),
    "HalfCheetah": _half_cheetah(),
    "Hopper": _hopper(),
    "Humanoid": _humanoid(),
    "HumanoidStandup": _humanoid(),
    "Reacher": _reacher(),
    "Swimmer": _swimmer(),
    "Walker2d": _walker(),
}
