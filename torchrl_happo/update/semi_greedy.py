"""The semi-greedy order of A2PO."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchrl_happo.masked import masked_mean
from torchrl_happo.team.agent import Agent
from torchrl_happo.update.batch import TeamBatch
from torchrl_happo.update.correction import Correction

__all__ = ["SemiGreedy"]


class SemiGreedy:
    r"""In turns the agent with the largest score and a random one of the others.

    The score is the mean of :math:`|A_i / V_i|` over an agent's valid decisions (Wang et al.,
    2023, https://arxiv.org/abs/2302.06205). It tells agents apart where the critic has a value for
    each of them, or where they are valid at unlike steps; otherwise the first one is the best.
    Reads one number for each agent back from the device.

    Args:
        generator (torch.Generator): source of the random turns, on the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def next_agents(
        self, remaining: Sequence[Agent], batch: TeamBatch, correction: Correction
    ) -> Sequence[Agent]:
        """Return the best agent, or at every second turn a random one."""
        if (len(batch.team.agents) - len(remaining)) % 2:
            draw = torch.randint(len(remaining), (), generator=self.generator)
            return [remaining[int(draw)]]
        scores = self.scores(remaining, batch)
        return [remaining[scores.index(max(scores))]]

    def scores(self, agents: Sequence[Agent], batch: TeamBatch) -> list[float]:
        """Return the score of each agent."""
        data, keys = batch.batch, batch.team.keys
        advantage, value = data.get(keys.advantage), data.get(keys.value, None)
        if value is None:
            raise ValueError(
                f"A semi-greedy order needs the critic's values under {keys.value!r}, which are "
                "not in the batch; let the updater estimate the advantage, or take another order."
            )
        means = []
        for agent in agents:
            own, worth = (agent.share_of(entry, data.batch_dims) for entry in (advantage, value))
            tiny = torch.finfo(worth.dtype).eps
            score = own.abs() / worth.abs().clamp_min(tiny)
            means.append(masked_mean(score, batch.valid(agent)))
        return [float(mean) for mean in torch.stack(means).tolist()]
