"""Small synthetic teams and batches for the tests."""

from __future__ import annotations

import pytest
import torch
from newer import tensors
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    MultiAgentMLP,
    ProbabilisticActor,
    TanhNormal,
)

from torchrl_happo.update.batch import TeamBatch

N_AGENTS, OBS_DIM, ACT_DIM = 3, 5, 2


def make_actor(
    n_agents=N_AGENTS,
    *,
    obs_dim=OBS_DIM,
    act_dim=ACT_DIM,
    distribution=TanhNormal,
    group="agents",
    share_params=False,
    depth=2,
    **kwargs,
):
    """A joint actor as TorchRL's multi-agent scripts build it."""
    discrete = distribution is torch.distributions.Categorical
    net = MultiAgentMLP(
        n_agent_inputs=obs_dim,
        n_agent_outputs=act_dim if discrete else 2 * act_dim,
        n_agents=n_agents,
        centralized=False,
        share_params=share_params,
        depth=depth,
        num_cells=16,
        activation_class=nn.Tanh,
    )
    names = ["logits"] if discrete else ["loc", "scale"]
    keys = [(group, name) for name in names]
    return ProbabilisticActor(
        TensorDictModule(
            net if discrete else nn.Sequential(net, NormalParamExtractor()),
            in_keys=[(group, "observation")],
            out_keys=keys,
        ),
        in_keys=keys,
        out_keys=[(group, "action")],
        distribution_class=distribution,
        return_log_prob=True,
        **kwargs,
    )


def make_critic(n_agents=N_AGENTS, *, obs_dim=OBS_DIM, group="agents", share_params=True, depth=2):
    """A centralised critic with one value for each agent."""
    return TensorDictModule(
        MultiAgentMLP(
            n_agent_inputs=obs_dim,
            n_agent_outputs=1,
            n_agents=n_agents,
            centralized=True,
            share_params=share_params,
            depth=depth,
            num_cells=16,
            activation_class=nn.Tanh,
        ),
        in_keys=[(group, "observation")],
        out_keys=[(group, "state_value")],
    )


def make_observations(
    num_envs=4, time=6, n_agents=N_AGENTS, *, obs_dim=OBS_DIM, group="agents", generator=None
):
    """A batch of one group without actions, reward and done at the root."""
    batch = [num_envs, time]

    def observe():
        observation = torch.randn(*batch, n_agents, obs_dim, generator=generator)
        return TensorDict({"observation": observation}, [*batch, n_agents])

    done = torch.zeros(*batch, 1, dtype=torch.bool)
    done[0, time // 2] = True
    return TensorDict(
        {
            group: observe(),
            "next": {
                group: observe(),
                "reward": torch.randn(*batch, 1, generator=generator),
                "done": done,
                "terminated": done.clone(),
            },
        },
        batch,
        names=[None, "time"],
    )


def make_batch(actor, *args, **kwargs):
    """A batch as a collector would return it."""
    data = make_observations(*args, **kwargs)
    parameter = next(actor.parameters())
    data = data.apply(lambda x: x.to(parameter.dtype) if x.is_floating_point() else x)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        return actor(data)


def perturb(module, scale=0.05):
    """Moves every parameter a little, so that ratios differ from one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def state_of(module):
    """A copy of a module's tensors."""
    return {key: value.clone() for key, value in tensors(module).items()}


def same_state(one, other):
    """Whether two states are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def with_infinite_slope(loss, parameter):
    """The same number, with an infinite derivative in the parameter's first entry."""
    first = parameter.flatten()[0]
    return loss + (first - first.detach()).sqrt()


#: From a loss and a parameter of it to a loss whose gradient cannot be followed.
SPOILED_GRADIENTS = pytest.mark.parametrize(
    "spoil",
    [
        lambda loss, _: loss * float("nan"),
        lambda loss, _: loss * float("inf"),
        with_infinite_slope,
    ],
    ids=["nan", "infinite", "infinite in one entry"],
)


def team_batch(loss, batch, **kwargs):
    """A batch made ready for the update of a loss."""
    return TeamBatch(loss.team, loss.critics, batch, **kwargs)
