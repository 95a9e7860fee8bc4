"""Networks with layer normalisation: what they compute, one by one and in a stack."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrl.modules import MultiAgentMLP

from torchrl_happo.layer_norm import LayerNormMLP, MultiAgentLayerNormMLP

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


@pytest.mark.parametrize("shape", [(4, 3), (5, 4, 3), (5, 6, 4, 3), (0, 4, 3)])
def test_a_stack_is_its_networks(shape):
    """Batched products and ``torch.vmap`` give the same outputs and the same gradients."""
    net = stack().double()
    x, weight = torch.randn(shape).double(), torch.randn(*shape[:-1], 2).double()
    results = []
    for forward in (net.forward, super(MultiAgentLayerNormMLP, net).forward):
        out = forward(x)
        gradients = torch.autograd.grad((out * weight).sum(), list(net.parameters()))
        results.append([out, *gradients])
    assert results[0][0].shape == (*shape[:-1], 2)
    torch.testing.assert_close(*results)


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
