"""The study's arms and jobs: what is compared, in which setting. STUDY.md describes it."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smoke.train_arm import LOSSES

RESULTS = Path(__file__).resolve().parent / "results" / "study"
SEEDS = (1, 2, 3, 4, 5)
FEW = SEEDS[:3]

# The first part's setting, one for all arms.
HORIZON, BATCH, UPDATES, EVERY, ETA = 20, 16, 48, 12, 2
RATES = {"opd": 1.6e-3, "f2b": 8e-4, "b2f": 4e-4}  # of Adam: each arm's best of three on another seed and other games
RESPONSE_LEN, CONTEXT_LEN = 32, 1024
KEPT = "kept"  # in a job's working folder: weights that another job begins with
SETTINGS: dict[str, Any] = {
    "tcod_horizon": HORIZON,
    "tcod_environment": ".env_alfworld.AlfworldEnvironment",
    "tcod_data_root": "$SMOKE_GAMES",
    "tcod_admissible": "never",
    "tcod_env_workers": 2,
    "tcod_envs_per_worker": 16,
    "tcod_eval_kl": True,
}
PLACES = ("tcod_environment", "tcod_data_root")  # of code and games: a result stays good when they move
# Settings that the first results do not name, or not so.
OF_OLD = {"loss": "trajectory", "context_len": CONTEXT_LEN, "samples": 1, "teacher": True, "after": None, "keep": 0}
OF_OLD |= {"tcod_envs_per_worker": SETTINGS["tcod_envs_per_worker"]}

# The second part: longer episodes, a student that is weak everywhere, and smaller evaluations.
LONG_HORIZON, LONG_CONTEXT_LEN = 30, 1536
LONG_UPDATES, LONG_EVERY, LONG_K_START, LONG_ETA = 30, 15, 6, 1
LONG_RATE = 6.4e-3  # four times OPD's in the first part, and as high for every arm
CALM_RATE = 1.6e-3  # OPD's in the first part

# The third part: short runs of a student that wins now and then.
BASE_UPDATES, HALF, GROUP = 10, 5, 4
BASE_RATES = {"opd": RATES["opd"], "sft": 1.6e-3, "grpo": 1.6e-3}

# The fourth part: a student that is its teacher, which reads a note that the student never sees.
NOTE_UPDATES, NOTE_RATE, NOTE_LEN = 30, 1.6e-3, 2048
TURNS_TO_WIN = (8, 12, HORIZON)

GAMES = {"report": (100, 32), "losses": (48, 16), "baselines": (48, 8)}  # held-out games, those at temperature 1
NOTE_GAMES = {"notes": (100, 8), "notes-of-others": (100, 8)}  # the planner's demonstrations, and those of other games
STUDENTS = {  # as the results have it
    "late": "4 turns, 300 steps",
    "weak": "40 steps on random actions",
    "damaged": "8 steps on random actions",
    "teacher": "the teacher",
    "reader": "the teacher that reads notes",
}


@dataclass(frozen=True)
class Arm:
    """What the jobs of an arm do differently from others. `family`: the arm whose learning rate they have."""

    family: str
    settings: dict[str, Any]
    batch: int = BATCH  # episodes
    samples: int = 1  # of them of a task
    updates: int = UPDATES
    every: int = EVERY  # updates between evaluations
    control: str | None = None  # see study_arm.py
    student: str = "late"  # of STUDENTS
    loss: str = "trajectory"
    context_len: int = CONTEXT_LEN
    teacher: bool | str = True  # False: none; "reader": the one that reads notes; "self": the student
    keep: int = 0  # after so many updates the weights are kept for another arm
    after: str | None = None  # the arm whose kept weights it begins with
    games: str = ""  # of GAMES and NOTE_GAMES, where they are not its part's
    evaluate_first: bool = True  # a seed's arms have one student: behind the first part one of them is enough
    seeds: tuple[int, ...] = SEEDS


def curriculum(variant: str, eta: int = ETA, k_start: int = 1, **more: Any) -> dict[str, Any]:
    return {"tcod_variant": variant, "tcod_k_start": k_start, "tcod_eta": eta, **more}


OPD = {"tcod_variant": "opd"}
MAIN = {"opd": Arm("opd", OPD), "f2b": Arm("f2b", curriculum("f2b")), "b2f": Arm("b2f", curriculum("b2f"))}
CHECKS = {
    "teacher": Arm("opd", OPD, updates=1, student="teacher", seeds=SEEDS[:1]),
    "shuffled": Arm("opd", OPD, control="shuffled", seeds=SEEDS[:1]),
}
EQUAL_RATE = {"opd-f2b-rate": Arm("f2b", OPD), "b2f-f2b-rate": Arm("f2b", curriculum("b2f"))}
CONTROLS = {
    # The first two take about as many environment steps as F2B does.
    "opd-batch-11": Arm("opd", OPD, batch=11, seeds=FEW),
    "fixed-horizon-10": Arm("f2b", curriculum("f2b", k_start=10, eta=10**6), seeds=FEW),
    "random-horizon": Arm("f2b", curriculum("f2b"), control="random-horizon", seeds=FEW),
}
SENSITIVITY = {
    **{
        f"{name}-eta-{eta}": Arm(name, curriculum(name, eta), seeds=FEW)
        for eta in (1, 4, 6)
        for name in ("f2b", "b2f")
    },
    "b2f-to-the-horizon": Arm("b2f", curriculum("b2f", tcod_b2f_budget="horizon"), seeds=FEW),
}


def long_arm(loss: str, settings: dict[str, Any]) -> Arm:
    """An arm of the second part."""
    return Arm(
        family=settings["tcod_variant"],
        settings={**settings, "tcod_horizon": LONG_HORIZON},
        updates=LONG_UPDATES,
        every=LONG_EVERY,
        student="weak",
        loss=loss,
        context_len=LONG_CONTEXT_LEN,
        evaluate_first=(settings["tcod_variant"], loss) == ("opd", "token"),
    )


LONG = {
    "opd": OPD,
    "f2b": curriculum("f2b", LONG_ETA, LONG_K_START),
    "b2f": curriculum("b2f", LONG_ETA, LONG_K_START),
}
LOSS_GRID = {f"{name}-{loss}": long_arm(loss, settings) for loss in LOSSES for name, settings in LONG.items()}
CALM = {
    f"{name}-token-calm": replace(long_arm("token", settings), evaluate_first=False)
    for name, settings in {**LONG, "reopd": {"tcod_variant": "reopd"}}.items()
}


def base_arm(family: str, settings: dict[str, Any], **more: Any) -> Arm:
    """An arm of the third part."""
    run = {"student": "damaged", "samples": GROUP, "updates": BASE_UPDATES, "every": HALF, "evaluate_first": False}
    return Arm(family, settings, **{**run, **more})


REWARD = {**OPD, "tcod_reward_coef": 1.0}
ALONE = {**REWARD, "tcod_eval_kl": False, "tcod_max_replacements": 50}  # half of all groups teach nothing
IMITATION = {"tcod_variant": "sft", "tcod_eval_kl": False}
BASELINES = {
    "sft": base_arm("sft", IMITATION, samples=1, updates=5, keep=5, loss="token"),
    "opd": base_arm("opd", OPD, keep=HALF, evaluate_first=True),
    "sft-then-opd": base_arm("opd", OPD, after="sft"),
    "opd-and-reward": base_arm("opd", REWARD),
    # An update takes about twice as many steps of the environment.
    "grpo": base_arm("grpo", ALONE, teacher=False, updates=HALF),
    "opd-then-grpo": base_arm("grpo", ALONE, teacher=False, updates=3, after="opd"),
}


def note_arm(*sees: str, teacher: str = "reader", settings: dict[str, Any] = OPD, **more: Any) -> Arm:
    """An arm of the fourth part. All episodes are saved: success within fewer turns is read off them."""
    shown = {"tcod_teacher_sees": list(sees), "tcod_note_len": NOTE_LEN} if sees else {}
    settings = {"tcod_environment": "smoke.noted_alfworld.NotedAlfworld", **settings, **shown, "tcod_eval_kl": False}
    settings["tcod_save_episodes"] = NOTE_GAMES["notes"][0] // 2  # of an evaluation twice as many
    run = {"student": "reader", "updates": NOTE_UPDATES, "every": NOTE_UPDATES, "evaluate_first": False}
    return Arm("note", settings, teacher=teacher, **{**run, **more})


SEEN = {**OPD, "tcod_environment": "smoke.noted_alfworld.SeenAlfworld"}
NOTES = {
    "demo": note_arm("demo", evaluate_first=True),
    "hindsight": note_arm("hindsight"),
    "both": note_arm("demo", "hindsight"),
    "another-demo": note_arm("demo", games="notes-of-others"),
    "demo-if-seen": note_arm("demo", "hindsight", settings=SEEN),
    "self-demo": note_arm("demo", teacher="self"),
    "f2b-both": note_arm("demo", "hindsight", settings=curriculum("f2b", eta=1, k_start=4)),
    "strong": note_arm(teacher=True),
    "b2f-strong": note_arm(teacher=True, settings=curriculum("b2f")),
    "sft": note_arm(teacher=False, settings=IMITATION, loss="token"),
}


@dataclass(frozen=True)
class Job:
    """One training run. Its settings stand in its result, and a result of other settings is refused."""

    name: str
    arm_name: str
    arm: Arm
    seed: int
    rate: float
    games: str  # of GAMES
    folder: Path  # of the result

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def first(self) -> str | None:
        """The job whose kept weights this one begins with."""
        return self.arm.after and f"{self.arm.after}-{self.seed}"

    @property
    def waits(self) -> bool:
        """Whether that job has no result yet."""
        return bool(self.first) and not (self.folder / f"{self.first}.json").exists()

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's settings, as the arm's YAML has them."""
        return {**SETTINGS, **self.arm.settings}

    @property
    def settings(self) -> dict[str, Any]:
        arm = self.arm
        run = {"seed": self.seed, "lr": self.rate, "batch": arm.batch, "updates": arm.updates, "games": self.games}
        run |= {"student": STUDENTS[arm.student], "control": arm.control, "loss": arm.loss}
        run |= {"context_len": arm.context_len, "samples": arm.samples, "teacher": arm.teacher, "after": arm.after}
        return {**run, "keep": arm.keep, **self.recipe}

    def done(self) -> bool:
        """Whether the result is there. Raises SystemExit when it was made with other settings."""
        if not self.path.exists():
            return False
        saved = {**OF_OLD, **json.loads(self.path.read_text())["settings"]}
        if any(saved.get(key) != value for key, value in self.settings.items() if key not in PLACES):
            sys.exit(f"{self.path} was made with other settings than the study has now: move it away")
        return True


def curriculum_jobs() -> list[Job]:
    """The first part, the main comparison first, and all arms of a seed before the next seed."""
    return [
        Job(f"{name}-{seed}", name, arm, seed, RATES[arm.family], "report", RESULTS)
        for group in (MAIN, CHECKS, EQUAL_RATE, CONTROLS, SENSITIVITY)
        for seed in SEEDS
        for name, arm in group.items()
        if seed in arm.seeds
    ]


def loss_jobs() -> list[Job]:
    """The second part, all arms of a seed before the next seed."""
    return [
        Job(f"{name}-{seed}", name, arm, seed, rate, "losses", RESULTS / "losses")
        for seed in SEEDS
        for arms, rate in ((LOSS_GRID, LONG_RATE), (CALM, CALM_RATE))
        for name, arm in arms.items()
    ]


def note_jobs() -> list[Job]:
    """The fourth part, all arms of a seed before the next seed."""
    return [
        Job(f"{name}-{seed}", name, arm, seed, NOTE_RATE, arm.games or "notes", RESULTS / "notes")
        for seed in SEEDS
        for name, arm in NOTES.items()
    ]


def baseline_jobs() -> list[Job]:
    """The third part, all arms of a seed before the next seed."""
    return [
        Job(f"{name}-{seed}", name, arm, seed, BASE_RATES[arm.family], "baselines", RESULTS / "baselines")
        for seed in SEEDS
        for name, arm in BASELINES.items()
    ]
