"""How many examples the long properties try: few in CI, as many as asked for by hand."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

VARIABLE = "TORCHRL_HAPPO_EXAMPLES"


def effort(examples):
    """Settings of a property: ``examples`` fixed ones, or new ones as the environment says.

    ``TORCHRL_HAPPO_EXAMPLES=100000 pytest tests/test_fuzz.py`` tries that many of each property,
    others on every run.
    """
    asked = os.environ.get(VARIABLE)
    return settings(
        phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining takes minutes
        max_examples=int(asked) if asked else examples,
        derandomize=not asked,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
