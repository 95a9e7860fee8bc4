"""Loss modules of the sequential update."""

from torchrl_happo.objectives.a2po import A2POLoss
from torchrl_happo.objectives.coppo import CoPPOLoss
from torchrl_happo.objectives.haa2c import HAA2CLoss
from torchrl_happo.objectives.happo import HAPPOLoss
from torchrl_happo.objectives.hatrpo import HATRPOLoss
from torchrl_happo.objectives.lagrangian import HAPPOLagrangianLoss
from torchrl_happo.objectives.macpo import MACPOLoss
from torchrl_happo.objectives.mat import MATLoss
from torchrl_happo.objectives.tppo import TPPOLoss

__all__ = [
    "A2POLoss",
    "CoPPOLoss",
    "HAA2CLoss",
    "HAPPOLagrangianLoss",
    "HAPPOLoss",
    "HATRPOLoss",
    "MACPOLoss",
    "MATLoss",
    "TPPOLoss",
]
