"""The recipe trains environments and networks of a user's own, and agents walk out of it."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import own_world
import pytest
import torch
from recipe_helpers import table, tiny_config
from torchrl.envs.utils import ExplorationType, set_exploration_type
from wrong_calls import same

from torchrl_happo import train as script
from torchrl_happo.recipe import checkpoint, load, train, training
from torchrl_happo.recipe.config import ConfigError
from torchrl_happo.recipe.export import export_agent
from torchrl_happo.recipe.trained import draw

SMALL = (
    *("num_envs=4", "steps_per_batch=6", "total_frames=48", "model.num_cells=8"),
    *("algorithm.minibatch_size=12", "algorithm.num_epochs=1", "evaluation.episodes=3"),
    *("evaluation.interval=0", "collector.restart_interval=0", "progress=false", "render=false"),
)
CUSTOM = ("task=custom", "task.make_env=own_world:make_env")
CORRIDOR = ("task=custom", "task.make_env=own_world:make_one", "task.max_steps=5")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Leaves the report out, and Hydra's logging as it was."""
    monkeypatch.setattr(training, "write_report", lambda config, folder: None)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    own_world.BUILT.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs a command line in a folder of its own; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr("sys.argv", ["torchrl-happo", *words])
        try:
            return script.main()
        except SystemExit as ended:
            return ended.code

    return call


def learned(folder):
    return checkpoint.read(folder)["updater"], table(folder / "metrics.csv")


@pytest.mark.parametrize("algorithm", ["happo", "hatrpo", "mappo"])
@pytest.mark.parametrize("custom", [CUSTOM, CORRIDOR], ids=["batched", "one copy"])
def test_an_environment_of_ones_own_trains_and_resumes(tmp_path, custom, algorithm):
    """By its name, batched or one at a time; a resumed run ends as the one that was not stopped."""
    words = [
        *SMALL,
        *custom,
        f"algorithm={algorithm}",
        "collector.restart_interval=1",
    ]
    whole = train(config=words, folder=tmp_path / "whole")
    assert own_world.BUILT
    middle = whole / "checkpoints" / "00000001.pt"
    assert same(learned(train(config=[f"resume={middle}"], folder=tmp_path / "b")), learned(whole))


def test_functions_of_ones_own(tmp_path):
    """What is passed is used, networks too; a function without a name is asked for again."""
    made = []

    def make_env(num_envs, device, bonus=0.0):
        made.append(bonus)
        return own_world.make_env(num_envs, device)

    folder = train(
        make_env=make_env,
        make_actor=own_world.small_actor,
        make_critic=own_world.small_critic,
        config=SMALL,
        folder=tmp_path / "run",
        task={"bonus": 0.5},
    )
    assert set(made) == {0.5}
    assert {"actor", "critic"} <= {name for name in own_world.BUILT if isinstance(name, str)}
    with pytest.raises(ConfigError, match=r"cannot be imported .*pass the function itself"):
        load(folder)
    team = load(folder, make_env=make_env)
    assert team.config.model.make_actor == "own_world:small_actor"
    assert [p.shape[-1] for p in team.agents["agents_0"].parameters()].count(4) == 2
    assert len(team.env.rollout(1, team.policy)) == 1


def test_overrides_by_name(tmp_path):
    """Python values, and parts as dicts, are what they are on the command line."""
    folder = train(
        config=SMALL,
        folder=tmp_path,
        task="vmas/wheel",
        algorithm={"name": "hatrpo", "max_kl": 0.02, "value_norm": None},
        seed=3,
    )
    config = checkpoint.read_config(checkpoint.read(folder))
    assert (config.task.name, config.algorithm.name, config.seed) == ("vmas/wheel", "hatrpo", 3)
    assert (config.algorithm.max_kl, config.algorithm.value_norm) == (0.02, None)
    with pytest.raises(TypeError, match="whole configuration and overrides"):
        train(config=config, seed=4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["task.make_env=own_world:no_env"],
            r"returned None; write it as make_env\(num_envs, device\)",
        ),
        ([*CUSTOM, "model.make_actor=own_world:no_network"], "model.make_actor returned int"),
        ([*CUSTOM, "task.colour=red"], "no option 'task.colour'; there are: task.bonus, task.max"),
        ([*CUSTOM, "algorithm=ippo", "critic.make_critic=own_world:small_critic"], "leave it out"),
    ],
)
def test_what_a_function_returns_is_checked(tmp_path, words, sentence):
    """One sentence names the option and what is wanted."""
    with pytest.raises(ConfigError, match=sentence):
        train(config=[*SMALL, "task=custom", *words], folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_yaml_of_ones_own(call, tmp_path):
    """``--config-dir`` adds a task; a sweep, too, finds what it names."""
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "mine.yaml").write_text(
        "defaults: [custom, _self_]\nname: mine\nmake_env: own_world:make_env\n"
        "settings: {bonus: 0.25}\n"
    )
    own = (f"--config-dir={tmp_path / 'conf'}", "task=mine", *SMALL)
    assert call(*own) == 0
    assert {bonus for _, bonus in own_world.BUILT} == {0.25}
    assert len(list(tmp_path.glob("outputs/mine/happo/*/metrics.csv"))) == 1
    assert call("-m", *own, "seed=0,1", "task.bonus=0.5") == 0
    assert len(list(tmp_path.glob("multirun/mine/happo/*/seed_*/metrics.csv"))) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_workers_build_the_environment_of_ones_own(tmp_path):
    """They find it by its name, in processes of their own."""
    words = [*SMALL, *CUSTOM, "collector=multi"]
    assert len(table(train(config=words, folder=tmp_path) / "metrics.csv")) == 2


class TestWordsOfTheCommandLine:
    """What people write works, or gets a cure."""

    def test_short_numbers(self):
        """Thousands, millions and powers of ten are whole numbers; one layer is a list."""
        config = tiny_config("total_frames=1e6", "num_envs=1k", "model.num_cells=16", "+seed=2")
        assert (config.total_frames, config.num_envs, config.seed) == (1_000_000, 1000, 2)
        assert config.model.num_cells == [16]

    @pytest.mark.parametrize("words", [["algorithm=nope"], ["critic.input=state"], ["seed=-1"]])
    def test_a_refused_run_leaves_no_folder(self, call, tmp_path, capsys, words):
        """Whether Hydra, the schema or the task refuses it."""
        assert call(*SMALL, *words) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_frames_that_are_rounded_up_are_said(self, tmp_path, caplog):
        """The last batch is never cut."""
        with caplog.at_level(logging.INFO):
            train(config=[*SMALL, "total_frames=30"], folder=tmp_path)
        assert "total_frames=30 is rounded up to 48: 2 batches of 24 frames." in caplog.messages

    def test_help_and_version_need_no_torch(self):
        """They are there at once, and every option is explained."""
        code = "import sys; from torchrl_happo import train; train.main(); "
        code += "print('torch' in sys.modules)"
        for word, said in (("--help", "algorithm.max_kl"), ("--version", "torchrl_happo ")):
            done = subprocess.run(
                [sys.executable, "-c", code, word], capture_output=True, text=True, check=True
            )
            assert said in done.stdout
            assert "schema" not in done.stdout
            assert done.stdout.endswith("False\n")

    def test_a_base_install_gets_one_sentence(self, call, monkeypatch, capsys):
        """It says what to install."""
        monkeypatch.setattr(script, "find_spec", lambda name: None if name == "hydra" else name)
        assert call("task=vmas/balance") == 2
        said = capsys.readouterr().err
        assert said == "torchrl-happo needs hydra: pip install 'torchrl_happo[train]'.\n"


class TestAgents:
    """One by one, away from the team."""

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory):
        """Finds the folder of a run with some settings, trained once."""
        folders = {}

        def find(*words):
            if words not in folders:
                folder = tmp_path_factory.mktemp("run")
                folders[words] = train(config=[*SMALL, "task.max_steps=4", *words], folder=folder)
            return folders[words]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "write_report", lambda config, folder: None)
            yield find

    @pytest.mark.parametrize(
        "words",
        [
            (),
            ("task.continuous_actions=false", "algorithm=hatrpo"),
            ("model=gru", "model.hidden_size=5"),
            ("model=lstm", "model.hidden_size=5", "critic.model=gru"),
            ("algorithm=mappo",),
            ("task=vmas/simple_speaker_listener", "algorithm=ippo"),
        ],
        ids=["happo", "discrete", "gru", "lstm", "shared", "groups"],
    )
    def test_an_agent_alone_acts_as_in_the_team(self, trained, words):
        """For three steps of two environments, hidden states included."""
        team = load(trained(*words), num_envs=2)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            batch = team.env.rollout(3, team.policy, break_when_any_done=False)
        for name, agent in team.agents.items():
            group, _, index = name.rpartition("_")
            in_group = group if index.isdigit() else name
            row = int(index) if index.isdigit() else 0
            entries = batch[in_group][..., row] if batch[in_group].ndim > 2 else batch[in_group]
            for step in range(3):
                inputs = [entries[:, step][key] for key in agent.in_names]
                with torch.no_grad():
                    action, *states = agent(*inputs)
                torch.testing.assert_close(action, entries[:, step]["action"])
                for state, key in zip(states, agent.out_names[1:], strict=True):
                    if step < 2:
                        after = entries[:, step + 1][key.removeprefix("next_")]
                        torch.testing.assert_close(state, after)

    def test_the_weights_are_its_own(self, trained, tmp_path):
        """A file of one agent holds half of two, and changing the agent changes nobody."""
        team = load(trained())
        one = team.agents["agents_1"]
        size = sum(p.numel() for p in one.parameters())
        assert 2 * size == sum(p.numel() for p in team.policy.parameters())
        path = export_agent(one, tmp_path / "one.pt")
        stored = torch.load(path, weights_only=True)
        assert sum(w.untyped_storage().nbytes() for w in stored.values()) == 4 * size
        before = [p.detach().clone() for p in team.policy.parameters()]
        for parameter in one.parameters():
            parameter.data.zero_()
        assert all(map(torch.equal, before, team.policy.parameters()))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "words", [(), ("model=gru", "model.hidden_size=5")], ids=["mlp", "gru"]
    )
    def test_export(self, trained, call, tmp_path, words):
        """ONNX and ``torch.export`` give the actor's actions, for any number of environments."""
        onnxruntime = pytest.importorskip("onnxruntime")
        folder = trained(*words)
        for kind in ("onnx", "pt2"):
            code = call("export", f"run={folder}", f"format={kind}", "agent=agents_1")
            assert code == 0
        agent = load(folder).agents["agents_1"]
        inputs = [torch.rand(5, *value.shape[1:]) for value in agent.example]
        with torch.no_grad():
            expected = agent(*inputs)
        program = torch.export.load(folder / "export" / "agents_1.pt2").module()
        session = onnxruntime.InferenceSession(folder / "export" / "agents_1.onnx")
        feed = {name: value.numpy() for name, value in zip(agent.in_names, inputs, strict=True)}
        got = session.run(agent.out_names, feed)
        for own, exported, ran in zip(expected, program(*inputs), got, strict=True):
            torch.testing.assert_close(exported, own)
            torch.testing.assert_close(torch.from_numpy(ran), own, rtol=1e-5, atol=1e-6)

    def test_evaluate(self, trained, call, capsys):
        """Any number of episodes, deterministic or not; the run's own seed gives its own return."""
        folder = trained()
        assert call("evaluate", f"run={folder}", "episodes=3") == 0
        last = float(table(folder / "evaluation.csv")[-1]["return"])
        said = capsys.readouterr().out
        assert float(said.split()[1]) == pytest.approx(last, rel=1e-3)
        assert "(3 episodes of 4 steps" in said
        assert call("evaluate", f"run={folder}", "episodes=3", "deterministic=false") == 0
        assert float(capsys.readouterr().out.split()[1]) != pytest.approx(last, rel=1e-3)

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["evaluate"], "Say whose agents: torchrl-happo evaluate run=FOLDER."),
            (["evaluate", "run=nowhere"], "There is no checkpoint or run folder at nowhere."),
            (["evaluate", "run=x", "episodes=few"], "episodes is 'few', but must be of type int."),
            (["evaluate", "run=x", "episode=3"], "There is no option 'episode'; near: episodes."),
            (["export", "run=x", "onnx"], "'onnx' is not an option of export: write KEY=VALUE."),
            (["export", "run=x", "format=tf"], "must be one of onnx, pt2, weights."),
            (["export", "run=RUN", "agent=agents_9"], "There is no agent 'agents_9'; near: agents"),
        ],
    )
    def test_mistakes_get_one_sentence(self, trained, call, capsys, words, sentence):
        """Exit code 2, no traceback."""
        words = [word.replace("RUN", str(trained())) for word in words]
        assert call(*words) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1


def test_an_animation_keeps_the_colours_of_small_agents():
    """Two small agents of unlike colours on a ground of many greys, as VMAS draws its grid."""
    greys = np.random.default_rng(0).integers(150, 256, (420, 420, 1), np.uint8)
    picture = np.repeat(greys, 3, -1)
    picture[100:106, 100:106], picture[200:206, 200:206] = (64, 191, 64), (64, 64, 191)
    drawn = draw(SimpleNamespace(render=lambda mode: picture)).convert("RGB")
    green, blue = (drawn.getpixel((place, place)) for place in (103, 203))
    assert green[1] > green[2] + 90
    assert blue[2] > blue[1] + 90
