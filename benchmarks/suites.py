"""The suites of the learning benchmarks: tasks, algorithms, and settings beyond the recipe's.

``benchmarks/learning.py`` runs them and draws what came out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["SUITES", "Suite"]


@dataclass(frozen=True)
class Suite:
    """Tasks, algorithms and settings beyond the recipe's defaults.

    ``tasks`` maps the name that a task has in the results to the words that select it. The table
    shows evaluations after ``milestones`` environment steps, or the last ones, and beside them the
    ``reference``: what its own code reached, by task, algorithm and milestone, one value a seed.
    Runs of the suites ``beside`` it, on the same tasks, are shown with its own. Tasks with a cost
    have its bound in ``cost_limits``. The ``measure`` is what is shown: ``"return"``, or
    ``"win_rate"`` where episodes can be won.
    """

    tasks: dict[str, list[str]]
    algorithms: dict[str, list[str]]
    overrides: list[str] = field(default_factory=list)
    seeds: tuple[int, ...] = (0, 1, 2)
    milestones: tuple[int, ...] = ()
    reference: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    cost_limits: dict[str, float] = field(default_factory=dict)
    measure: str = "return"


ALGORITHMS = {
    "happo": ["algorithm=happo"],
    "hatrpo": ["algorithm=hatrpo"],
    "mappo": ["algorithm=mappo", "algorithm.share_params=true"],
    "mappo-unshared": ["algorithm=mappo", "algorithm.share_params=false"],
    "ippo": ["algorithm=ippo", "algorithm.share_params=true"],
}
FOLLOWERS = {name: [f"algorithm={name}"] for name in ("haa2c", "a2po", "coppo")}
COMPILED = {
    **ALGORITHMS,
    **{name: [*ALGORITHMS[name], "algorithm.compile=true"] for name in ("happo", "hatrpo")},
}
FOUR = ("happo", "hatrpo", "mappo", "mappo-unshared")
# At a checkpoint the environments begin anew: how often that is belongs to the command of a run.
SELDOM = ["progress=false", "collector.restart_interval=50"]
VMAS = ["total_frames=600000", "render=false", "evaluation.interval=10"]
CHEETAH = "mujoco/halfcheetah_2x3"
SPEAKING = ["task=pettingzoo/simple_reference", "task.continuous_actions=false"]
SUITES = {
    "vmas": Suite(
        tasks={
            f"vmas/{name}": [f"task=vmas/{name}"]
            for name in (
                *("balance", "navigation", "sampling", "wheel", "dispersion"),
                *("give_way", "het_mass", "passage", "joint_passage_size"),
            )
        },
        algorithms=ALGORITHMS,
        overrides=[*VMAS, *SELDOM],
    ),
    "followers": Suite(
        tasks={f"vmas/{name}": [f"task=vmas/{name}"] for name in ("dispersion", "navigation")},
        algorithms={
            **{name: ALGORITHMS[name] for name in ("happo", "hatrpo", "mappo")},
            **FOLLOWERS,
        },
        overrides=[*VMAS, *SELDOM],
        beside=("vmas",),
    ),
    "mujoco": Suite(
        tasks={
            CHEETAH: [f"task={CHEETAH}", "total_frames=2000000"],
            "mujoco/ant_4x2": ["task=mujoco/ant_4x2", "total_frames=1000000"],
            "mujoco/walker2d_2x3": ["task=mujoco/walker2d_2x3", "total_frames=1000000"],
        },
        algorithms={name: COMPILED[name] for name in ("happo", "hatrpo", "mappo-unshared")},
        overrides=SELDOM,
        milestones=(500_000, 1_000_000, 2_000_000),
        # HARL on EnvPool's -v4 tasks, with its tuned settings: means of 40 episodes.
        reference={
            (CHEETAH, "happo", 500_000): [1260, 1070, 1710, 1568, 1299, 1275, 1600, 1499],
            (CHEETAH, "happo", 1_000_000): [2500, 2040, 2360, 2538, 2415, 2403, 2326, 2407],
            (CHEETAH, "happo", 2_000_000): [4150, 4270, 4346, 4402, 3709, 3851, 3933],
            (CHEETAH, "hatrpo", 500_000): [1050, 570, 416],
            (CHEETAH, "hatrpo", 1_000_000): [1650, 1270, 591],
            (CHEETAH, "mappo-unshared", 500_000): [1560],
            (CHEETAH, "mappo-unshared", 1_000_000): [2270],
            ("mujoco/walker2d_2x3", "happo", 500_000): [704, 265],
            ("mujoco/walker2d_2x3", "happo", 1_000_000): [1618, 649],
        },
    ),
    # More and more agents on one robot; MAPPO with one network for all, as in the papers.
    "many_agents": Suite(
        tasks={
            f"mujoco/{name}": [f"task=mujoco/{name}", f"total_frames={frames}"]
            for name, frames in {
                "halfcheetah_2x3": 2_000_000,
                "halfcheetah_6x1": 2_000_000,
                "ant_2x4": 1_000_000,
                "ant_4x2": 1_000_000,
                "ant_8x1": 1_000_000,
            }.items()
        },
        algorithms={name: COMPILED[name] for name in ("happo", "hatrpo", "mappo")},
        overrides=SELDOM,
        milestones=(500_000, 1_000_000, 2_000_000),
    ),
    "transformer": Suite(
        tasks={
            "vmas/passage": ["task=vmas/passage", *VMAS],
            "pettingzoo/simple_spread": ["task=pettingzoo/simple_spread", "total_frames=600000"],
            "mujoco/halfcheetah_6x1": ["task=mujoco/halfcheetah_6x1", "total_frames=2000000"],
        },
        algorithms={
            "happo": ALGORITHMS["happo"],
            **{name: [f"algorithm={name}"] for name in ("mat", "mat_dec", "tppo")},
        },
        overrides=SELDOM,
    ),
    # A cost beside the reward. The fixed penalty is what navigation pays by itself; on the robots,
    # whose reward is about 1 a step for each unit of velocity, it is as much as is gained.
    "safe": Suite(
        tasks={
            "vmas/navigation_collisions": ["task=vmas/navigation_collisions", *VMAS],
            **{
                f"mujoco/{name}": [f"task=mujoco/{name}", "total_frames=1000000"]
                for name in ("halfcheetah_2x3_velocity", "halfcheetah_6x1_velocity")
            },
        },
        algorithms={
            "happo": ["algorithm=happo"],
            "happo-penalty": [
                *("algorithm=happo_lagrangian", "algorithm.multiplier=fixed"),
                "algorithm.initial_multiplier=1",
            ],
            "happo_lagrangian": ["algorithm=happo_lagrangian"],
            "macpo": ["algorithm=macpo"],
        },
        overrides=SELDOM,
        cost_limits={
            "vmas/navigation_collisions": 1.0,
            "mujoco/halfcheetah_2x3_velocity": 25.0,
            "mujoco/halfcheetah_6x1_velocity": 25.0,
        },
    ),
    "mujoco_long": Suite(
        tasks={CHEETAH: [f"task={CHEETAH}", "total_frames=10000000"]},
        algorithms={"happo": COMPILED["happo"]},
        overrides=SELDOM,
        seeds=(0,),
        milestones=(2_000_000, 5_000_000, 10_000_000),
    ),
    "mpe2": Suite(
        tasks={
            f"pettingzoo/{name}{suffix}": [f"task=pettingzoo/{name}", *words]
            for name in ("simple_spread", "simple_reference")
            for suffix, words in (("", []), ("_discrete", ["task.continuous_actions=false"]))
        },
        algorithms={name: COMPILED[name] for name in ("happo", "hatrpo", "mappo", "ippo")},
        overrides=SELDOM,
        milestones=(500_000, 1_000_000),
    ),
    # How far HATRPO may move, where agents have to learn to speak.
    "mpe2_settings": Suite(
        tasks={
            name: [*SPEAKING, *words]
            for name, words in {
                "kl_0.01_damping_0.001": [
                    *("~tuned/task", "algorithm.max_kl=0.01", "algorithm.damping=0.001")
                ],
                "kl_0.03_damping_0.01_torch_init": [
                    *("~tuned/task", "algorithm.max_kl=0.03", "algorithm.damping=0.01"),
                    "model.actor_init=torch",
                ],
                # The task's own settings now (conf/tuned), for four times as long.
                "kl_0.02_batches_of_1000": [
                    "total_frames=4000000",
                    "checkpoint.interval=200",
                    "collector.restart_interval=200",
                ],
            }.items()
        },
        algorithms={"hatrpo": COMPILED["hatrpo"]},
        overrides=SELDOM,
        seeds=(0,),
        milestones=(500_000, 1_000_000, 2_000_000, 4_000_000),
    ),
    "speaker_listener": Suite(
        tasks={
            "pettingzoo/simple_speaker_listener": ["task=pettingzoo/simple_speaker_listener"],
            "pettingzoo/simple_speaker_listener_discrete": [
                *("task=pettingzoo/simple_speaker_listener", "task.continuous_actions=false")
            ],
            # VMAS draws one goal for all its copies: so a batch has six episodes of each, and not
            # every seed is evaluated with the same one.
            "vmas/simple_speaker_listener": [
                *("task=vmas/simple_speaker_listener", "evaluation.seed=${seed}"),
                *("num_envs=20", "steps_per_batch=600", "total_frames=600000"),
            ],
        },
        algorithms={name: ALGORITHMS[name] for name in ("happo", "mappo-unshared", "hatrpo")},
        overrides=[
            "total_frames=100000",
            "evaluation.interval=10",
            "render=false",
            "progress=false",
        ],
    ),
    # Battles of unlike units that die, with masks: the kind of task of the papers' other domain.
    "smax": Suite(
        tasks={f"smax/{name}": [f"task=smax/{name}"] for name in ("2s3z", "smacv2_10_units")},
        algorithms={name: ALGORITHMS[name] for name in FOUR},
        overrides=SELDOM,
        milestones=(500_000, 1_000_000),
        measure="win_rate",
    ),
    # Masks, a sparse reward, and lasers that only the agent of their colour stops.
    "lle": Suite(
        tasks={f"lle/{name}": [f"task=lle/{name}"] for name in ("level_6",)},
        algorithms={name: ALGORITHMS[name] for name in FOUR},
        overrides=SELDOM,
        milestones=(250_000, 500_000),
    ),
}
