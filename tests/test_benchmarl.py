"""In BenchMARL's own Experiment: the same update, checkpoints, reports, masks, refusals."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torchrl.collectors
from newer import tensors
from team import same_state
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from wrong_calls import same

from torchrl_happo import SequentialUpdater

pytest.importorskip("benchmarl")
if not hasattr(torchrl.collectors, "SyncDataCollector"):  # the line of a script with TorchRL 0.14
    torchrl.collectors.SyncDataCollector = torchrl.collectors.Collector

from benchmarl.algorithms import algorithm_config_registry
from benchmarl.environments import TaskClass, VmasTask
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.hydra_config import load_algorithm_config_from_hydra
from benchmarl.models import GnnConfig, GruConfig, MlpConfig
from hydra import compose, initialize_config_module
from hydra.core.singleton import Singleton

from torchrl_happo.benchmarl import (
    A2poConfig,
    CoppoConfig,
    Haa2cConfig,
    HappoConfig,
    HatrpoConfig,
    register,
)

SMALL = MlpConfig(num_cells=[8], layer_class=torch.nn.Linear, activation_class=torch.nn.Tanh)
CONFIGS = [A2poConfig, CoppoConfig, Haa2cConfig, HappoConfig, HatrpoConfig]


class MaskedWorld(EnvBase):
    """Two workers and a boss, three actions each, of which one is forbidden; two steps long."""

    def __init__(self, num_envs):
        super().__init__(batch_size=[num_envs])
        self.sizes = groups = {"boss": 1, "workers": 2}

        def spec(**leaves):
            inside = {
                group: Composite(
                    {name: make(num_envs, n) for name, make in leaves.items()}, shape=(num_envs, n)
                )
                for group, n in groups.items()
            }
            return Composite(inside, shape=(num_envs,))

        self.observation_spec = spec(
            observation=lambda *shape: Unbounded((*shape, 4)),
            action_mask=lambda *shape: Categorical(2, (*shape, 3), dtype=torch.bool),
        )
        self.action_spec = spec(action=lambda *shape: Categorical(3, shape))
        self.reward_spec = spec(reward=lambda *shape: Unbounded((*shape, 1)))
        self.step_count = 0

    def _observe(self):
        out = {}
        for group, n in self.sizes.items():
            mask = torch.ones(*self.batch_size, n, 3, dtype=torch.bool)
            mask[..., self.step_count % 3] = False
            entries = {"observation": torch.randn(*mask.shape[:-1], 4), "action_mask": mask}
            out[group] = TensorDict(entries, mask.shape[:-1])
        return out

    def _reset(self, tensordict):
        self.step_count = 0
        return TensorDict(self._observe(), self.batch_size)

    def _step(self, tensordict):
        groups = {}
        for group in self.sizes:
            action = tensordict[group, "action"]
            assert tensordict[group, "action_mask"].gather(-1, action.unsqueeze(-1)).all()
            groups[group] = action.unsqueeze(-1).float()
        self.step_count += 1
        done = torch.full((*self.batch_size, 1), self.step_count == 2)
        out = TensorDict({**self._observe(), "done": done, "terminated": done}, self.batch_size)
        for group, reward in groups.items():
            out[group, "reward"] = reward
        return out

    def _set_seed(self, seed):
        torch.manual_seed(seed)


class MaskedTask(TaskClass):
    """The world above, as a task of BenchMARL."""

    def get_env_fun(self, num_envs, continuous_actions, seed, device):
        return partial(MaskedWorld, num_envs)

    def supports_continuous_actions(self):
        return False

    def supports_discrete_actions(self):
        return True

    def max_steps(self, env):
        return 2

    def has_render(self, env):
        return False

    def group_map(self, env):
        return {
            group: [f"{group}_{i}" for i in range(n)] for group, n in (("boss", 1), ("workers", 2))
        }

    def _spec(self, env, name):
        spec = env.full_observation_spec_unbatched
        inside = {g: Composite({name: spec[g, name]}, shape=spec[g].shape) for g in spec.keys()}
        return Composite(inside)

    def observation_spec(self, env):
        return self._spec(env, "observation")

    def action_mask_spec(self, env):
        return self._spec(env, "action_mask")

    def info_spec(self, env):
        return None

    def state_spec(self, env):
        return None

    def action_spec(self, env):
        return env.full_action_spec_unbatched

    @staticmethod
    def env_name():
        return "masked"


class Twin(Callback):
    """Builds an updater of its own just before the update, and gives it the same batch."""

    def on_batch_collected(self, batch):
        algorithm, config = self.experiment.algorithm, self.experiment.config
        self.updater = SequentialUpdater(
            copy.deepcopy(algorithm.updater.loss),
            optimizer=partial(torch.optim.Adam, lr=config.lr, eps=config.adam_eps),
            num_epochs=config.on_policy_n_minibatch_iters,
            minibatch_size=config.on_policy_minibatch_size,
            max_grad_norm=config.clip_grad_val,
            order=algorithm.order,
            seed=self.experiment.seed,
        )
        self.before = copy.deepcopy(tensors(self.updater.loss))
        self.metrics = self.updater(batch)


def balance():
    task = VmasTask.BALANCE.get_from_yaml()
    task.config.update(n_agents=2, max_steps=5)
    return task


def experiment(tmp_path, algorithm, task=None, callbacks=(), models=(SMALL, SMALL), **changes):
    """Two iterations of 20 frames."""
    config = ExperimentConfig.get_from_yaml()
    settings = {
        "share_policy_params": False,
        "lr": 1e-3,
        "max_n_frames": 40,
        "on_policy_collected_frames_per_batch": 20,
        "on_policy_n_envs_per_worker": 4,
        "on_policy_n_minibatch_iters": 2,
        "on_policy_minibatch_size": 10,
        "evaluation_interval": 20,
        "evaluation_episodes": 2,
        "render": False,
        "loggers": ["csv"],
        "save_folder": str(tmp_path),
        **changes,
    }
    for name, value in settings.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return Experiment(
        task=balance() if task is None else task,
        algorithm_config=algorithm,
        model_config=models[0],
        critic_model_config=models[1],
        seed=3,
        config=config,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_an_iteration_is_an_update(config, tmp_path):
    """With the experiment's settings; every network has moved, and BenchMARL has the metrics."""
    twin = Twin()
    run = experiment(tmp_path, config(), callbacks=[twin], max_n_frames=20)
    run.run()
    loss = run.algorithm.updater.loss
    assert same_state(tensors(loss), tensors(twin.updater.loss))
    networks = [name for name, _ in loss.named_parameters()]
    assert networks
    assert all((tensors(loss)[name] != twin.before[name]).any() for name in networks)
    assert (run.algorithm.metrics == twin.metrics).all()


def test_reports_are_written(tmp_path):
    """Each agent's metrics in the csv files, the returns of evaluations there and in the JSON."""
    run = experiment(tmp_path, HappoConfig())
    run.run()
    files = {path.stem: path for path in tmp_path.rglob("*.csv")}
    for name in ("agents_0_kl", "agents_1_kl", "critic_loss"):
        lines = files[f"train_agents_{name}"].read_text().split()
        assert [line.split(",")[0] for line in lines] == ["0", "1"]
    own = run.algorithm.metrics["agents_0", "kl"].item()
    (last,) = files["train_agents_agents_0_kl"].read_text().split()[-1:]
    assert float(last.split(",")[1]) == pytest.approx(own, rel=1e-3)
    assert "eval_reward_episode_reward_mean" in files
    (report,) = tmp_path.rglob("*.json")
    assert '"return"' in report.read_text()


@pytest.mark.parametrize("config", [HappoConfig, HatrpoConfig])
def test_a_checkpoint_is_restored_bit_for_bit(config, tmp_path):
    """Networks, optimisers, generators, the count of updates; and the next update is the same."""
    run = experiment(tmp_path, config(), checkpoint_interval=20)
    run.run()
    (file,) = tmp_path.rglob("checkpoint_40.pt")
    again = Experiment.reload_from_file(str(file), {"max_n_frames": 60})
    one, other = run.algorithm.updater, again.algorithm.updater
    assert one is not other
    assert other.num_updates == 2
    assert same(one.state_dict(), other.state_dict())
    batch = next(iter(again.collector))
    assert (one(batch) == other(batch)).all()
    assert same(one.state_dict(), other.state_dict())
    again.close()


@pytest.mark.parametrize("config", [HappoConfig, HatrpoConfig, A2poConfig])
def test_groups_are_one_team_and_masks_are_kept(config, tmp_path):
    """The world refuses a forbidden action; each group has the metrics of its own agents."""
    twin = Twin()
    task = MaskedTask("MASKED", {})
    run = experiment(tmp_path, config(), task, [twin], max_n_frames=20)
    run.run()
    assert same_state(tensors(run.algorithm.updater.loss), tensors(twin.updater.loss))
    names = [agent.name for agent in run.algorithm.updater.loss.agents]
    assert len(names) == 3
    assert sorted(run.algorithm.metrics.keys()) == sorted([*names, "critic"])
    files = {path.stem for path in tmp_path.rglob("*.csv")}
    assert "train_workers_workers_1_kl" in files
    assert not any(name.startswith("train_boss_workers") for name in files)


@pytest.mark.parametrize(
    ("words", "config", "settings"),
    [
        ("no recurrent and no graph models, got GruConfig", HappoConfig(), {"actor": GruConfig}),
        ("no recurrent and no graph models, got GruConfig", HappoConfig(), {"critic": GruConfig}),
        ("no recurrent and no graph models, got GnnConfig", HatrpoConfig(), {"actor": GnnConfig}),
        ("share_policy_params is True; set it to False", HappoConfig(), {"share": True}),
        ("clip_grad_norm=False bounds", HappoConfig(), {"clip_grad_norm": False}),
    ],
)
def test_what_it_cannot_train_is_refused(words, config, settings, tmp_path):
    """Before anything is collected, in one sentence."""
    models = []
    for name in ("actor", "critic"):
        kind = settings.pop(name, None)
        if kind is GruConfig:
            models.append(GruConfig.get_from_yaml())
        else:
            models.append(SMALL if kind is None else kind("full", False, torch.nn.Module))
    if "share" in settings:
        settings["share_policy_params"] = settings.pop("share")
    with pytest.raises(ValueError, match=words):
        experiment(tmp_path, config, models=models, **settings)


def test_a_group_is_not_left_out(tmp_path):
    """A team without some of its groups would be another team."""
    run = experiment(tmp_path, HappoConfig(), MaskedTask("MASKED", {}))
    del run.train_group_map["boss"]
    with pytest.raises(ValueError, match=r"lacks \['boss'\]"):
        run.run()


@pytest.fixture
def own_store():
    """Keeps names of BenchMARL's command line out of that of the recipe, in this one process."""
    state = Singleton.get_state()
    yield
    Singleton.set_state(state)


@pytest.mark.usefixtures("own_store")
def test_registered_by_name():
    """In the registry, and on the command line with the fields of each configuration."""
    register()
    for config in CONFIGS:
        name = config.__name__.removesuffix("Config").lower()
        assert algorithm_config_registry[name] is config
    with initialize_config_module("benchmarl.conf", version_base=None):
        overrides = ["algorithm=hatrpo", "algorithm.max_kl=0.02", "task=vmas/balance"]
        loaded = load_algorithm_config_from_hydra(compose("config", overrides).algorithm)
    assert loaded == HatrpoConfig(max_kl=0.02)
