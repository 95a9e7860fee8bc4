"""Parts of TorchRL that the tests need and its older versions lack.

A test that uses it is skipped where TorchRL is too old; the reason names what it needs and the
version that has it. Making an object of one of the classes below is enough for that: the
library's sentence ends the test (see ``conftest.py``). What fails in another way is marked.
"""

from __future__ import annotations

import pytest

from torchrl_happo.versions import (
    IPPOLoss,
    MAPPOLoss,
    PopArtValueNorm,
    RunningValueNorm,
    ValueNorm,
    needed,
    newer,
    tensors_only,
)

__all__ = [
    "IPPOLoss",
    "MAPPOLoss",
    "PercentileValueNorm",
    "PopArtValueNorm",
    "RunningValueNorm",
    "ValueNorm",
    "load_tensors",
    "needs",
    "tensors",
]

PercentileValueNorm = newer("PercentileValueNorm", "torchrl.modules", "0.14")


def needs(feature, version):
    """Marks a test, or a parameter, that an older TorchRL cannot pass."""
    sentence = needed(feature, version)
    return pytest.mark.skipif(sentence is not None, reason=str(sentence))


def tensors(module):
    """The tensors of a module's state; tensordict before 0.12 adds shapes to them."""
    return tensors_only(module.state_dict())


def load_tensors(module, state):
    """Load what :func:`tensors` returned."""
    module.load_state_dict({**module.state_dict(), **state})
