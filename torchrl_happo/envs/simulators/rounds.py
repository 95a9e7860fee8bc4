"""Environments whose agents act in turn, stepped as if the agents acted at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Rounds"]


class Rounds:
    """PettingZoo's parallel API over one of its environments whose agents act in fixed rounds.

    PettingZoo's own conversion (``aec_to_parallel``) observes every agent anew before its turn and
    checks every access. In a small environment such as mpe2's that takes longer than the physics.
    This class only plays the turns of all agents and then observes each once. Actions are passed on
    unchanged.

    Args:
        env (AECEnv): an environment without wrappers (``raw_env`` of a module of mpe2), all of
            whose agents take part until the end, and in which only the last turn of a round
            pays rewards or ends the episode.

    Example:
        >>> from mpe2 import simple_spread_v3
        >>> env = Rounds(simple_spread_v3.raw_env(max_cycles=25))
        >>> observations, _ = env.reset(seed=0)
        >>> _, rewards, _, truncations, _ = env.step({agent: 1 for agent in env.possible_agents})
        >>> sorted(rewards), any(truncations.values())
        (['agent_0', 'agent_1', 'agent_2'], False)
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.possible_agents: list[str] = list(env.possible_agents)

    def observation_space(self, agent: str) -> Any:
        """Return the space of an agent's observations."""
        return self.env.observation_space(agent)

    def action_space(self, agent: str) -> Any:
        """Return the space of an agent's actions."""
        return self.env.action_space(agent)

    def reset(self, seed: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; return the agents' observations and infos."""
        self.env.reset(seed=seed)
        return self._observe(), self.env.infos

    def step(self, actions: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """Play a round; return observations, rewards, terminations, truncations and infos."""
        env = self.env
        for agent in self.possible_agents:
            env.step(actions[agent])
        return self._observe(), env.rewards, env.terminations, env.truncations, env.infos

    def _observe(self) -> dict[str, np.ndarray]:
        return {agent: self.env.observe(agent) for agent in self.possible_agents}

    def close(self) -> None:
        """Close the environment."""
        self.env.close()
