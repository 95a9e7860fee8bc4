"""Networks with layer normalisation: what they compute, one by one and in a stack."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import MultiAgentMLP, ProbabilisticActor

from torchrl_happo.networks.layer_norm import LayerNormMLP, MultiAgentLayerNormMLP
from torchrl_happo.team.split import split_actor

SIZES = {"num_cells": [16, 8], "activation_class": nn.ReLU}


def stack(share_params=False, centralized=False, **kwargs):
    """Four agents with three inputs and two outputs, their affine parameters all unlike."""
    settings = {**SIZES, **kwargs, "share_params": share_params, "centralized": centralized}
    net = MultiAgentLayerNormMLP(3, 2, 4, **settings)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def test_what_is_normalised():
    """The input, and what each activation puts out, have mean 0 and deviation 1 in every sample."""
    net = LayerNormMLP(5, 2, **SIZES)
    norms = [layer for layer in net if isinstance(layer, nn.LayerNorm)]
    behind = [type(net[i - 1]) for i, layer in enumerate(net) if layer in norms and i]
    assert net[0] is norms[0]
    assert behind == [nn.ReLU, nn.ReLU]
    seen = []
    for layer in norms:
        layer.register_forward_hook(lambda *call: seen.append(call[-1]))
    nn.Sequential.forward(net, torch.randn(7, 5))
    for out in seen:
        torch.testing.assert_close(out.mean(-1), torch.zeros(7), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.std(-1, correction=0), torch.ones(7), atol=1e-3, rtol=0)


@pytest.mark.parametrize("activate_last_layer", [False, True])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (0, 5)])
def test_a_network_is_its_layers(shape, activate_last_layer):
    """Scale and shift inside the linear layers change neither outputs nor gradients."""
    net = LayerNormMLP(5, 2, activate_last_layer=activate_last_layer, **SIZES).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape).double().requires_grad_()
    weight = torch.randn(*shape[:-1], 2).double()
    results = []
    for forward in (net.forward, super(LayerNormMLP, net).forward):
        out = forward(x)
        gradients = torch.autograd.grad((out * weight).sum(), [x, *net.parameters()])
        results.append([out, *gradients])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_layer_of_the_users_own():
    """Whatever is put in the place of a linear layer is called."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = LayerNormMLP(5, 2, **SIZES)
    net[-1] = Doubled(8, 2)
    x = torch.randn(7, 5)
    torch.testing.assert_close(net(x), super(LayerNormMLP, net).forward(x))


def test_a_scaled_and_shifted_observation_is_the_same_one():
    """Whatever unit an observation is in, the network says the same."""
    net, x = LayerNormMLP(5, 2, **SIZES), 10 * torch.randn(7, 5)
    torch.testing.assert_close(net(3 * x + 2), net(x), atol=1e-4, rtol=1e-4)


def compare_with_its_networks(net, shape):
    """Outputs and gradients of batched products and of ``torch.vmap``."""
    net, x = net.double(), torch.randn(shape).double()
    results = []
    for forward in (net.forward, super(MultiAgentLayerNormMLP, net).forward):
        out = forward(x)
        weight = torch.linspace(-1, 1, out.numel()).double().view(out.shape)
        gradients = torch.autograd.grad((out * weight).sum(), list(net.parameters()))
        results.append([out, *gradients])
    torch.testing.assert_close(*results)
    return results[0][0]


@pytest.mark.parametrize("shape", [(4, 3), (5, 4, 3), (5, 6, 4, 3), (0, 4, 3)])
def test_a_stack_is_its_networks(shape):
    """Batched products and ``torch.vmap`` give the same outputs and the same gradients."""
    assert compare_with_its_networks(stack(), shape).shape == (*shape[:-1], 2)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"activation_class": nn.PReLU},
        {"activation_class": nn.LeakyReLU, "activation_kwargs": {"negative_slope": 0.5}},
        {"num_cells": 8, "depth": 2},
        {"num_cells": None, "depth": 1},
        {"num_cells": None},
        {"bias_last_layer": False},
        {"single_bias_last_layer": True},
        {"layer_kwargs": {"bias": False}, "activate_last_layer": True},
        {"norm_class": nn.LayerNorm, "norm_kwargs": [{"normalized_shape": n} for n in (16, 8)]},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_a_stack_takes_what_an_mlp_takes(kwargs):
    """Its layers are those of a MultiAgentMLP and normalisations, each agent's own."""
    kinds = []
    for build in (MultiAgentLayerNormMLP, MultiAgentMLP):
        net = build(3, 2, 4, share_params=False, centralized=False, **{**SIZES, **kwargs}).eval()
        kinds.append([type(layer) for layer in net._empty_net if type(layer) is not nn.LayerNorm])
        if build is MultiAgentLayerNormMLP:
            compare_with_its_networks(net, (5, 4, 3))
    assert kinds[0] == kinds[1]


def test_an_output_has_the_shape_asked_for():
    """One number or several of them, as in an MLP."""
    assert LayerNormMLP(3, (2, 4), **SIZES)(torch.randn(5, 3)).shape == (5, 2, 4)
    net = MultiAgentLayerNormMLP(3, (2, 4), 4, share_params=False, centralized=False, **SIZES)
    assert compare_with_its_networks(net, (5, 4, 3)).shape == (5, 4, 2, 4)


def test_several_inputs_stand_side_by_side():
    """As in an MLP: in a stack, for agents that share a network, and for each agent cut out."""
    parts = TensorDict({"a": torch.randn(5, 4, 1), "b": torch.randn(5, 4, 2)}, [5, 4])
    joined = torch.cat([parts["a"], parts["b"]], -1)
    for net in (stack(activation_class=nn.PReLU), stack(share_params=True)):
        torch.testing.assert_close(net(parts["a"], parts["b"]), net(joined))
    net = stack(activation_class=nn.PReLU)
    actor = ProbabilisticActor(
        TensorDictModule(net, [("agents", "a"), ("agents", "b")], [("agents", "logits")]),
        in_keys=[("agents", "logits")],
        out_keys=[("agents", "action")],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    data = TensorDict({"agents": parts}, [5])
    for index, agent in enumerate(split_actor(actor)):
        view = agent.view(data, actor.in_keys)
        logits = agent.policy.parameters(view)["logits"]
        torch.testing.assert_close(logits, net(joined)[..., index, :])


@pytest.mark.parametrize(
    ("build", "name"), [(LayerNormMLP, "in_features"), (MultiAgentLayerNormMLP, "n_agent_inputs")]
)
def test_the_size_of_the_input_must_be_known(build, name):
    """No layer normalisation waits for the first data to learn it."""
    own = {} if build is LayerNormMLP else {"n_agents": 4, "centralized": False, "share_params": 0}
    with pytest.raises(TypeError, match=f"{name} must be a whole number of at least 1, got None"):
        build(None, 2, **own, **SIZES)


@pytest.mark.parametrize(("share_params", "centralized"), [(True, False), (False, True)])
def test_other_stacks_are_torchrls(share_params, centralized):
    """Shared or centralised networks take the way of ``MultiAgentMLP``, of which it is one."""
    net = stack(share_params, centralized)
    assert isinstance(net, MultiAgentMLP)
    x = torch.randn(5, 4, 3)
    torch.testing.assert_close(net(x), super(MultiAgentLayerNormMLP, net).forward(x))


def test_last_layer_activated():
    """A trunk ends with activation and normalisation, as each of its layers does."""
    net = LayerNormMLP(3, 2, activate_last_layer=True, **SIZES)
    assert [type(layer) for layer in list(net)[-3:]] == [nn.Linear, nn.ReLU, nn.LayerNorm]
