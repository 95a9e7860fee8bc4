"""The builders read the specs right, start where on-policy methods should, and refuse the rest."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from newer import tensors
from tensordict import TensorDict
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.data import (
    Binary,
    Bounded,
    Composite,
    MultiOneHot,
    OneHot,
    Unbounded,
)
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import EnvBase, ExplorationType, MarlGroupMapType, VmasEnv, set_exploration_type
from torchrl.modules import (
    IndependentNormal,
    MaskedCategorical,
    MaskedOneHotCategorical,
    MultiAgentMLP,
    OneHotCategorical,
    TanhNormal,
)

from torchrl_happo.networks.actors import CentralizedMLP, joint_policy, make_actor, make_critic
from torchrl_happo.team.split import split_team

ONE_GROUP = MarlGroupMapType.ALL_IN_ONE_GROUP
PER_AGENT = MarlGroupMapType.ONE_GROUP_PER_AGENT


class SpecEnv(EnvBase):
    """An environment that is nothing but its specs: random observations, rewards of zero."""

    def __init__(self, observation, action, batch_size=()):
        super().__init__(batch_size=batch_size)
        self.full_observation_spec_unbatched = observation
        self.full_action_spec_unbatched = action
        self.full_reward_spec_unbatched = Composite(reward=Unbounded((1,)))

    def _reset(self, tensordict):
        return self.full_observation_spec.rand()

    def _step(self, tensordict):
        step = self.full_observation_spec.rand()
        return step.update(self.full_reward_spec.zero()).update(self.full_done_spec.zero())

    def _set_seed(self, seed):
        pass


def team(action, observation=None, n_agents=3, batch_size=(), **extra):
    """One group of agents with the given action spec, with or without an agent dimension."""
    shape = () if n_agents is None else (n_agents,)
    observation = Unbounded((*shape, 4)) if observation is None else observation
    return SpecEnv(
        Composite(agents=Composite(observation=observation, **extra, shape=shape)),
        Composite(agents=Composite(action=action, shape=shape)),
        batch_size,
    )


def linear_layers(net):
    """The linear layers of a network, their weights stacked if it is a multi-agent one."""
    stateful = net.get_stateful_net() if isinstance(net, MultiAgentMLP) else net
    return [layer for layer in stateful.modules() if isinstance(layer, nn.Linear)]


def stack_of(actor):
    """The multi-agent network of an actor."""
    return next(m for m in actor.modules() if isinstance(m, MultiAgentMLP))


@pytest.mark.parametrize(
    ("kwargs", "distribution"),
    [
        ({"continuous_actions": True}, TanhNormal),
        ({"continuous_actions": False}, Categorical),
        ({"continuous_actions": False, "categorical_actions": False}, OneHotCategorical),
    ],
    ids=["continuous", "categorical", "one-hot"],
)
@pytest.mark.parametrize(
    ("scenario", "group_map"),
    [
        ("navigation", None),
        ("navigation", PER_AGENT),
        ("simple_speaker_listener", None),
        ("simple_tag", None),
        ("drone", None),
        ("kinematic_bicycle", None),
    ],
)
def test_collects_actions_of_the_spec(scenario, group_map, kwargs, distribution):
    """A collector takes the joint policy, and every action and log-prob fits its spec."""
    env = VmasEnv(scenario, num_envs=3, seed=0, group_map=group_map, **kwargs)
    actors = make_actor(env, num_cells=(16,))
    by_group = actors if isinstance(actors, dict) else {next(iter(env.group_map)): actors}
    assert list(by_group) == list(env.group_map)
    batch = next(iter(Collector(env, joint_policy(actors), frames_per_batch=12)))
    for group, actor in by_group.items():
        action = batch[group, "action"]
        spec = env.full_action_spec[group, "action"]
        assert all(spec.is_in(step) for step in action.unbind(1))
        assert batch[group, "action_log_prob"].shape == (3, 4, len(env.group_map[group]))
        dist = actor.get_dist(batch)
        assert type(dist) is distribution
        torch.testing.assert_close(dist.log_prob(action), batch[group, "action_log_prob"])


def test_one_group_of_several():
    """A group's actor alone is the one of the dict, and the names of groups are checked."""
    env = VmasEnv("simple_tag", num_envs=2)
    torch.manual_seed(1)
    actor = make_actor(env, "adversary")
    torch.manual_seed(1)
    twin = make_actor(env)["adversary"]
    assert (TensorDict.from_module(actor) == TensorDict.from_module(twin)).all()
    with pytest.raises(KeyError, match=r"'adversry'.*'adversary'"):
        make_actor(env, "adversry")


@pytest.mark.parametrize("scenario", ["drone", "kinematic_bicycle", "simple_reference"])
def test_bounds_of_each_dimension(scenario):
    """The action fills the range of each dimension: +-1e-5 of a drone, [0, 1] of a message."""
    env = VmasEnv(scenario, num_envs=2)
    policy = joint_policy(make_actor(env, num_cells=(8,)))
    for group in env.group_map:
        space = env.full_action_spec[group, "action"].space
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            actions = torch.stack([policy(env.reset())[group, "action"] for _ in range(200)])
        assert (actions >= space.low).all()
        assert (actions <= space.high).all()
        spread = (actions.amax((0, 1)) - actions.amin((0, 1))) / (space.high - space.low)[0]
        assert (spread > 0.8).all()


def test_bounds_of_each_agent():
    """Agents of one group may have bounds of their own."""
    action = torch.stack([Bounded(-1.0, 1.0, (2,)), Bounded(-3.0, 5.0, (2,))])
    actor = make_actor(team(action, n_agents=2, batch_size=(6,)))
    dist = actor.get_dist(team(action, n_agents=2, batch_size=(6,)).reset())
    assert torch.equal(dist.low, torch.tensor([[-1.0, -1.0], [-3.0, -3.0]]))
    assert torch.equal(dist.high, torch.tensor([[1.0, 1.0], [5.0, 5.0]]))


@pytest.mark.parametrize("batch_size", [(), (5,)])
@pytest.mark.parametrize(
    ("action", "distribution"),
    [
        (Bounded(-1.0, 1.0, (2,)), TanhNormal),
        (Unbounded((2,)), IndependentNormal),
        (CategoricalSpec(3), Categorical),
        (OneHot(3), OneHotCategorical),
    ],
)
@pytest.mark.parametrize("n_agents", [None, 1, 3])
def test_groups_with_and_without_an_agent_dimension(n_agents, action, distribution, batch_size):
    """Every kind of action works for a group of n, for a group of one and for a lone agent."""
    spec = action if n_agents is None else action.expand(n_agents, *action.shape)
    env = team(spec, n_agents=n_agents, batch_size=batch_size)
    actor = make_actor(env, num_cells=(8,))
    batch = env.rollout(2, actor)
    agents = () if n_agents is None else (n_agents,)
    assert batch["agents", "action_log_prob"].shape == (*batch_size, 2, *agents)
    assert type(actor.get_dist(batch)) is distribution
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        greedy = [actor(batch.clone())["agents", "action"] for _ in range(2)]
    assert torch.equal(*greedy)


def test_agents_at_the_root():
    """An environment that has no groups is one group."""
    env = SpecEnv(Composite(observation=Unbounded((4,))), Composite(action=Unbounded((2,))))
    assert env.rollout(2, make_actor(env))["action_log_prob"].shape == (2,)
    assert make_critic(env)(env.reset())["state_value"].shape == (1,)


@pytest.mark.parametrize(
    ("action", "distribution"),
    [(CategoricalSpec(4), MaskedCategorical), (OneHot(4), MaskedOneHotCategorical)],
)
def test_masked_actions_are_never_taken(action, distribution):
    """Where the environment says which actions are available, no other has any probability."""
    env = team(action.expand(3, *action.shape), action_mask=Binary(4, (3, 4), dtype=torch.bool))
    actor = make_actor(env, num_cells=(8,))
    mask = torch.rand(500, 3, 4) < 0.5
    mask[..., 2] = True
    group = TensorDict({"observation": torch.randn(500, 3, 4), "action_mask": mask}, [500, 3])
    with set_exploration_type(ExplorationType.RANDOM):
        data = actor(TensorDict({"agents": group}, [500]))
    assert type(actor.get_dist(data)) is distribution
    taken = data["agents", "action"]
    taken = taken.bool() if taken.ndim == 3 else nn.functional.one_hot(taken, 4).bool()
    assert (taken & ~mask).sum() == 0
    assert (taken.float().mean((0, 1)) > 0.05).all()
    unmasked = make_actor(env, mask_key=None)
    assert type(unmasked.get_dist(data)) in (Categorical, OneHotCategorical)


@given(st.integers(1, 4), st.sampled_from([nn.Tanh, nn.ReLU]), st.booleans())
def test_orthogonal_initialisation(n_agents, activation_class, share_params):
    """Every agent's weights are orthogonal with the layer's gain, and its biases zero."""
    env = team(Unbounded((n_agents, 2)), n_agents=n_agents)
    actor = make_actor(
        env,
        num_cells=(16, 16),
        activation_class=activation_class,
        share_params=share_params,
        output_gain=0.3,
    )
    hidden = 5 / 3 if activation_class is nn.Tanh else 2**0.5
    for layer, gain in zip(linear_layers(stack_of(actor)), [hidden, hidden, 0.3], strict=True):
        assert (layer.bias == 0).all()
        for weight in [layer.weight] if share_params else layer.weight:
            short = weight.T if weight.shape[0] > weight.shape[1] else weight
            identity = torch.eye(len(short)) * gain**2
            torch.testing.assert_close(short @ short.T, identity, atol=1e-4, rtol=0)


def test_each_agent_draws_its_own_weights():
    """Agents differ, unless they share; the same seed gives the same team."""
    env = team(Unbounded((3, 2)))
    torch.manual_seed(5)
    first = tensors(make_actor(env))
    torch.manual_seed(5)
    again = tensors(make_actor(env))
    assert all(torch.equal(first[name], again[name]) for name in first)
    weight = linear_layers(stack_of(make_actor(env)))[0].weight
    assert not torch.isclose(weight[0], weight[1]).any()
    shared = make_actor(env, share_params=True)
    assert linear_layers(stack_of(shared))[0].weight.shape == (128, 4)


@pytest.mark.parametrize("state_dependent_std", [True, False])
@pytest.mark.parametrize(("mapping", "scale"), [("biased_softplus_1.0", 1.0), ("exp", 1.0)])
def test_first_policy_hardly_depends_on_the_observation(mapping, scale, state_dependent_std):
    """The small output gain puts all means near 0 and all scales near the mapping of 0."""
    env = team(Bounded(-1.0, 1.0, (3, 2)))
    actor = make_actor(env, state_dependent_std=state_dependent_std, scale_mapping=mapping)
    group = TensorDict({"observation": torch.randn(100, 3, 4)}, [100, 3])
    dist = actor.get_dist(TensorDict({"agents": group}, [100]))
    assert dist.loc.abs().max() < 0.1
    torch.testing.assert_close(dist.scale, torch.full((100, 3, 2), scale), atol=0.1, rtol=0)


def test_state_independent_std_is_a_parameter_of_each_agent():
    """One row an agent, so that it can be trained alone; one for all of them if they share."""
    env = team(Bounded(-1.0, 1.0, (3, 2)))
    name = "state_independent_scale"
    for share_params, shape in ((False, (3, 2)), (True, (2,))):
        actor = make_actor(env, state_dependent_std=False, share_params=share_params)
        (scale,) = [p for path, p in actor.named_parameters() if path.endswith(name)]
        assert scale.shape == shape


@pytest.mark.parametrize("share_params", [True, False])
def test_a_bounded_std_starts_where_it_is_told_and_never_passes_its_bound(share_params):
    """Whatever the parameter, the deviation stays between 0 and ``max_std``."""
    kwargs = {"share_params": share_params, "scale_mapping": "biased_softplus_0.3655"}
    actor = make_actor(
        team(Unbounded((3, 2))), state_dependent_std=False, max_std=0.5, layer_norm=True, **kwargs
    )
    observations = TensorDict({("agents", "observation"): torch.randn(5, 3, 4)}, [5])
    std = actor.get_dist(observations).stddev
    torch.testing.assert_close(std, torch.full((5, 3, 2), 0.3655))
    (parameter,) = [p for path, p in actor.named_parameters() if "scale" in path]
    torch.testing.assert_close(parameter.sigmoid() * 0.5, torch.full_like(parameter, 0.3655))
    for value, bound in ((100.0, 0.5), (-100.0, 0.0)):
        nn.init.constant_(parameter, value)
        assert (actor.get_dist(observations).stddev - bound).abs().max() < 1e-6


def test_critic_is_one_network_over_all_observations():
    """One value for the team: that of an MLP over the concatenated observations of all groups."""
    env = VmasEnv("simple_tag", num_envs=4, seed=0)
    critic = make_critic(env, num_cells=(8,))
    batch = env.rollout(3)
    value = critic(batch)["state_value"]
    assert value.shape == (4, 3, 1)
    observations = [batch[group, "observation"].flatten(-2) for group in env.group_map]
    assert torch.equal(value, critic.module.mlp(torch.cat(observations, -1)))


def test_critic_of_some_groups_and_of_the_state():
    """The critic of one of two teams may see that team alone, or the environment's own state."""
    env = VmasEnv("simple_tag", num_envs=2)
    critic = make_critic(env, groups=["agent"], out_key=("prey", "state_value"))
    assert critic.in_keys == [("agent", "observation")]
    assert critic(env.reset())["prey", "state_value"].shape == (2, 1)
    env = SpecEnv(
        Composite(state=Unbounded((2, 3)), observation=Unbounded((4,))),
        Composite(action=Unbounded((2,))),
        (5,),
    )
    critic = make_critic(env, state_key="state")
    assert critic.in_keys == ["state"]
    assert critic(env.reset())["state_value"].shape == (5, 1)


def test_centralized_mlp_mixes_groups_with_and_without_an_agent_dimension():
    """Inputs are flattened from the right, whatever the batch in front of them."""
    net = CentralizedMLP([2, 1], in_features=8, out_features=1, num_cells=[4])
    group, lone = torch.randn(6, 2, 3, 2), torch.randn(6, 2, 2)
    value = net(group, lone)
    assert value.shape == (6, 2, 1)
    torch.testing.assert_close(net(group[3, 1], lone[3, 1]), value[3, 1])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_act_alike(duplicate):
    """Networks travel to the workers of a collector: their copies give the same outputs."""
    env = VmasEnv("simple_speaker_listener", num_envs=3, continuous_actions=False)
    policy, critic = joint_policy(make_actor(env)), make_critic(env)
    batch = critic(policy(env.reset()))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        first = policy(batch.clone())
        twin = duplicate(policy)(duplicate(critic)(batch.clone()))
    for key in [("speaker", "action"), ("listener", "logits"), "state_value"]:
        assert torch.equal(first[key], twin[key])


def test_pettingzoo_with_masks_and_state():
    """A root batch of [], actions in [0, 1] and a root state are read from the specs."""
    mpe2 = pytest.importorskip("mpe2.simple_spread_v3")
    from torchrl.envs import PettingZooWrapper

    raw = mpe2.parallel_env(max_cycles=5, continuous_actions=True)
    env = PettingZooWrapper(raw, seed=0, return_state=True)
    policy, critic = make_actor(env), make_critic(env, state_key="state")
    batch = critic(env.rollout(3, policy))
    assert batch["agent", "action_log_prob"].shape == (3, 3)
    assert batch["state_value"].shape == (3, 1)
    assert ((batch["agent", "action"] >= 0) & (batch["agent", "action"] <= 1)).all()


@pytest.mark.parametrize(
    ("scenario", "continuous", "builder"),
    [
        ("simple_tag", True, make_actor),
        ("simple_tag", True, make_critic),
        ("diff_drive", True, make_actor),
        ("diff_drive", False, make_actor),
    ],
)
def test_unlike_agents_in_one_group_are_refused(scenario, continuous, builder):
    """No padding: unlike agents belong in groups of their own, and the message says how."""
    env = VmasEnv(scenario, num_envs=2, continuous_actions=continuous, group_map=ONE_GROUP)
    with pytest.raises(ValueError, match=r"unlike .*ONE_GROUP_PER_AGENT"):
        builder(env)


@pytest.mark.parametrize(
    ("env", "kwargs", "error", "message"),
    [
        (team(Unbounded((3, 2))), {"observation_key": "obs"}, KeyError, "choose among"),
        (team(Unbounded((3, 2)), Unbounded((3, 4, 4))), {}, ValueError, "flatten"),
        (team(Unbounded((3, 2)), Unbounded((3, 4), dtype=torch.float64)), {}, ValueError, "Double"),
        (team(Bounded(-torch.inf, 1.0, (3, 2))), {}, ValueError, "finite"),
        (team(MultiOneHot([2, 3]).expand(3, 5)), {}, ValueError, "MultiOneHot"),
    ],
    ids=["observation", "image", "dtype", "infinite", "multi-one-hot"],
)
def test_refuses_specs(env, kwargs, error, message):
    """What no network fits is refused with the key, what was got and what to do."""
    with pytest.raises(error, match=message):
        make_actor(env, **kwargs)


def test_refuses_arguments():
    """Contradictions and empty mappings are refused."""
    env = VmasEnv("balance", num_envs=2)
    with pytest.raises(ValueError, match="both groups and state_key"):
        make_critic(env, groups=["agents"], state_key="state")
    with pytest.raises(KeyError, match="no observation 'state'"):
        make_critic(env, state_key="state")
    with pytest.raises(KeyError, match=r"'agent'.*'agents'"):
        make_critic(env, groups=["agent"])
    with pytest.raises(ValueError, match="no actors"):
        joint_policy({})


@pytest.mark.parametrize(
    ("action", "kwargs"),
    [
        (torch.stack([Bounded(-1.0, 1.0, (2,)), Bounded(-3.0, 5.0, (2,))]), {}),
        (Bounded(-1.0, 2.0, (2, 3)), {"state_dependent_std": False}),
        (Unbounded((2, 3)), {"state_dependent_std": False}),
        (Unbounded((2, 3)), {"state_dependent_std": False, "max_std": 2.0, "layer_norm": True}),
        (Unbounded((2, 3)), {"layer_norm": True, "activation_class": nn.PReLU}),
        (CategoricalSpec(4, shape=(2,)), {}),
        (OneHot(4, shape=(2, 4)), {}),
    ],
    ids=["own-bounds", "bounded", "unbounded", "layer-norm", "prelu", "masked", "masked-one-hot"],
)
def test_each_agent_can_be_cut_out_of_its_stack(action, kwargs):
    """The slice that is trained has the log-probs and parameters of its row of the stack."""
    mask = Binary(4, (2, 4), dtype=torch.bool)
    env = team(action, n_agents=2, batch_size=(5,), action_mask=mask)
    actor = make_actor(env, num_cells=(8,), **kwargs)
    batch = env.reset()
    batch["agents", "action_mask"][..., 0] = True
    with set_exploration_type(ExplorationType.RANDOM):
        actor(batch)
    agents = split_team(actor)
    for index, agent in enumerate(agents):
        view = agent.view(batch, [*agent.actor.in_keys, ("agents", "action")])
        log_prob = agent.actor.get_dist(view).log_prob(view["agents", "action"])
        torch.testing.assert_close(log_prob, batch["agents", "action_log_prob"][:, index])
    cut = sum(p.numel() for agent in agents for p in agent.parameters())
    assert cut == sum(p.numel() for p in actor.parameters())


def test_torch_initialisation_makes_unlike_first_policies():
    """With torch's own initialisation agents start apart; with the small gain nearly alike."""
    env = VmasEnv("balance", num_envs=2)
    apart = {}
    for init in ("orthogonal", "torch"):
        loc = make_actor(env, init=init)(env.reset())["agents", "loc"]
        apart[init] = loc.std(1).max()
    assert apart["torch"] > 5 * apart["orthogonal"]
    with pytest.raises(ValueError, match='init must be "orthogonal" or "torch"'):
        make_actor(env, init="xavier")
