"""A pretended accelerator: tensors without numbers on torch's private-use device.

To be run in a process of its own, as the registration of a device is for good::

    python tests/pretended_device.py

Updates teams there, and prints for each case, as one line of JSON, what crossed between host and
device in its second update: numbers that were read back, and tensors that were copied. Two vectors
of unlike devices in one operation are an error, as on a real one.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributions import Categorical
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    IndependentNormal,
    MaskedCategorical,
    MultiAgentMLP,
    PopArtValueNorm,
    ProbabilisticActor,
    RunningValueNorm,
    TanhNormal,
)

from torchrl_happo import A2POLoss, HAPPOLoss, HATRPOLoss, SequentialUpdater
from torchrl_happo.envs import DifferentialGame
from torchrl_happo.objectives import hatrpo
from torchrl_happo.recipe import compose, environments
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.steps import minibatches
from torchrl_happo.update import updater as updates

AGENTS, OBSERVATIONS, ENVIRONMENTS, STEPS = 2, 5, 4, 7
aten = torch.ops.aten
LIBRARIES = ("torchrl_happo", "torchrl", "tensordict", "torch/distributions", "torch/optim")


class Backend(backend_registration._DummyBackendModule):
    """The module ``torch.pretended``."""

    def synchronize(self, device=None):
        """Nothing runs there."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


#: Torch holds these without a reference.
REGISTERED = (
    Backend(),
    backend_registration._DummyPrivateUse1Hook(),
    backend_registration._DummyDeviceGuard(),
)
backend_registration._setup_privateuseone_for_python_backend("pretended", *REGISTERED)
DEVICE = torch.device("pretended:0")


class NoNumbers(FakeTensorMode):
    """Tensors that have a shape, a type and a device, but no numbers."""

    avoid_device_init = True  # there is no such device

    def __deepcopy__(self, memo):
        return self  # a copy would free the references of storages twice


class Torch:
    """Torch, but that generators are those of the CPU: a pretended device can have none."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def Generator(self, device=None):
        return torch.Generator()

    def randperm(self, number, generator=None, device=None):
        return torch.randperm(number, device=DEVICE)

    def rand(self, number, generator=None, device=None):
        return torch.rand(number, device=DEVICE)


class Crossings(TorchDispatchMode):
    """Lists what crosses between host and device.

    There are no numbers to read. A flag that says whether something holds anywhere, or everywhere,
    is true, another one is false, a number is 1, and a mask is true everywhere.
    """

    def __init__(self):
        super().__init__()
        self.found = []
        self.true = []

    def note(self, kind):
        frames = [f for f in traceback.extract_stack() if any(n in f.filename for n in LIBRARIES)]
        own = [f for f in frames if "/torchrl_happo/" in f.filename]
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in (*frames[-1:], *own[-1:])]
        self.found.append([kind, " < ".join(dict.fromkeys(where))])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        there = first is not None and first.device == DEVICE
        if there and func is aten._local_scalar_dense.default:
            self.note("read")
            if first.dtype == torch.bool:
                return any(first is flag for flag in self.true)
            return 1.0 if first.is_floating_point() else 1
        if func is aten._local_scalar_dense.default and isinstance(first, FakeTensor):
            return 1.0 if first.is_floating_point() else 1  # a number of the host
        if func in (aten.equal.default, aten.allclose.default):
            if there:
                self.note("read")
            return True
        if there and func is aten.nonzero.default:
            self.note("nonzero")
            return torch.empty(first.numel(), first.ndim, dtype=torch.long, device=DEVICE)
        masks = [i for i in args[1] if i is not None] if func is aten.index.Tensor else []
        if there and any(mask.dtype == torch.bool for mask in masks):
            self.note("nonzero")
            return first.flatten(0, masks[0].ndim - 1).clone()
        result = func(*args, **(kwargs or {}))
        if func in (aten.all.default, aten.any.default):
            self.true.append(result)
        if func is aten._to_copy.default and first.device != result.device:
            self.note(f"copy {first.device.type} to {result.device.type}")
        elif func is aten.copy_.default and first.device != args[1].device:
            self.note(f"copy {args[1].device.type} to {first.device.type}")
        elif any(mask.device != first.device for mask in masks):
            self.note("index on the host")
        return result


def make_actor(distribution, bounds=None):
    """A joint actor on the device."""
    discrete = distribution in (Categorical, MaskedCategorical)
    net = MultiAgentMLP(
        n_agent_inputs=OBSERVATIONS,
        n_agent_outputs=4,
        n_agents=AGENTS,
        centralized=False,
        share_params=False,
        depth=1,
        num_cells=8,
        activation_class=nn.Tanh,
        device=DEVICE,
    )
    names = ["logits"] if discrete else ["loc", "scale"]
    in_keys = {name: ("agents", name) for name in names}
    if distribution is MaskedCategorical:
        in_keys["mask"] = ("agents", "action_mask")
    return ProbabilisticActor(
        TensorDictModule(
            net if discrete else nn.Sequential(net, NormalParamExtractor()),
            in_keys=[("agents", "observation")],
            out_keys=[("agents", name) for name in names],
        ),
        in_keys=in_keys,
        out_keys=[("agents", "action")],
        distribution_class=distribution,
        distribution_kwargs=bounds or {},
        return_log_prob=True,
    )


def make_critic():
    """A centralised critic on the device."""
    net = MultiAgentMLP(
        n_agent_inputs=OBSERVATIONS,
        n_agent_outputs=1,
        n_agents=AGENTS,
        centralized=True,
        share_params=True,
        depth=1,
        num_cells=8,
        device=DEVICE,
    )
    return TensorDictModule(net, [("agents", "observation")], [("agents", "state_value")])


def make_batch(distribution, dying=False):
    """A batch on the device."""
    shape = [ENVIRONMENTS, STEPS]
    empty = partial(torch.empty, device=DEVICE)

    def observed():
        observation = empty(*shape, AGENTS, OBSERVATIONS)
        return TensorDict({"observation": observation}, [*shape, AGENTS], device=DEVICE)

    flag = partial(empty, *shape, 1, dtype=torch.bool)
    after = {"reward": empty(*shape, 1), "done": flag(), "terminated": flag()}
    batch = TensorDict(
        {"agents": observed(), "next": TensorDict({"agents": observed(), **after}, shape)},
        shape,
        device=DEVICE,
    )
    discrete = distribution in (Categorical, MaskedCategorical)
    action = empty(*shape, AGENTS, dtype=torch.long) if discrete else empty(*shape, AGENTS, 2)
    batch["agents", "action"] = action
    batch["agents", "action_log_prob"] = empty(*shape, AGENTS)
    if distribution is MaskedCategorical:
        batch["agents", "action_mask"] = empty(*shape, AGENTS, 4, dtype=torch.bool)
    if dying:
        batch["agents", "active"] = empty(*shape, AGENTS, dtype=torch.bool)
    return batch


HAPPO = partial(HAPPOLoss, entropy_coeff=0.01)
SHORT = partial(HATRPOLoss, cg_iterations=2, max_backtracks=3)
BATCHED = partial(SHORT, line_search="batched")
DISTRIBUTIONS = {
    "normal": IndependentNormal,
    "tanh": TanhNormal,
    "discrete": Categorical,
    "masked": MaskedCategorical,
}


def cases():
    """Yield name, loss, distribution, arguments of actor and of updater, and whether agents die."""
    for name, kind in DISTRIBUTIONS.items():
        yield f"happo {name}", HAPPO, kind, {}, {"minibatch_size": 16}, False
        yield f"hatrpo {name}", BATCHED, kind, {}, {}, False
    normal = IndependentNormal
    schedule = {"scheduler": partial(ExponentialLR, gamma=0.9)}
    norm = partial(RunningValueNorm, shape=1)
    popart = partial(PopArtValueNorm, shape=1)
    clipping = partial(HAPPO, clip_value=0.2)
    yield "happo schedule, clipped values", clipping, normal, {}, schedule, False
    yield "happo value norm", (HAPPO, norm, {"clip_value": 0.2}), normal, {}, {}, False
    yield "happo popart", (HAPPO, popart, {"popart": True}), normal, {}, {}, False
    bounds = {"low": -2.0, "high": 3.0}
    yield "happo bounds", HAPPO, TanhNormal, bounds, {}, False
    yield "hatrpo share", partial(BATCHED, fisher_fraction=0.5), normal, {}, {}, False
    yield "hatrpo sequential", partial(SHORT, line_search="sequential"), normal, {}, {}, False
    yield "happo early stop", HAPPO, normal, {}, {"target_kl": 0.01}, False
    small = {"minibatch_size": 16}
    everything = (HAPPO, norm, {"clip_value": 0.2})
    yield "happo value norm, clipped values, squashed", everything, TanhNormal, {}, small, False
    yield "happo value norm, dying", (HAPPO, norm, {}), Categorical, {}, small, True
    yield "hatrpo weighted", partial(BATCHED, kl_split="weighted"), normal, {}, {}, False
    own = {"order": "random"}  # of which nothing is left
    yield "hatrpo greedy", partial(BATCHED, kl_split="greedy"), normal, {}, own, False
    yield "a2po", partial(A2POLoss, entropy_coeff=0.01), normal, {}, small, False
    yield "happo dying", HAPPO, Categorical, {}, small, True
    yield "hatrpo dying", BATCHED, normal, {}, {}, True


def crossings(make_loss, distribution, bounds, settings, dying):
    """Return what crosses in an update.

    It is the second one where the first makes something for good: bounds of distributions, the
    state of an optimiser, statistics. Others are counted at once, but for the look at values.
    """
    with NoNumbers(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        stack.enter_context(Crossings())
        norm = {}
        if isinstance(make_loss, tuple):
            make_loss, make_norm, norm = make_loss
            norm = {**norm, "value_norm": make_norm().to(DEVICE)}
        loss = make_loss(make_actor(distribution, bounds), make_critic(), **norm)
        updater = SequentialUpdater(
            loss,
            optimizer=partial(torch.optim.Adam, lr=1e-3),
            num_epochs=2,
            max_grad_norm=1.0,
            check_finite=False,
            # A random order is drawn on the host, whose numbers it is.
            **{"order": "fixed", **settings},
        )
        updater.num_updates = 1  # the first update reads values
        batch = make_batch(distribution, dying)
        if dying or norm or distribution is TanhNormal:
            updater(batch)
        for agent in loss.agents:
            agent.is_checked = True  # likewise
        found = stack.enter_context(Crossings())
        updater(batch)
    return found.found


def make_game(num_envs, device):
    """Return a game that may be done after a reset, as a pretended flag says that it is."""
    env = DifferentialGame(num_envs=num_envs, device=torch.device(device))
    env._allow_done_after_reset = True
    return env


def recipe():
    """Return what crosses while the recipe's parts collect, update, and collect once more.

    One option, ``device``, says where environments, networks and batches lie.
    """
    environments.check_device = lambda device: None
    words = ["task=custom", f"device={DEVICE}", "num_envs=4", "steps_per_batch=6"]
    words += ["model.num_cells=[8]", "algorithm.num_epochs=1", "algorithm.order=fixed"]
    words += ["algorithm.minibatch_size=12"]
    config = compose.load(words, {"task.make_env": make_game})
    with NoNumbers(allow_non_fake_inputs=True), Crossings(), torch.no_grad():
        env = environments.make_env(config.task, num_envs=4, seed=0, device=config.device)
        learner = make_learner(config, env)
        learner.updater.num_updates = 1
        with set_exploration_type(ExplorationType.RANDOM):
            for _ in range(2):
                with Crossings() as found:
                    batch = env.rollout(6, learner.policy, break_when_any_done=False)
                learner.updater(batch)
        tensors = dict(batch.items(True, True)) | dict(learner.policy.named_parameters())
        tensors |= dict(learner.updater.loss.critic_network.named_parameters())
        assert {tensor.device for tensor in tensors.values()} == {DEVICE}
    return found.found


def main():
    """Run all cases."""
    torch.set_num_threads(1)
    updates.torch = hatrpo.torch = minibatches.torch = Torch()
    for name, *case in cases():
        sys.stdout.write(json.dumps({"case": name, "crossings": crossings(*case)}) + "\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps({"case": "recipe", "crossings": recipe()}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
