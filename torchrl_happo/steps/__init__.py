"""The inner step of one agent: first order, or a trust region."""

from torchrl_happo.steps.first_order import FirstOrderStep, InnerStep
from torchrl_happo.steps.minibatches import ReplayBufferMinibatches, ShuffledMinibatches
from torchrl_happo.steps.trust_region.solve import TrustRegion
from torchrl_happo.steps.trust_region.step import TrustRegionStep

__all__ = [
    "FirstOrderStep",
    "InnerStep",
    "ReplayBufferMinibatches",
    "ShuffledMinibatches",
    "TrustRegion",
    "TrustRegionStep",
]
