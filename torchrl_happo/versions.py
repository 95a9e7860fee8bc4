"""Differences between versions of TorchRL and tensordict, and the private names in use.

Private names are wrapped by one function each, with the versions that they were checked against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torchrl
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torchrl._utils import _standardize


def needed(feature: str, version: str) -> str | None:
    """Return a sentence that asks for a newer TorchRL; ``None`` if this one is new enough."""
    installed = tuple(int(part) for part in torchrl.__version__.split(".")[:2])
    if installed >= tuple(map(int, version.split("."))):
        return None
    found, cure = torchrl.__version__, f"run pip install 'torchrl>={version},<0.15'"
    return f"{feature} needs TorchRL {version} or newer, but {found} is installed; {cure}."


def since(version: str, **settings: Any) -> dict[str, Any]:
    """Return settings that TorchRL has from a version on, or none of them."""
    return settings if needed("", version) is None else {}


def newer(name: str, module: str, version: str) -> Any:
    """Return a class of TorchRL; where it is too old, one of which no object can be made."""
    if (sentence := needed(name, version)) is None:
        return getattr(import_module(module), name)

    def refuse(*_: object, **__: object) -> None:
        raise ImportError(sentence)

    return type(name, (), {"__new__": refuse})


_SWAP = since("0.13", preserve_module_state=False)

if TYPE_CHECKING:
    from torchrl.envs.libs.lbforaging import LBForagingEnv
    from torchrl.modules import PopArtValueNorm, RunningValueNorm, ValueNorm
    from torchrl.objectives.multiagent import IPPOLoss, MAPPOLoss
else:  # the value norms of TorchRL 0.13 have no scale
    ValueNorm, RunningValueNorm, PopArtValueNorm = (
        newer(f"{kind}ValueNorm", "torchrl.modules", "0.14") for kind in ("", "Running", "PopArt")
    )
    LBForagingEnv = newer("LBForagingEnv", "torchrl.envs.libs.lbforaging", "0.14")
    IPPOLoss = newer("IPPOLoss", "torchrl.objectives.multiagent", "0.13")
    MAPPOLoss = newer("MAPPOLoss", "torchrl.objectives.multiagent", "0.13")


def has_analytic_entropy(dist: Distribution) -> bool:
    """Return whether a distribution has an entropy in closed form (TorchRL has this from 0.14)."""
    dist = dist.base_dist if isinstance(dist, Independent) else dist
    return type(dist).entropy is not Distribution.entropy


def mask_keys(loss: Any) -> tuple[NestedKey, ...]:
    """Return the keys of the validity masks that a loss reads (0.11.1 to 0.14.1)."""
    own = getattr(loss, "_loss_mask_keys", None)
    return (("collector", "mask"), "shifted_valid") if own is None else tuple(own())


def standardized(loss: Any, advantage: Tensor, data: TensorDictBase, *, is_fresh: bool) -> Tensor:
    """Return the advantage as a PPO loss was told to normalise it (0.11.1 to 0.14.1)."""
    if hasattr(loss, "_maybe_normalize_advantage"):
        return loss._maybe_normalize_advantage(advantage, data, update_norm=is_fresh)
    wanted = loss.normalize_advantage and advantage.numel() > 1
    return _standardize(advantage, loss.normalize_advantage_exclude_dims) if wanted else advantage


def tensors_only(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a ``state_dict`` without the shapes that tensordict adds before 0.12."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def swapped(parameters: TensorDictBase, network: nn.Module) -> Any:
    """Return a context in which a network has other parameters (the keyword: tensordict 0.13)."""
    return parameters.to_module(network, **_SWAP)


def entropy_of(loss: Any, dist: Distribution, shape: torch.Size) -> Tensor | TensorDictBase:
    """Return the entropy by a PPO loss, sampled where it has no closed form (0.11.1 to 0.14.1)."""
    return loss._get_entropy(dist, shape)


def weighted_entropy(loss: Any, entropy: Tensor | TensorDictBase) -> Tensor:
    """Return minus the entropy times the coefficients of a PPO loss (0.11.1 to 0.14.1)."""
    return loss._weighted_loss_entropy(entropy)


def simulator(env: Any) -> Any:
    """Return the simulator that an environment of TorchRL wraps (0.11.1 to 0.14.1)."""
    return env._env


def close_logger(logger: Any) -> None:
    """Close a logger (TorchRL 0.14), or the writer behind it."""
    getattr(logger, "close", getattr(logger.experiment, "close", lambda: None))()


def single_network(stack: nn.Module) -> nn.Module:
    """Return the network of one agent of a stack, without parameters (0.11.1 to 0.14.1)."""
    return stack._empty_net  # type: ignore[return-value]


def set_time_limit(env: Any, max_steps: int) -> None:
    """Set the steps after which level-based foraging ends an episode (lbforaging 2.0.0)."""
    env.unwrapped._max_episode_steps = max_steps


def buffer_parts(own: Any) -> dict[str, Any]:
    """Return transform, collation and generator of a replay buffer (0.11.1 to 0.14.1)."""
    return {"transform": own._transform, "collate_fn": own._collate_fn, "generator": own._rng}


def takes_keywords(module: nn.Module) -> bool:
    """Return whether a module passes its entries by keyword (tensordict 0.11.0 to 0.14.3)."""
    return bool(module._kwargs)


def draw(head: Any, dist: Distribution, kind: Any) -> Tensor:
    """Return an action as a probabilistic module draws it (tensordict 0.11.0 to 0.14.3)."""
    return head._dist_sample(dist, interaction_type=kind)


def made_estimator(loss: Any) -> Any:
    """Return the value estimator of a loss, if one was made (0.11.1 to 0.14.1)."""
    return getattr(loss, "_value_estimator", None)


def set_filling(estimator: Any, fill: Callable[..., TensorDictBase] | None) -> None:
    """Fill in missing next observations by a function; ``None``: by TorchRL's (0.13 to 0.14.1)."""
    if fill is None:
        del estimator._sanitize_next_obs_nan
    else:
        estimator._sanitize_next_obs_nan = fill


def set_head_weights(loss: Any, weights: Mapping[NestedKey, float]) -> None:
    """Weigh the entropies of an action's parts in a PPO loss (0.11.1 to 0.14.1)."""
    loss._entropy_coeff_map = weights
