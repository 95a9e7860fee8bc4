"""How one set of parameters moves: by first order, or within a trust region."""

from torchrl_happo.steps.first_order import FirstOrder, FirstOrderStep
from torchrl_happo.steps.minibatches import ReplayBufferMinibatches, ShuffledMinibatches
from torchrl_happo.steps.step import Problem, Proposal, Step, StepFactory
from torchrl_happo.steps.trust_region.step import TrustRegion, TrustRegionStep
from torchrl_happo.transaction import uncached_autocast

__all__ = [
    "FirstOrder",
    "FirstOrderStep",
    "Problem",
    "Proposal",
    "ReplayBufferMinibatches",
    "ShuffledMinibatches",
    "Step",
    "StepFactory",
    "TrustRegion",
    "TrustRegionStep",
    "uncached_autocast",
]
