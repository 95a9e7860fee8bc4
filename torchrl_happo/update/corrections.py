"""Which correction each loss asks for: the line where a new one is registered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torchrl_happo.objectives.a2po import A2POLoss
from torchrl_happo.objectives.base import SequentialLoss
from torchrl_happo.objectives.lagrangian import HAPPOLagrangianLoss
from torchrl_happo.objectives.macpo import MACPOLoss
from torchrl_happo.objectives.mat import MATLoss
from torchrl_happo.update.constrained import BoundedCost
from torchrl_happo.update.correction import Correction, CorrectionFactory, RatioFactor
from torchrl_happo.update.lagrangian import PricedCosts
from torchrl_happo.update.owned import OwnedCritic
from torchrl_happo.update.reestimation import Reestimated

__all__ = ["correction_of"]

#: A correction by the class of the loss. Every other loss has the factor.
CORRECTIONS: dict[type[SequentialLoss], Callable[..., Correction]] = {
    A2POLoss: Reestimated,
    HAPPOLagrangianLoss: PricedCosts,
    MACPOLoss: BoundedCost,
    MATLoss: OwnedCritic,
}


def correction_of(loss: SequentialLoss) -> CorrectionFactory:
    """Return the correction that a loss asks for."""
    for kind, correction in CORRECTIONS.items():
        if isinstance(loss, kind):
            return partial(correction, loss=loss)
    return RatioFactor
