"""The recipe's choices of model, critic and value normalisation, through whole runs."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from newer import PopArtValueNorm, RunningValueNorm
from recipe_helpers import table, tiny_config
from torch import nn
from torchrl.modules import LSTMModule

from torchrl_happo import ActorList
from torchrl_happo.policy.memory import has_memory
from torchrl_happo.recipe import checkpoint, load, trained, training
from torchrl_happo.recipe.algorithms import make_learner
from torchrl_happo.recipe.compose import compose_config, from_dict, to_dict
from torchrl_happo.recipe.config import ConfigError, RecurrentModel
from torchrl_happo.recipe.environments import make_env

# Every setting of the reference implementation that is not the recipe's own default.
REFERENCE = (
    "model.layer_norm=true",
    "model.state_dependent_std=false",
    "model.initial_std=0.3655",
    "model.max_std=0.5",
    "algorithm.lr_schedule=linear",
    "algorithm.adam_eps=1e-5",
    "algorithm.loss_critic_type=l2",
    "algorithm.critic_coeff=0.5",
    "algorithm.clip_value=0.2",
    "algorithm.value_norm=popart_ema",
    "algorithm.value_norm_decay=0.9",
)
GRU = ("model=gru", "model.hidden_size=5", "model.sequence_length=3")
CRITIC = ("critic.model=lstm", "critic.hidden_size=4")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Leaves the report out, which takes longer than these runs."""
    monkeypatch.setattr(training, "write_report", lambda config, folder: None)


def learner_of(*overrides):
    """What a configuration builds for its task."""
    config = tiny_config(*overrides)
    return make_learner(config, make_env(config.task, num_envs=1, seed=0))


@pytest.mark.parametrize(
    "overrides",
    [
        (*GRU, "algorithm=happo"),
        (*GRU, "algorithm=hatrpo", "algorithm.value_norm=popart_ema", "algorithm.popart=true"),
        ("model=lstm", "task=vmas/simple_speaker_listener", "critic.input=agent_specific"),
        (*CRITIC, "algorithm=happo"),
        (*GRU, *CRITIC, "algorithm=hatrpo", "critic.input=own"),
        (*REFERENCE, "algorithm=happo", "algorithm.popart=true"),
        (*REFERENCE, "algorithm=mappo", "algorithm.share_params=false"),
    ],
    ids=[
        *("gru-happo", "gru-hatrpo-popart", "lstm-groups", "critic", "gru-critics-hatrpo"),
        *("reference-happo", "reference-mappo"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, overrides):
    """Memory and value statistics are part of what a checkpoint brings back, bit for bit."""
    config = tiny_config(*overrides, "collector.restart_interval=1", "evaluation.interval=1")
    whole = training.run(config, tmp_path / "whole")
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    (stopped / "checkpoints" / "00000003.pt").unlink()
    training.run(replace(config, resume=str(stopped)), stopped)
    first, second = (checkpoint.read(folder)["updater"] for folder in (whole, stopped))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for name in ("metrics.csv", "evaluation.csv"):
        assert table(whole / name) == table(stopped / name)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_memory_in_worker_processes(tmp_path):
    """Workers keep the hidden states of their own environments."""
    config = tiny_config(*GRU, *CRITIC, "collector=multi")
    assert len(table(training.run(config, tmp_path) / "metrics.csv")) == 3


def test_memory_forgets_at_the_end_of_an_episode_in_evaluation(tmp_path):
    """An evaluated episode is that of the policy from a zero state, whatever came before."""
    from torchrl_happo.recipe.evaluation import Evaluation

    config = tiny_config(*GRU)
    policy = learner_of(*GRU).policy
    evaluate = Evaluation(config)
    first, second = evaluate(policy), evaluate(policy)
    assert first["return"] == second["return"]
    evaluate.close()


def test_an_episode_with_memory_is_drawn(tmp_path, monkeypatch):
    """The rollout of a recurrent policy needs the transforms, too."""
    from PIL import Image

    monkeypatch.setattr(trained, "draw", lambda env: Image.new("P", (4, 4)))
    folder = training.run(tiny_config(*GRU, "total_frames=24"), tmp_path)
    load(folder).render(tmp_path / "rollout.gif")
    assert (tmp_path / "rollout.gif").exists()


def test_memory_is_one_actor_for_each_agent():
    """The choice of the model reaches the policy, and the chunk length the updater."""
    learner = learner_of(*GRU)
    assert isinstance(learner.policy, ActorList)
    assert learner.updater.sequence_length == 3
    assert learner_of().updater.sequence_length is None


@pytest.mark.parametrize(
    ("sees", "shape"),
    [("auto", (1, 1)), ("observations", (1, 1)), ("agent_specific", (1, 3, 1)), ("own", (1, 3, 1))],
)
def test_what_the_critic_sees(tmp_path, sees, shape):
    """One word: a value of the team, or one for each agent; a run with it goes through."""
    config = tiny_config(f"critic.input={sees}", "total_frames=24")
    env = make_env(config.task, num_envs=1, seed=0)
    critic = make_learner(config, env).updater.loss.critic_network
    assert critic(env.reset())["state_value"].shape == shape
    training.run(config, tmp_path)


@pytest.mark.parametrize("sees", ["observations", "agent_specific", "own"])
def test_the_critics_memory(sees):
    """Its kind and size, whatever the policies'; the policy rolls it out with the actors."""
    learner = learner_of(*CRITIC, f"critic.input={sees}")
    (*_, memory) = [m for m in learner.updater.loss.critic_network.modules() if has_memory(m)]
    assert isinstance(memory, LSTMModule)
    assert memory.lstm.hidden_size == 4
    assert has_memory(learner.policy)
    assert not has_memory(learner_of().policy)


def test_a_state_that_is_not_there_is_refused():
    """The task is named, and what else there is."""
    with pytest.raises(ConfigError, match="vmas/balance does not have"):
        learner_of("critic.input=state")


@pytest.mark.parametrize("algorithm", ["happo", "hatrpo"])
def test_settings_reach_loss_and_updater(algorithm):
    """Normalisation, PopArt, epochs of the critic; and by default none of them."""
    loss = learner_of(f"algorithm={algorithm}").updater.loss
    assert loss.value_norm is None
    assert not loss.popart
    chosen = (f"algorithm={algorithm}", "algorithm.popart=true", "algorithm.critic_epochs=7")
    for name, kind in (("popart_ema", PopArtValueNorm), ("running", RunningValueNorm)):
        updater = learner_of(*chosen, f"algorithm.value_norm={name}").updater
        assert type(updater.loss.value_norm) is kind
        assert updater.loss.popart
        assert updater.steps["critic"].num_epochs == 7


def test_settings_of_the_clipped_surrogate():
    """Unlike thresholds on both sides, and an early end of the epochs."""
    updater = learner_of("algorithm.clip_epsilon_high=0.28", "algorithm.target_kl=0.01").updater
    low, high = updater.loss._log_range
    torch.testing.assert_close(torch.stack([low, high]).exp(), torch.tensor([0.8, 1.28]))
    names = [agent.name for agent in updater.loss.agents]
    assert all(updater.steps[name].target_kl == 0.01 for name in names)
    other = learner_of().updater
    assert all(step.target_kl is None for step in other.steps.values())


@pytest.mark.parametrize("algorithm", ["happo", "hatrpo", "mappo", "ippo"])
def test_the_references_settings_reach_every_algorithm(algorithm):
    """Networks, optimisers and losses have them, and a run with them goes through."""
    learner = learner_of(*REFERENCE, f"algorithm={algorithm}")
    updater = learner.updater
    if algorithm in ("happo", "hatrpo"):
        loss, step = updater.loss, updater.steps["critic"]
        optimizer, scheduler = step.optimizer, step.scheduler
    else:
        loss = updater.losses["agents"]
        optimizer, scheduler = updater.optimizers["agents"], updater.schedulers["agents"]
    for network in (learner.policy, loss.critic_network):
        assert any(isinstance(module, nn.LayerNorm) for module in network.modules())
    assert (loss.loss_critic_type, loss.critic_coeff.item()) == ("l2", 0.5)
    assert loss.clip_value.item() == pytest.approx(0.2)
    assert loss.value_norm.beta == 0.9
    assert optimizer.param_groups[0]["eps"] == 1e-5
    rates = []
    for _ in range(3):  # the iterations of this run
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [rate / 3e-4 for rate in rates] == pytest.approx([1, 2 / 3, 1 / 3])


def test_a_stored_model_comes_back_with_its_schema():
    """The kind of model is part of what a checkpoint stores."""
    config = compose_config("model=gru")
    assert type(config.model) is RecurrentModel
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model=transformer",), "There is no model 'transformer'; known: gru, lstm, mlp."),
        (("model=gru", "algorithm=mappo"), "model=gru is for happo and hatrpo"),
        (("critic.input=own", "algorithm=ippo"), "critic.input is for happo and hatrpo"),
        (("critic.model=gru", "algorithm=mappo"), "critic.model is for happo and hatrpo"),
        (("critic.model=rnn",), "one of mlp, gru, lstm."),
        (("critic.input=all",), "one of auto, observations, state, agent_specific, own."),
        (("model=gru", "model.sequence_length=7"), "must divide steps_per_batch, 100."),
        (("model.max_std=0.5", "model.state_dependent_std=false"), "starts below it"),
        (("model.max_std=2",), "does not depend on the observation"),
        (("algorithm.popart=true",), "set algorithm.value_norm."),
        (("algorithm.value_norm=ema",), "one of popart_ema, running."),
        (("hidden_size=4",), "near: critic.hidden_size, model.hidden_size."),
    ],
)
def test_mistakes_get_one_sentence(overrides, words):
    """What does not go together is refused before anything is built."""
    with pytest.raises(ConfigError) as caught:
        compose_config(*overrides)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert message.endswith(".")
