"""TorchRL's GAE for teams, and what takes its place where TorchRL is too old to have it."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.objectives.utils import ValueEstimators
from torchrl.objectives.value import GAE

from torchrl_happo.versions import needed

__all__ = ["TEAM_GAE", "MultiAgentGAE"]

if hasattr(ValueEstimators, "MAGAE"):  # TorchRL 0.13
    from torchrl.objectives.value import MultiAgentGAE

    TEAM_GAE = ValueEstimators.MAGAE
else:

    class MultiAgentGAE(GAE):  # type: ignore[no-redef]
        """GAE that pays the reward of the team to the value of each agent."""

        def __init__(self, *, gamma: float = 0.99, lmbda: float = 0.95, **kwargs: Any) -> None:
            super().__init__(gamma=gamma, lmbda=lmbda, **{"value_network": None, **kwargs})

        def forward(self, tensordict: TensorDictBase, **kwargs: Any) -> TensorDictBase:
            """Write advantage, returns and values, in place."""
            keys, dims = self.tensor_keys, tensordict.batch_dims
            one = tensordict.select(*self.value_network.in_keys, strict=False)[..., :1].copy()
            value = self.value_network(one).get(keys.value)
            own = tensordict.copy()
            for key in (keys.reward, keys.done, keys.terminated):
                entry = own.get(("next", key))
                if entry.ndim < value.ndim:
                    if self.shifted:
                        raise ImportError(needed("shifted=True with a value of each agent", "0.13"))
                    own.set(("next", key), torch.stack([entry] * value.shape[dims], dims))
            made = super().forward(own, **kwargs)
            return tensordict.update(made.select(keys.advantage, keys.value_target, keys.value))

    TEAM_GAE = MultiAgentGAE
