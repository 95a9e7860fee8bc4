"""The critics of an update: fitted for themselves, or along with the agent that owns them."""

from __future__ import annotations

from collections.abc import Callable

from tensordict import TensorDict, TensorDictBase

from torchrl_happo.transaction import Transaction
from torchrl_happo.update.batch import TeamBatch

__all__ = ["fit", "renormalize_owned", "report_of"]


def fit(
    name: str,
    batch: TeamBatch,
    transaction: Transaction,
    move: Callable[[TensorDictBase], TensorDict],
) -> TensorDict:
    """Fit a critic, and the statistics of its values.

    Args:
        name (str): of the critic.
        batch (TeamBatch): the batch of the update.
        transaction (Transaction): remembers the statistics.
        move (callable): lets the critic's step move its parameters by data; returns its report.
    """
    report = TensorDict()
    if batch.has_values(name):
        data = batch.critic_data(name)
        _renormalize(name, batch, data, transaction)
        report = move(data)
    return report.update(report_of(name, batch))


def renormalize_owned(batch: TeamBatch, transaction: Transaction) -> None:
    """Update the statistics of the critics that agents own, before any agent moves.

    Old values in the batch are restated on the new scale, as those of any critic are before its
    own step.
    """
    for name, critic in batch.critics.items():
        if critic.is_owned and critic.is_fitted:
            _renormalize(name, batch, batch.critic_batches[name], transaction)


def report_of(name: str, batch: TeamBatch) -> TensorDict:
    """Return what is reported of every critic."""
    return TensorDict({"explained_variance": batch.explained_variance(name)})


def _renormalize(
    name: str, batch: TeamBatch, data: TensorDictBase, transaction: Transaction
) -> None:
    critic = batch.critics[name]
    if critic.value_norm is not None:
        transaction.add(critic.update_norm(batch.valid_returns(name), data))
