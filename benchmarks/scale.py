"""What several learners and collectors cost, on paper and measured.

    python benchmarks/scale.py paper      # messages and bytes of an update, for 8 to 1024 learners
    python benchmarks/scale.py measure --json benchmarks/results/scale.json

:func:`traffic` is the formula; ``tests/test_learners.py`` counts the messages of real updates and
finds the same numbers, to the byte. ``measure`` runs the recipe with one and two collectors, and
with one and two learners, in turns, and reads frames per second from what the runs record.
"""

from __future__ import annotations

from dataclasses import dataclass

GENERATOR_BYTES = 5056  # the state of a generator of torch's, on the CPU


@dataclass(frozen=True)
class Update:
    """One update of a team, as each learner sees it.

    Args:
        algorithm: ``"happo"`` or ``"hatrpo"``.
        actors: parameters of each agent's network.
        critic: parameters of the critic.
        epochs, minibatches: of each agent and of the critic; for HATRPO of the critic alone.
        tries: steps that each agent's line search evaluates (HATRPO).
        cg_iterations: of conjugate gradient (HATRPO).
        returns: numbers that the value normalisation takes in; 0: there is none.
        number_bytes: size of a number.
    """

    algorithm: str
    actors: tuple[int, ...]
    critic: int
    epochs: int
    minibatches: int
    tries: int = 1
    cg_iterations: int = 10
    returns: int = 0
    number_bytes: int = 4


def traffic(update: Update) -> tuple[int, int]:
    """Messages that each learner takes part in, and the bytes that it puts into them."""
    messages = [*_beginning(update)]
    for parameters in update.actors:
        messages += _agent(update, parameters)
    messages += _critic(update)
    return len(messages), sum(messages)


def _numbers(update: Update, *counts: int) -> list[int]:
    return [count * update.number_bytes for count in counts]


def _beginning(update: Update) -> list[int]:
    """Whether all accept the batch, in what order to go, who acts at all."""
    n_agents = len(update.actors)
    return [8, 8, 8 * n_agents, 2 * GENERATOR_BYTES, 4 * n_agents]


def _agent(update: Update, parameters: int) -> list[int]:
    """The turn of one agent."""
    happo = update.algorithm == "happo"
    agreement, rounds = [8], [8] if happo else []
    advantage = _numbers(update, 2, 2)
    steps = update.epochs * update.minibatches
    if happo:
        move = _numbers(update, *[parameters + 2] * steps)
    else:
        products = [parameters + 1] * update.cg_iterations
        move = _numbers(update, parameters + 2, *products, *[3] * update.tries)
    metrics = _numbers(update, 1, 2, 3, 6 + happo, 2)
    return agreement + advantage + rounds + move + metrics


def _critic(update: Update) -> list[int]:
    """Whether there is anything to fit, the critic, its statistics, and how well it does."""
    steps = update.epochs * update.minibatches
    norm = [8, *_numbers(update, update.returns + 1)] if update.returns else []
    fit = [8, *_numbers(update, *[update.critic + 2] * steps)]
    return [8, *norm, *fit, *_numbers(update, 2, 2, 2, 2)]
