"""The critic's clipped loss compares with the values of before the fit."""

from __future__ import annotations

import copy
from functools import partial

import torch
from team import make_actor, make_batch, make_critic
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement

from torchrl_happo import HAPPOLoss, SequentialUpdater


def test_the_whole_batch_and_copies_of_it_give_the_same_critic():
    """With one minibatch, whose values the critic overwrites, as with copies drawn from a buffer.

    The old values must survive the epochs: the clipped loss is about the distance from them.
    """
    actor, critic = make_actor().double(), make_critic().double()
    batch = make_batch(actor)
    steps = batch.numel()
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(steps), sampler=SamplerWithoutReplacement(), batch_size=steps
    )
    fitted = []
    for options in ({"minibatch_size": None}, {"replay_buffer": buffer}):
        own = copy.deepcopy(critic)
        loss = HAPPOLoss(copy.deepcopy(actor), own, clip_value=0.01, entropy_coeff=0.0)
        optimizer = partial(torch.optim.Adam, lr=1e-2)
        SequentialUpdater(loss, optimizer=optimizer, num_epochs=4, **options)(batch)
        fitted.append(torch.cat([p.flatten() for p in own.parameters()]))
    torch.testing.assert_close(*fitted, rtol=1e-9, atol=1e-11)
