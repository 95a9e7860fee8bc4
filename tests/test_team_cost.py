"""TeamCost reduces the agents' costs to one, wherever an environment reports them."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Composite, Unbounded
from torchrl.envs import Compose, EnvBase, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_happo.envs import TeamCost, TeamReward
from torchrl_happo.envs.team_reward import UnlikeCostsError

BATCH = (2,)


class Costly(EnvBase):
    """A group of three and a single agent, whose costs are observations or rewards."""

    def __init__(self, place, costs=None):
        super().__init__(batch_size=BATCH)
        specs = {
            "full_observation_spec": Composite(shape=BATCH),
            "reward_spec": Composite(shape=BATCH),
        }
        for group, shape in (("drones", (*BATCH, 3)), ("scout", BATCH)):
            entry = Composite(cost=Unbounded((*shape, 1)), shape=shape)
            specs["full_observation_spec"][group] = Composite(
                observation=Unbounded((*shape, 2)), shape=shape
            )
            specs["reward_spec"][group] = Composite(reward=Unbounded((*shape, 1)), shape=shape)
            specs[place][group].update(entry)
        self.observation_spec = specs["full_observation_spec"]
        self.reward_spec = specs["reward_spec"]
        self.action_spec = Unbounded((*BATCH, 1))
        self.costs = costs

    def _reset(self, tensordict):
        return self.observation_spec.rand()

    def _step(self, tensordict):
        out = self.observation_spec.rand().update(self.reward_spec.rand())
        return out.update(self.full_done_spec.zero()).update(self.costs or {})

    def _set_seed(self, seed):
        pass


PLACES = ["full_observation_spec", "reward_spec"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduces_over_all_agents(place, reduction):
    """Each agent weighs the same; specs agree with the data; rewards are none of its business."""
    env = TransformedEnv(
        Costly(place), Compose(TeamReward(reduction), TeamCost(reduction), StepCounter(4))
    )
    check_env_specs(env)
    batch = env.rollout(3)
    for entry in ("cost", "reward"):
        step = batch["next"]
        agents = torch.cat([step["drones", entry], step["scout", entry].unsqueeze(-2)], -2)
        assert agents.shape == (2, 3, 4, 1)
        torch.testing.assert_close(step[entry], getattr(agents, reduction)(-2))
    assert ("cost" in batch.keys()) == (place == "full_observation_spec")
    if place == "full_observation_spec":
        assert torch.equal(batch["cost"][:, 1:], batch["next", "cost"][:, :-1])


@pytest.mark.parametrize("place", PLACES)
def test_over_collected_episodes(place):
    """Resets of some copies leave the costs of the others alone."""
    env = TransformedEnv(Costly(place), Compose(StepCounter(3), TeamReward(), TeamCost()))
    batch = next(iter(Collector(env, None, frames_per_batch=20, total_frames=20)))
    step = batch["next"]
    total = step["drones", "cost"].sum(-2) + step["scout", "cost"]
    torch.testing.assert_close(step["cost"], total / 4)


def test_sums_of_an_episode():
    """A RewardSum that names the team's cost adds it up."""
    transforms = RewardSum(in_keys=["cost"], out_keys=["episode_cost"])
    env = TransformedEnv(Costly("reward_spec"), Compose(TeamCost("sum"), transforms))
    step = env.rollout(4)["next"]
    torch.testing.assert_close(step["episode_cost"], step["cost"].cumsum(1))


def test_what_another_one_writes_is_no_agents_cost():
    """Mean and sum of the same agents side by side, and one group alone."""
    env = TransformedEnv(
        Costly("full_observation_spec"),
        Compose(
            TeamCost("mean"),
            TeamCost("sum", out_key="total"),
            TeamCost(in_keys=[("scout", "cost")], out_key=("lone", "cost")),
        ),
    )
    check_env_specs(env)
    step = env.rollout(2)["next"]
    torch.testing.assert_close(step["total"], 4 * step["cost"])
    assert torch.equal(step["lone", "cost"], step["scout", "cost"])


def test_a_cost_of_the_team_passes_through():
    """A root cost ``[*B, 1]`` is the team's already."""
    batch = TensorDict({"next": {"cost": torch.ones(4, 1)}}, [4])
    assert torch.equal(TeamCost(in_keys=["cost"])(batch)["next", "cost"], torch.ones(4, 1))


def test_refusals():
    """As TeamReward does: arguments, keys and costs that differ, each by name."""
    with pytest.raises(ValueError, match=r"TeamCost got reduction='max'.*'mean', 'sum' and None"):
        TeamCost("max")
    with pytest.raises(ValueError, match="empty in_keys; name a cost"):
        TeamCost(in_keys=[])
    env = Costly("full_observation_spec")
    wrong = {
        r"\('scout', 'price'\).*no costs.*choose among": {"in_keys": [("scout", "price")]},
        "'drones' is a group": {"out_key": ("drones", "team")},
        "write over the cost": {"out_key": ("drones", "cost")},
    }
    for message, kwargs in wrong.items():
        with pytest.raises(ValueError, match=message):
            TransformedEnv(env, TeamCost(**kwargs)).rollout(1)
    with pytest.raises(UnlikeCostsError, match=r"TeamCost\(None\).*reduction='mean'"):
        TransformedEnv(env, TeamCost(None)).rollout(1)
    with pytest.raises(ValueError, match=r"pass in_keys.*'cost'"):
        TeamCost()(TensorDict({"next": {}}, [4]))


def test_an_environment_without_costs_is_refused():
    """Where no entry is named cost, the message lists what there is."""
    from torchrl_happo.envs import MatrixGame

    env = TransformedEnv(MatrixGame(torch.eye(2)), TeamCost())
    with pytest.raises(
        ValueError, match=r"no costs of this environment.*\('agents', 'observation'\)"
    ):
        env.rollout(1)
