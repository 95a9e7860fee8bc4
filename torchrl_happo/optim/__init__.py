"""The inner step of one agent: first order, or a trust region."""

from torchrl_happo.optim.first_order import FirstOrderStep, InnerStep
from torchrl_happo.optim.minibatches import ReplayBufferMinibatches, ShuffledMinibatches

__all__ = ["FirstOrderStep", "InnerStep", "ReplayBufferMinibatches", "ShuffledMinibatches"]
