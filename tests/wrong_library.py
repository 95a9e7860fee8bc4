"""Wrong calls to the losses and the updater, each with the words its sentence must hold."""

from __future__ import annotations

from functools import partial

import torch
from newer import PopArtValueNorm, RunningValueNorm
from team import make_actor, make_critic
from tensordict import TensorDict
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.objectives import ClipPPOLoss
from wrong_calls import (
    INF,
    NAN,
    STEPS,
    Team,
    Truncated,
    adding,
    at_root,
    built,
    called,
    categorical,
    changed,
    critic_of,
    deviating,
    elsewhere,
    hatrpo,
    head_first,
    loaded,
    loss,
    over_one_trunk,
    paid,
    ramp,
    setting,
    spoil,
    spoiled,
    stack,
    trained,
    two_keys,
    two_values,
    with_actor_inside,
    without,
)

from torchrl_happo import (
    ActorList,
    HAPPOLoss,
    HATRPOLoss,
    SequentialUpdater,
)
from torchrl_happo.steps import FirstOrder, Problem, ShuffledMinibatches, TrustRegion
from torchrl_happo.steps.optimizers import build_optimizer, build_scheduler

OBS, ACT, LOG_PROB = [("agents", name) for name in ("observation", "action", "action_log_prob")]
REWARD, DONE, NEXT_OBS = ("next", "reward"), ("next", "done"), ("next", *OBS)

# fmt: off
LOSSES = built([
    ("no actor", lambda: HAPPOLoss(None, make_critic()), TypeError, "actor is None; pass a Prob"),
    ("no group", lambda: HAPPOLoss({}, make_critic()), ValueError, "mapping of actors is empty"),
    ("an actor that is a plain network", lambda: loss(nn.Linear(2, 2)), TypeError,
     "actor is a Linear; pass a Prob"),
    ("an actor without a distribution", lambda: loss(make_critic()), TypeError,
     "is a TensorDictModule; pass a ProbabilisticActor"),
    ("a group named by a number", lambda: loss({3: make_actor()}), TypeError, "named by strings"),
    ("a critic that is a plain network", lambda: loss(critic=nn.Linear(2, 2)), TypeError,
     "critic is a Linear; wrap it"),
    ("a critic for each group", lambda: loss(critic={"agents": make_critic()}), TypeError,
     "critic is a dict of .'agents'., but the team has one: pass a critic that reads all"),
    ("an actor that has not seen data", lambda: loss(categorical(stack(n_agent_inputs=None))),
     ValueError, "uninitialised lazy parameter .*run it once"),
    ("agents that share a network", lambda: loss(make_actor(share_params=True)), ValueError,
     r"share_params=True.*blocks=\['agents'\]"),
    ("agents that see each other", lambda: loss(categorical(stack(centralized=True))), ValueError,
     "centralized=True"),
    ("networks of unlike numbers of agents",
     lambda: loss(categorical(nn.Sequential(stack(), stack(n_agents=2, n_agent_inputs=3)))),
     ValueError, r"built for \[2, 3\] agents; build all"),
    ("one actor for two groups", lambda: loss(dict.fromkeys("ab", make_actor())), ValueError,
     "agents 'a_0' and 'b_0' share the parameter"),
    ("one actor for two agents of a list",
     lambda: loss(ActorList([categorical(nn.Linear(5, 3))] * 3)), ValueError,
     "agents 'agents_0' and 'agents_1' share the parameter"),
    ("actors of a list over one trunk", lambda: loss(over_one_trunk()), ValueError,
     "agents 'agents_0' and 'agents_1' share the parameter 'module.*weight'"),
    ("a block of a list", lambda: loss(over_one_trunk(), blocks=["agents"]),
     ValueError, "blocks names 'agents', but the agents of an ActorList .*one ProbabilisticActor"),
    ("two agents of one name", lambda: loss(
        {"red": make_actor(2, group="red"), "red_0": make_actor(1, group="red_0")}), ValueError,
     r"would have the names \['red_0'\]"),
    ("an action that no actor writes", lambda: loss().set_keys(action=("agents", "move")), KeyError,
     r"actors write \[\('agents', 'action'\)\], but the loss would read action from .*'move'"),
    ("a log-probability that no actor writes",
     lambda: loss().set_keys(sample_log_prob="log_prob"), KeyError,
     "would read sample_log_prob from 'log_prob'"),
    ("actor and critic that share", lambda: HAPPOLoss(*with_actor_inside()), ValueError,
     "Actor and critic share the parameter"),
    ("a block of no group", lambda: loss(blocks=["team"]), ValueError,
     r"blocks names \['team'\], but the groups are \['agents'\]"),
    ("blocks in one string", lambda: loss(blocks="agents"), TypeError, "collection of groups"),
    ("clip_epsilon 0", lambda: loss(clip_epsilon=0.0), ValueError, "between 0 and 1, got 0"),
    ("clip_epsilon 1.5", lambda: loss(clip_epsilon=1.5), ValueError, "between 0 and 1, got 1.5"),
    ("clip_epsilon NaN", lambda: loss(clip_epsilon=NAN), ValueError, "between 0 and 1, got nan"),
    ("clip_epsilon in words", lambda: loss(clip_epsilon="0.2"), TypeError, "clip_epsilon .*'0.2'"),
    ("clip_epsilon upside down", lambda: loss(clip_epsilon=(1.2, 0.2)), ValueError, "pair"),
    ("entropy_coeff NaN", lambda: loss(entropy_coeff=NAN), ValueError, "entropy_coeff.*got nan"),
    ("entropy_coeff of no head", lambda: loss(entropy_coeff={LOG_PROB: 0.1, "talk": 0.1}),
     ValueError, r"weights for .*'talk'\], but the heads of the actors are .*; name a weight"),
    ("entropy_coeff of no group", lambda: loss(entropy_coeff={"action_log_prob": 0.1}), ValueError,
     r"weights for \['action_log_prob'\], but the heads of the actors are \[\('agents', "),
    ("critic_coeff below 0", lambda: loss(critic_coeff=-1.0), ValueError, "critic_coeff.*got -1"),
    ("loss_critic_type", lambda: loss(loss_critic_type="smoth_l1"), ValueError,
     "did you mean 'smooth_l1'"),
    ("reduction", lambda: loss(reduction="average"), ValueError, "'mean', 'sum', 'none', got 'av"),
    ("clip_value below 0", lambda: loss(clip_value=-0.1), ValueError, "must be positive .*-0.1"),
    ("samples_mc_entropy 0", lambda: loss(samples_mc_entropy=0), ValueError, "at least 1, got 0"),
    ("popart without statistics", lambda: loss(popart=True), ValueError, "needs the statistics"),
    ("an unknown keyword", lambda: loss(clip_eps=0.2), TypeError, "'clip_eps'; did you mean"),
    ("an unknown key", lambda: loss().set_keys(valeu="v"), ValueError, "did you mean 'value'"),
    ("a value that no critic writes", lambda: loss().set_keys(value="v"), KeyError,
     r"critic writes .*from 'v'; call loss.set_keys"),
    ("max_kl 0", lambda: hatrpo(max_kl=0.0), ValueError, "max_kl must be positive .*got 0.0"),
    ("max_kl as text", lambda: hatrpo(max_kl="0.01"), TypeError, "max_kl .*got '0.01'"),
    ("damping below 0", lambda: hatrpo(damping=-1), ValueError, "damping .*got -1"),
    ("cg_iterations 0", lambda: hatrpo(cg_iterations=0), ValueError, "cg_iterations .*got 0"),
    ("accept_ratio 2", lambda: hatrpo(accept_ratio=2.0), ValueError, "accept_ratio .*got 2"),
    *(
        (f"{name} in words", lambda name=name: hatrpo(**{name: "half"}), TypeError, f"{name}.*half")
        for name in (
            "accept_ratio", "backtrack_factor", "cg_tolerance", "damping", "fisher_fraction",
            "max_kl",
        )
    ),
    ("cg_iterations 1.5", lambda: hatrpo(cg_iterations=1.5), TypeError, "cg_iterations .*whole"),
    ("max_backtracks 1.5", lambda: hatrpo(max_backtracks=1.5), TypeError, "max_backtracks .*whole"),
    ("critic_coeff of HATRPO below 0", lambda: hatrpo(critic_coeff=-1.0), ValueError,
     "critic_coeff.*got -1"),
    ("an actor of HATRPO that is a plain network", lambda: HATRPOLoss(nn.Linear(2, 2)), TypeError,
     "actor is a Linear; pass a Prob"),
    ("line_search", lambda: hatrpo(line_search="binary"), ValueError, "line_search .*'binary'"),
    ("kl_split", lambda: hatrpo(kl_split="half"), ValueError, 'kl_split must be None, "equal"'),
    ("shares of more than all", lambda: hatrpo(kl_split=lambda agents: [1, 1, 1]), ValueError,
     r"kl_split returned \[1, 1, 1\]; it must return 3 positive shares"),
    ("shares of less than all", lambda: hatrpo(kl_split=lambda agents: [0.5, 0.3, 0.1]), ValueError,
     r"it must return 3 positive shares that sum to 1"),
    ("no share for one", lambda: hatrpo(kl_split=lambda agents: [0.5, 0.0, 0.5]), ValueError,
     r"it must return 3 positive shares"),
    ("a share in place of shares", lambda: hatrpo(kl_split=lambda agents: 1.0), ValueError,
     "kl_split returned 1.0; it must return 3"),
    ("a weight of no critic", lambda: HAPPOLoss(make_actor(), None, critic_coeff=1.0), ValueError,
     "there is no critic; pass one or leave it out"),
    ("a deviation that agents share", lambda: loss(deviating()), ValueError,
     r"one parameter module.*for all agents.*blocks=\['agents'\]"),
    ("a keyword of the other loss", lambda: hatrpo(clip_epsilon=0.2), TypeError,
     "HATRPOLoss has no argument 'clip_epsilon'; pass max_kl"),
    ("a discount", lambda: loss(gamma=0.9), TypeError, "'gamma'; call loss.make_value_estimator"),
])

UPDATERS = built([
    ("agents at the root", lambda: HAPPOLoss(at_root()), ValueError,
     r"3 agents, but its action 'action' lies at the root .*name a group in the actor's keys"),
    ("a loss of TorchRL", lambda: SequentialUpdater(ClipPPOLoss(make_actor(), make_critic())),
     TypeError, "HAPPOLoss or a HATRPOLoss, got a ClipPPOLoss"),
    ("no loss", lambda: SequentialUpdater(None), TypeError, "got None"),
    ("a frozen actor", lambda: Team(make_actor().requires_grad_(False)), ValueError,
     "agent 'agents_0' has no parameter that requires a gradient"),
    ("a loss that is a sum", lambda: SequentialUpdater(loss(reduction="sum")), ValueError,
     "reduction='sum', but .*build it with reduction='mean'"),
    ("an advantage standardised at each step",
     lambda: SequentialUpdater(loss(normalize_advantage_exclude_dims=(1,))), ValueError,
     r"exclude_dims=\(1,\), but .*leave it out, or pass \(-2,\)"),
    ("a group by the critic's name", lambda: SequentialUpdater(
        loss({"critic": make_actor(1, group="critic")})), ValueError, "rename its group"),
    ("a hidden layer that PopArt would rescale", lambda: SequentialUpdater(
        loss(critic=head_first(), value_norm=PopArtValueNorm(shape=1), popart=True)), ValueError,
     r"last parameters are \['module.hidden.weight', 'module.hidden.bias'\].*registered after"),
    ("statistics of three values", lambda: loss(value_norm=RunningValueNorm(shape=(3, 1))),
     ValueError, r"a RunningValueNorm of shape \(3, 1\).*build it with shape=1"),
    ("a frozen critic", lambda: Team(critic=make_critic().requires_grad_(False)), ValueError,
     "critic has no parameter that requires a gradient"),
    ("a critic that writes other keys", lambda: Team(critic=two_keys()), KeyError,
     r"critic writes \['first', 'second'\], but the loss reads the state value from 'state_value'"),
    ("an optimiser in place of a factory", lambda: Team(optimizer=elsewhere(None)), TypeError,
     "optimizer must be a callable .*got a Adam"),
    ("the name of an optimiser", lambda: Team(critic_optimizer="adam"), TypeError,
     "critic_optimizer must be a callable .*got 'adam'"),
    ("an optimiser of other parameters", lambda: Team(optimizer=elsewhere), ValueError,
     "holds other parameters than the ones of this agent"),
    ("an optimiser of some parameters", lambda: Team(
        optimizer=lambda parameters: torch.optim.SGD(list(parameters)[:1])), ValueError,
     "holds other parameters"),
    ("a factory of nothing", lambda: Team(optimizer=lambda parameters: None), TypeError,
     "factory returned None; it must return a torch.optim.Optimizer"),
    ("LBFGS", lambda: Team(optimizer=torch.optim.LBFGS), ValueError, "LBFGS .*pass another"),
    ("a schedule of a metric", lambda: Team(scheduler=ReduceLROnPlateau), ValueError,
     "ReduceLROnPlateau wants a metric"),
    ("a factory of no schedule", lambda: Team(scheduler=lambda optimizer: None), TypeError,
     "scheduler factory returned None; it must return"),
    ("num_epochs 0", lambda: Team(num_epochs=0), ValueError, "num_epochs .*at least 1, got 0"),
    ("num_epochs 1.5", lambda: Team(num_epochs=1.5), TypeError, "num_epochs .*whole .*got 1.5"),
    ("critic_epochs 0", lambda: Team(critic_epochs=0), ValueError, "critic_epochs .*got 0"),
    ("minibatch_size 0", lambda: Team(minibatch_size=0), ValueError, "minibatch_size .*got 0"),
    ("critic_minibatch_size 0", lambda: Team(critic_minibatch_size=0), ValueError,
     "critic_minibatch_size .*got 0"),
    ("minibatch_size in words", lambda: Team(minibatch_size="7"), TypeError, "minibatch_.*'7'"),
    ("max_grad_norm below 0", lambda: Team(max_grad_norm=-1.0), ValueError, "positive .*got -1"),
    ("max_grad_norm in words", lambda: Team(max_grad_norm="1"), TypeError, "above 0 .*got '1'"),
    ("target_kl NaN", lambda: Team(target_kl=NAN), ValueError, "target_kl must be positive"),
    ("target_kl with HATRPO", lambda: Team(loss=HATRPOLoss, target_kl=0.1), ValueError,
     "bounded by max_kl; leave target_kl out"),
    ("sequence_length 0", lambda: Team(sequence_length=0), ValueError, "sequence_length .*got 0"),
    ("seed in words", lambda: Team(seed="one"), TypeError, "seed must be a whole number"),
    ("seed below 0", lambda: Team(seed=-1), ValueError, "at least 0 .*got -1"),
    ("an unknown order", lambda: Team(order="best"), ValueError, 'must be "random".*got .best'),
    ("an order with an unknown name", lambda: Team(order=["agents_0", "agents_1", "agents_9"]),
     ValueError, "must hold each of the agents .*once"),
    ("an order with an agent twice", lambda: Team(order=[0, 1, 1]), ValueError, r"\[0, 1, 1\] m"),
    ("an order that is a number", lambda: Team(order=3), ValueError, "The order 3 must hold"),
    ("a buffer without a batch size", lambda: Team(replay_buffer=ReplayBuffer()), ValueError,
     "no batch_size"),
    ("a buffer that is none", lambda: Team(replay_buffer=[]), TypeError, "a ReplayBuffer or None"),
    ("an unknown setting", lambda: Team(num_epoch=3), TypeError, "argument 'num_epoch'"),
    ("a step without epochs", lambda: FirstOrder(num_epochs=0), ValueError,
     "num_epochs must be at least 1"),
    ("epochs of one agent that are none", lambda: FirstOrder(num_epochs={"one": 2, "two": 0}),
     ValueError, "num_epochs must be at least 1"),
    ("a step of too short gradients", lambda: FirstOrder(max_grad_norm=-1.0), ValueError,
     "max_grad_norm must be positive"),
    ("a setting of nobody", lambda: Team(num_epochs={"agents": 2, "agent_0": 3}), ValueError,
     r"num_epochs has values for \['agent_0'\], but there are only \['agents_0',"),
    ("an agent without a setting", lambda: Team(minibatch_size={"agents_0": 5}), ValueError,
     "minibatch_size has values for .*but none for the agent 'agents_1'; name it, or its group"),
    ("a trust region without a policy", lambda: TrustRegion()(Problem("x", len, list)), ValueError,
     "A trust region needs a policy, but the problem of 'x' has no distribution"),
    ("an optimiser that is no factory", lambda: build_optimizer(3, []), TypeError,
     "optimizer must be a callable"),
    ("a scheduler that is no factory", lambda: build_scheduler(3, elsewhere([])), TypeError,
     "scheduler must be a callable"),
    ("minibatches of nothing", lambda: ShuffledMinibatches(-1, None), ValueError, "got -1"),
    ("a trust region without trust", lambda: TrustRegion(backtrack_factor=1.0), ValueError,
     "backtrack_factor must be between 0 and 1"),
])

BATCHES = called([
    ("rewards that are whole", setting(REWARD, lambda reward: reward.long()), ValueError,
     r"'reward'\) is of torch.int64, but must be of a float type; write it as torch.float32"),
    *((f"{value} in {key}", spoil(key, value), ValueError, f"{key[-1]}.* holds NaN or infinite")
      for value in (NAN, INF) for key in (OBS, ACT, LOG_PROB, REWARD, NEXT_OBS)),
    ("NaN in the stored distribution", spoil(("agents", "loc")), ValueError, "'loc'.* holds NaN"),
    ("NaN in the advantage", adding(advantage=spoiled(*STEPS, 1)), ValueError, "'advantage'.*NaN"),
    ("NaN in the target", adding(value_target=spoiled(*STEPS, 3, 1)), ValueError, "'value_target'"),
    *((f"no {key}", without(key), KeyError, f"no entry .*{key[-1]}.*which .* needs; ")
      for key in (OBS, ACT, LOG_PROB, REWARD, DONE, ("next", "terminated"), NEXT_OBS)),
    ("an advantage without a target", lambda batch: batch.set("advantage", ramp(*STEPS, 1)),
     KeyError, "'value_target'.*beside"),
    ("a dict", lambda batch: dict(batch), TypeError, "must be a TensorDict, got a dict"),
    ("a single step", lambda batch: batch[0, 0], ValueError, r"batch size \[\]; pass"),
    ("no step", lambda batch: batch[:, :0], ValueError, r"batch size \[4, 0\]; pass"),
    ("another device", lambda batch: batch.to("meta"), ValueError, "lies on meta, but .* cpu"),
    ("one entry on another device", setting(REWARD, lambda reward: reward.to("meta")), ValueError,
     "'reward'.* lies on meta"),
    ("fewer agents", lambda batch: batch.set("agents", batch["agents"][..., :2]), ValueError,
     r"'agents' has shape \[4, 6, 2\], but .* 3 agents"),
    ("observations of another size", setting(OBS, lambda seen: seen[..., :4], NEXT_OBS), ValueError,
     r"critic cannot read the batch \(.*\[4, 6, 3, 4\]"),
    ("observations of another type", setting(OBS, lambda seen: seen.double(), NEXT_OBS), ValueError,
     r"critic cannot read the batch \(.*float64"),
    ("next observations of another size", setting(NEXT_OBS, lambda seen: seen[..., :4]), ValueError,
     "must be alike"),
    ("actions of another size", setting(ACT, lambda action: action[..., :1]), ValueError,
     r"action .* has shape .*TanhNormal of .* draws actions of shape"),
    ("actions of another type", setting(ACT, lambda action: action.long()), ValueError, "a float"),
    ("actions beyond the bounds", setting(ACT, lambda action: 5 * action), ValueError, "the range"),
    ("log-probabilities of nobody", lambda batch: batch.set("agents", TensorDict(
        {**batch["agents"], "action_log_prob": ramp(*STEPS)}, STEPS)), ValueError,
     r"'action_log_prob'\) has shape \[4, 6\], but .* 3 agents"),
    ("log-probabilities that are whole", setting(LOG_PROB, lambda p: p.int()), ValueError, "float"),
    ("log-probabilities with a gradient", setting(LOG_PROB, lambda p: p.clone().requires_grad_()),
     ValueError, "requires grad; collect under torch.no_grad"),
    ("a reward without its last dimension", setting(REWARD, lambda reward: reward.squeeze(-1)),
     ValueError, r"\[4, 6\]; it must be \[4, 6, 1\] for the team"),
    ("done as a number", setting(DONE, lambda done: done.float()), ValueError, "torch.bool"),
    ("an advantage of two agents", adding(advantage=torch.zeros(*STEPS, 2, 1)), ValueError,
     r"\[4, 6, 2, 1\]; it must be"),
    ("a whole advantage", adding(advantage=torch.ones(*STEPS, 1).long()), ValueError, "float type"),
    ("a target for the team alone", adding(value_target=torch.zeros(*STEPS, 1)), ValueError,
     "critic cannot read the batch .*incompatible"),
    ("a mask that does not fit", lambda batch: batch.set(
        ("agents", "active"), torch.ones(*STEPS, 3, 2).bool()), ValueError, "each agent at each"),
    ("a mask of too few steps", lambda batch: batch.set(
        ("collector", "mask"), torch.ones(*STEPS, 2).bool()), ValueError, "of each step whether"),
    ("a mask of numbers", lambda batch: batch.set(
        ("collector", "mask"), torch.ones(STEPS, dtype=torch.uint8)), ValueError,
     "torch.uint8, but it must say yes or no: write it as torch.bool"),
])

TEAMS = trained([
    ("networks on the meta device", changed(Team, lambda team: team.loss.to("meta")), ValueError,
     "meta device, which holds no numbers"),
    ("networks on two devices", changed(Team, lambda team: team.critic.to("meta")), ValueError,
     "meta"),
    ("networks of another type", changed(Team, lambda team: team.loss.double()), ValueError,
     "cannot read the batch .*(d|scalar )type"),
    ("an actor without log-probabilities", partial(
        Team, lambda: categorical(stack(), return_log_prob=False)), KeyError,
     "log_prob.*return_log_prob=True"),
    ("one network for a whole group", partial(Team, lambda: categorical(nn.Linear(5, 3))),
     ValueError, r"pass an ActorList, or .*MultiAgentMLP, .*share_params=True and blocks=\["),
    ("a trust region without a divergence", partial(
        Team, lambda: make_actor(distribution=Truncated), loss=HATRPOLoss),
     NotImplementedError, "No Fisher matrix of TruncatedNormal .*, or choose another distribution"),
    ("actions that do not exist", changed(partial(Team, lambda: categorical(stack())), lambda team:
        team.batch["agents"].set("action", team.batch[ACT] + 7)), ValueError, "leaves the range"),
    ("a critic of two values", partial(Team, critic=two_values), ValueError, "critic cannot read"),
    ("a critic of what is not there", partial(Team, critic=lambda: critic_of(nn.Linear(5, 1), "s")),
     KeyError, "no entry 's', which the critic needs"),
    ("rewards that differ between agents", paid(ramp(*STEPS, 3, 1)), ValueError,
     r"differ between the agents .*TeamReward\(.mean.\)"),
    ("NaN in the rewards of agents", paid(spoiled(*STEPS, 3, 1)), ValueError, "'reward'.* NaN"),
    ("an order that forgets an agent", partial(Team, order=lambda batch: [0, 1]), ValueError,
     r"\[0, 1\] must hold each"),
    ("chunks that do not fit", partial(Team, sequence_length=4), ValueError,
     "sequence_length=4 does not divide the 6 steps"),
    ("a buffer that is too small", partial(Team, minibatch_size=None, replay_buffer=ReplayBuffer(
        storage=LazyTensorStorage(10), batch_size=5)), ValueError, "room for 10 items, .* has 24"),
])


def slimmer(state):
    """The optimiser of one agent with the moments of narrower networks."""
    for moments in state["steps"]["agents_1"]["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"][..., :1]


def sgd(state):
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(6)]
    optimizer = torch.optim.SGD(parameters, lr=0.1).state_dict()
    state["steps"]["agents_1"]["optimizer"] = optimizer


def without_key(state, key):
    del state[key]


def larger_team():
    return Team(partial(make_actor, 4), partial(make_critic, 4), n_agents=4)


# fmt: off
STATES = loaded([
    ("a number for a state", lambda state: 5, ValueError, "not one of a SequentialUpdater"),
    ("an empty state", lambda state: {}, ValueError, "must be a dict that holds"),
    ("a state without its counters", lambda state: without_key(state, "num_updates"), ValueError,
     "must be a dict that holds"),
    ("a state of another version", lambda state: state.update(version=99), ValueError,
     "version 99, but this library reads version 1"),
    ("a state without networks", lambda state: state.update(loss=None), ValueError, "NoneType"),
    ("a state with a network more", lambda state: state["loss"].update(net=torch.zeros(1)),
     ValueError, "another architecture: 'net'"),
    ("a state with words for weights", lambda state: state["loss"].update(clip_epsilon="0.2"),
     ValueError, "another architecture: 'clip_epsilon'"),
    ("a state without an agent", lambda state: without_key(state["steps"], "agents_1"),
     ValueError, r"team of \['agents_0', 'agents_2', 'critic'\]"),
    ("a state without an optimiser", lambda state: state["steps"].update(agents_1={}), ValueError,
     r"'agents_1' holds \[\]"),
    ("a state of another optimiser", sgd, ValueError, "not from Adam"),
    ("a state of an optimiser in words",
     lambda state: state["steps"]["agents_1"].update(optimizer="adam"), ValueError,
     "none of torch.optim; it is damaged"),
    ("a state of narrower moments", slimmer, ValueError, r"'exp_avg' has shape \[16, 1\]"),
    ("a state without generators", lambda state: state.update(generators=[]), ValueError,
     "2 random generators"),
    ("a state of impossible generators", lambda state: state.update(
        generators=[torch.zeros(5056, dtype=torch.uint8)] * 2), ValueError, "Invalid mt19937"),
    ("a state that counts in words", lambda state: state.update(num_updates="3"), ValueError,
     "counts '3' updates"),
    ("a state of a larger team", lambda state: larger_team().updater.state_dict(), ValueError,
     "team of"),
    ("a state of HATRPO", lambda state: Team(loss=HATRPOLoss).updater.state_dict(), ValueError,
     "another architecture: 'clip_epsilon'"),
    ("a state with a schedule", lambda state: Team(
        scheduler=partial(StepLR, step_size=1)).updater.state_dict(), ValueError,
     r"holds \['optimizer', 'scheduler'\], but its step in this updater holds \['optimizer'\]"),
])
# fmt: on
