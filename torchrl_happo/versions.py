"""The private names of TorchRL, tensordict and the simulators that this library needs.

Each is wrapped by one function or constant here, with the version that it was checked against, so
that a new version is checked in one place.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["set_time_limit", "simulator", "single_network"]


def simulator(env: Any) -> Any:
    """Return the simulator that an environment of TorchRL wraps (TorchRL 0.14.1)."""
    return env._env


def single_network(stack: nn.Module) -> nn.Module:
    """Return the network of one agent of a stack, without parameters (TorchRL 0.14.1)."""
    return stack._empty_net  # type: ignore[return-value]


def set_time_limit(env: Any, max_steps: int) -> None:
    """Set the steps after which level-based foraging ends an episode (lbforaging 2.0.0)."""
    env.unwrapped._max_episode_steps = max_steps
