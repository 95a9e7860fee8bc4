"""The inner step of one agent: first order, or a trust region."""

from torchrl_happo.optim.first_order import FirstOrderStep, InnerStep
from torchrl_happo.optim.minibatches import ReplayBufferMinibatches, ShuffledMinibatches
from torchrl_happo.optim.second_order import TrustRegionStep
from torchrl_happo.optim.trust_region import TrustRegion

__all__ = [
    "FirstOrderStep",
    "InnerStep",
    "ReplayBufferMinibatches",
    "ShuffledMinibatches",
    "TrustRegion",
    "TrustRegionStep",
]
