"""Whole updates on a pretended device: no tensor of the host meets one of the device.

Blind to scalars of the host in ``stack`` and ``cat``, to ``_foreach`` kernels over two devices, to
memory layouts, kernels and numbers, and to generators, of which a pretended device can have none.
"""

from __future__ import annotations

import pytest

#: The process that pretends takes long to import torch and to update every team.
pytestmark = pytest.mark.slow


def test_every_update_runs(pretended):
    """All distributions, both losses, deaths, value norms, schedulers, a share of the samples."""
    distributions = ("normal", "tanh", "discrete", "masked")
    assert list(pretended) == [
        *(f"{loss} {kind}" for kind in distributions for loss in ("happo", "hatrpo")),
        *("happo schedule, clipped values", "happo value norm", "happo popart"),
        *("happo bounds", "hatrpo share", "hatrpo sequential", "happo early stop"),
        *("happo value norm, clipped values, squashed", "happo value norm, dying"),
        *("hatrpo weighted", "hatrpo greedy", "a2po"),
        *("happo dying", "hatrpo dying", "recipe"),
    ]
