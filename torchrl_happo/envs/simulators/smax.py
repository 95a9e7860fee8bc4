"""Batches of SMAX battles: StarCraft's micromanagement in JAX, against a scripted enemy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from torchrl_happo.envs.simulators.masked import LARGEST_SEED, MaskedTeamEnv, Seen

__all__ = ["SMAXEnv"]

# Arguments of the simulator that are set here, or would change the layout of its data.
_OWN = {"scenario", "num_allies", "num_enemies", "action_type", "max_steps", "use_self_play_reward"}
# As a time limit it disables the simulator's own, which would count as the end of the battle.
_NEVER = 2**31 - 1


class SMAXEnv(MaskedTeamEnv):
    """A batch of battles of `SMAX <https://github.com/FLAIROx/JaxMARL>`_, stepped by one JAX call.

    A team of units, of unlike kinds in most scenarios, fights a scripted enemy. Each unit sees
    what is in its sight, moves or shoots, and may die before the battle is over. The team is paid
    for the damage that it does, and for a victory.

    The entries are those of :class:`~torchrl_happo.envs.simulators.masked.MaskedTeamEnv`. A dead
    unit is not ``("agents", "active")``, which an update reads. ``"state"`` is the simulator's
    state of the world. ``"won"`` says that all enemies are dead and a unit of the team is not; a
    battle in which both sides lose their last unit at once is lost. The battle terminates when a
    side has no unit left; the simulator's time limit is off.

    A copy draws from a stream of random numbers of its own, whichever other copies step or begin
    anew. A seed takes effect at once. The simulation runs on JAX's default device. Compilation
    takes seconds, up to a minute for large teams; later environments of this process with the same
    scenario, settings and number of copies use the code again.

    Args:
        scenario (str): name of a scenario of SMAX, such as ``"2s3z"`` (two stalkers and three
            zealots on each side) or ``"smacv2_10_units"`` (ten on each side, drawn anew for
            each battle).

    Keyword Args:
        num_envs (int): number of copies. Defaults to ``1``.
        seed (int, optional): seed from which each copy derives its own. Defaults to ``None``:
            drawn from torch's global generator.
        device (torch.device or str, optional): device of the data. Defaults to ``"cpu"``.
        **kwargs: settings of the simulator, for instance ``see_enemy_actions`` or
            ``attack_mode`` (of the enemy).

    Raises:
        ImportError: if JaxMARL is not installed.
        ValueError: if SMAX has no such scenario or no such setting, or there are no copies; at a
            step with an action that the mask forbids.

    Examples:
        >>> env = SMAXEnv("2s3z", num_envs=4, seed=0)  # doctest: +SKIP
        >>> env.rollout(3)["agents", "action_mask"].shape  # doctest: +SKIP
        torch.Size([4, 3, 5, 10])
    """

    def __init__(
        self,
        scenario: str,
        *,
        num_envs: int = 1,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_envs, device)
        self.scenario = scenario
        self._battle = _compile(scenario, tuple(sorted(kwargs.items())))
        simulator = self._battle.simulator
        self._make_specs(
            simulator.agents,
            simulator.obs_size,
            simulator.num_ally_actions,
            simulator.state_size,
            can_die=True,
        )
        self._keys: Any = None
        self._copies: list[Any] = []  # the states of all copies, and what they show
        self._seed_or_draw(seed)

    def _set_seed(self, seed: int | None) -> None:
        seeds = np.random.SeedSequence(seed).generate_state(self.batch_size[0]) % LARGEST_SEED
        self._keys = self._battle.keys(seeds.astype(np.uint32))

    def _begin(self, chosen: np.ndarray) -> Seen:
        new = self._battle.begin(self._keys)
        if self._copies:
            new = self._battle.choose(chosen, new, (self._keys, *self._copies))
        self._keys, *self._copies = new
        return self._look()

    def _play(self, actions: np.ndarray) -> tuple[Seen, np.ndarray, np.ndarray]:
        actions, goes_on = actions.astype(np.int32), ~self._over[:, 0]
        self._keys, *self._copies, rewards, over = self._battle.play(
            self._keys, self._copies, actions, goes_on
        )
        return self._look(), np.asarray(rewards), np.asarray(over)

    def _look(self) -> Seen:
        return {name: np.asarray(value) for name, value in self._copies[1].items()}


@dataclass(frozen=True)
class _Battle:
    """A simulator, and its functions for all copies at once, compiled at their first call."""

    simulator: Any
    keys: Callable[..., Any]
    begin: Callable[..., Any]
    choose: Callable[..., Any]
    play: Callable[..., Any]


@lru_cache(maxsize=8)  # training and evaluation build environments again and again
def _compile(scenario: str, settings: tuple[tuple[str, Any], ...]) -> _Battle:
    jax = _import_jaxmarl()
    np_ = jax.numpy
    simulator = _make(scenario, dict(settings))
    agents = simulator.agents
    allies = np.array([simulator.agent_ids[agent] for agent in agents])

    def look(observations: dict[str, Any], state: Any) -> dict[str, Any]:
        masks = simulator.get_avail_actions(state)
        alive = state.state.unit_alive
        ours = alive[allies]
        return {
            "observation": np_.stack([observations[agent] for agent in agents]),
            "action_mask": np_.stack([masks[agent] for agent in agents]).astype(bool),
            "active": ours,
            "state": observations["world_state"],
            "won": (ours.any() & (alive.sum() == ours.sum()))[None],
        }

    def begin_one(key: Any) -> tuple[Any, Any, dict[str, Any]]:
        key, own = jax.random.split(key)
        observations, state = simulator.reset(own)
        return key, state, look(observations, state)

    def play_one(key: Any, state: Any, actions: Any) -> tuple[Any, ...]:
        key, own = jax.random.split(key)
        chosen = dict(zip(agents, actions, strict=True))
        # Not step(), which begins the next episode by itself and keeps its last observation back.
        observations, state, rewards, dones, _ = simulator.step_env(own, state, chosen)
        return key, state, look(observations, state), rewards[agents[0]], dones["__all__"]

    def choose(mask: Any, new: Any, old: Any) -> Any:
        def rows(one: Any, other: Any) -> Any:
            return np_.where(mask.reshape(-1, *(1,) * (one.ndim - 1)), one, other)

        return jax.tree.map(rows, new, old)

    def play(keys: Any, copies: Any, actions: Any, goes_on: Any) -> tuple[Any, ...]:
        *new, rewards, over = jax.vmap(play_one)(keys, copies[0], actions)
        return *choose(goes_on, tuple(new), (keys, *copies)), rewards, over

    return _Battle(
        simulator,
        keys=jax.jit(jax.vmap(jax.random.PRNGKey)),
        begin=jax.jit(jax.vmap(begin_one)),
        choose=jax.jit(choose),
        play=jax.jit(play),
    )


def _make(scenario: str, settings: dict[str, Any]) -> Any:
    """Build the simulator; unknown scenarios and settings are refused."""
    known, takes = smax_scenarios(), smax_settings()
    if scenario not in known:
        raise ValueError(f"SMAX has no scenario {scenario!r}; it has {', '.join(known)}.")
    unknown = sorted(settings.keys() - takes.keys())
    if unknown:
        raise ValueError(
            f"SMAX has no settings {unknown}; what it can be given is {sorted(takes)}."
        )
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    return HeuristicEnemySMAX(scenario=map_name_to_scenario(scenario), max_steps=_NEVER, **settings)


def smax_scenarios() -> list[str]:
    """Return the names of the scenarios of SMAX."""
    _import_jaxmarl()
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO

    return list(MAP_NAME_TO_SCENARIO)


def smax_settings() -> dict[str, Any]:
    """Return the settings of SMAX that can be given, with their defaults."""
    _import_jaxmarl()
    import inspect

    from jaxmarl.environments.smax import SMAX, HeuristicEnemySMAX

    both = [inspect.signature(kind.__init__).parameters for kind in (HeuristicEnemySMAX, SMAX)]
    return {
        name: parameter.default
        for parameters in both
        for name, parameter in parameters.items()
        # Tables of units are arrays: there is no such word on a command line.
        if isinstance(parameter.default, (bool, int, float, str)) and name not in _OWN
    }


def _import_jaxmarl() -> Any:
    try:
        import jax
        import jaxmarl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "SMAXEnv needs JaxMARL; install it by: pip install 'torchrl_happo[smax]'."
        ) from error
    return jax
