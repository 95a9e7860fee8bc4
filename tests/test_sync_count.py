"""Count what an update reads back from the device, and copies to it, with ``check_finite=False``.

Counted on the pretended device (``pretended_device.py``). Blind to what a library does below
torch's operations, to the first update, which looks at values once, and to a semi-greedy order,
which reads the scores of the agents that are left at each turn and draws by them.
"""

from __future__ import annotations

import pytest

#: The process that pretends takes long to import torch and to update every team.
pytestmark = pytest.mark.slow

#: Cases with a read-back, each of which the head of ``update/batch.py`` names.
NAMED = {
    *("hatrpo sequential", "happo early stop", "happo value norm, dying"),
    *("hatrpo weighted", "hatrpo greedy", "recipe"),
}


def kinds(crossings):
    """Number of crossings by kind and file."""
    found = [(kind, where.split(":")[0]) for kind, where in crossings]
    return {each: found.count(each) for each in sorted(set(found))}


def test_nothing_crosses(pretended):
    """Every distribution, entropy bonus, minibatches, epochs, value norms, agents that die."""
    assert {name: found for name, found in pretended.items() if found and name not in NAMED} == {}


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        # A flag for each try of two agents.
        ("hatrpo sequential", {("read", "line_search.py"): 2 * 3}),
        # The divergence of two agents, of which none stays within the bound for two epochs.
        ("happo early stop", {("read", "first_order.py"): 2}),
        # The returns that count.
        ("happo value norm, dying", {("nonzero", "batch.py"): 1}),
        # Gain and divergence of two agents, then what each has spent.
        ("hatrpo weighted", {("read", "budget.py"): 2 * 2 + 2}),
        ("hatrpo greedy", {("read", "budget.py"): 2 * 2 + 2}),
    ],
)
def test_what_crosses_is_named(pretended, case, wanted):
    """No more than what the documentation says."""
    assert kinds(pretended[case]) == wanted


def test_no_data_crosses_in_collection(pretended):
    """Environments, policy and batch stay on the device; TorchRL reads its flags in a rollout."""
    assert {kind for kind, _ in kinds(pretended["recipe"])} <= {"read", "nonzero"}
