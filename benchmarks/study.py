"""OPD, F2B and B2F compared: the same students, teacher, games, batch and number of updates, several seeds per arm.

    bash benchmarks/run.sh study                 # the curricula: every job that has no result yet, then the report
    bash benchmarks/run.sh study --tune          # their learning rates, on seeds and games of their own
    bash benchmarks/run.sh study --losses        # the second part: what the loss is a mean over, and the curricula
    bash benchmarks/run.sh study --pilot         # what its setting was chosen by, on a seed and games of its own
    bash benchmarks/run.sh study --report        # figure and tables of benchmarks/STUDY.md from results/study/*.json

A job is one arm and one seed. It goes through the smoke run's train_arm.py, so through the recipe's hooks, the real
SGLang and the real ALFWorld engine. Its result is a JSON file that appears when the job has ended, so the command may
be killed at any point and started again: no finished job is repeated. STUDY.md describes the setting.
"""

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import SLIME, report, study_losses, study_pages, study_report
from examples.tcod.model.chat_tokens import ChatTokens
from examples.tcod.tools.plot_runs import read_run
from smoke import hooks, make_games, make_models
from smoke.expert import Step
from smoke.servers import DEVICE, Process, SGLangServer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "study"

# The setting, one for all arms.
HORIZON, BATCH, UPDATES, EVERY = 20, 16, 48, 12
ETA = 2
RATES = {"opd": 1.6e-3, "f2b": 8e-4, "b2f": 4e-4}  # of Adam, out of TUNING_RATES
SETTINGS: dict[str, Any] = {
    "tcod_horizon": HORIZON,
    "tcod_environment": ".env_alfworld.AlfworldEnvironment",
    "tcod_data_root": "$SMOKE_GAMES",
    "tcod_admissible": "never",
    "tcod_env_workers": 2,
    "tcod_engines_per_worker": 16,
    "tcod_eval_kl": True,
}
PLACES = ("tcod_environment", "tcod_data_root")  # of code and games: a result stays good when they move
RESPONSE_LEN, CONTEXT_LEN = 32, 1024
OF_OLD = {"loss": "trajectory", "context_len": CONTEXT_LEN}  # settings that the first results do not name
SEEDS = (1, 2, 3, 4, 5)
TRAIN_GAMES, HELDOUT_GAMES = 128, 100
KL_GAMES = 32  # of the held-out ones, for the evaluation at temperature 1

# The second part: longer episodes, a student that is weak everywhere, and smaller evaluations.
LONG_HORIZON, LONG_CONTEXT_LEN = 30, 1536
LONG_UPDATES, LONG_EVERY, LONG_K_START, LONG_ETA = 30, 15, 6, 1
LONG_HELDOUT_GAMES, LONG_KL_GAMES = 48, 16
LONG_RATE = 6.4e-3  # four times OPD's in the first part, and as high for every arm
CALM_RATE = 1.6e-3  # OPD's in the first part
PILOT_SEED = 101
PILOT = ("opd-trajectory", "opd-token")

# What the settings were chosen on: another student, other training games, other held-out games.
# A tuning run is shorter, and its curriculum passes twice as fast.
TUNING_SEEDS, TUNING_RATES = (101,), (4e-4, 8e-4, 1.6e-3)
TUNING_UPDATES, TUNING_ETA, TUNING_HELDOUT_GAMES = 30, 1, 64

# The late student: the teacher, trained on with the first turns of the scripted searcher until it has lost the later
# ones. The weak one: the teacher after training steps on random actions.
STUDENT_TURNS, STUDENT_STEPS, STUDENT_RATE = 4, 300, 3e-3
STUDENT_GAMES = 80  # seeds of games that neither the teacher nor any arm has seen, PLAYS demonstrations of each
WEAK_STEPS, WEAK_RATE = 40, 1e-3
STUDENTS = {  # as the results have it
    "late": f"{STUDENT_TURNS} turns, {STUDENT_STEPS} steps",
    "weak": f"{WEAK_STEPS} steps on random actions",
    "teacher": "the teacher",
}

# Folder of rows: (half of the training games that it has, held-out games, how many of them at temperature 1).
GAMES = {
    "report": ("report", HELDOUT_GAMES, KL_GAMES),
    "tuning": ("tuning", TUNING_HELDOUT_GAMES, KL_GAMES),
    "losses": ("report", LONG_HELDOUT_GAMES, LONG_KL_GAMES),
    "pilot": ("tuning", LONG_HELDOUT_GAMES, LONG_KL_GAMES),
}


@dataclass(frozen=True)
class Arm:
    """What the jobs of an arm do differently from others. `family`: the arm whose learning rate they have."""

    family: str
    settings: dict[str, Any]
    batch: int = BATCH
    updates: int = UPDATES
    every: int = EVERY  # updates between evaluations
    control: str | None = None  # see study_arm.py
    student: str = "late"  # of STUDENTS
    loss: str = "trajectory"
    context_len: int = CONTEXT_LEN
    evaluate_first: bool = True  # a seed's arms have one student: in the second part one of them is enough
    seeds: tuple[int, ...] = SEEDS


def curriculum(variant: str, eta: int = ETA, k_start: int = 1, **more: Any) -> dict[str, Any]:
    return {"tcod_variant": variant, "tcod_k_start": k_start, "tcod_eta": eta, **more}


OPD = {"tcod_variant": "opd"}
MAIN = {"opd": Arm("opd", OPD), "f2b": Arm("f2b", curriculum("f2b")), "b2f": Arm("b2f", curriculum("b2f"))}
TUNING = {
    name: Arm(name, settings, updates=TUNING_UPDATES, every=TUNING_UPDATES)
    for name, settings in (
        ("opd", OPD),
        ("f2b", curriculum("f2b", TUNING_ETA)),
        ("b2f", curriculum("b2f", TUNING_ETA)),
    )
}
CHECKS = {
    "teacher": Arm("opd", OPD, updates=1, student="teacher", seeds=SEEDS[:1]),
    "shuffled": Arm("opd", OPD, control="shuffled", seeds=SEEDS[:1]),
}
EQUAL_RATE = {"opd-f2b-rate": Arm("f2b", OPD), "b2f-f2b-rate": Arm("f2b", curriculum("b2f"))}
FEW = SEEDS[:3]
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


def long_arm(loss: str, settings: dict[str, Any], **more: Any) -> Arm:
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
        **more,
    )


LONG = {
    "opd": OPD,
    "f2b": curriculum("f2b", LONG_ETA, LONG_K_START),
    "b2f": curriculum("b2f", LONG_ETA, LONG_K_START),
}
LOSS_GRID = {
    f"{name}-{loss}": long_arm(loss, settings) for loss in study_losses.LOSSES for name, settings in LONG.items()
}
DEPTH = {  # other ways to choose how long the student plays
    "f2b-kl-token": long_arm("token", curriculum("f2b", LONG_ETA, LONG_K_START, tcod_schedule="kl")),
    "reopd-token": long_arm("token", {"tcod_variant": "reopd"}),
}
CALM = {
    f"{name}-calm": replace(arm, evaluate_first=False)
    for name, arm in (LOSS_GRID | DEPTH).items()
    if name in ("opd-token", "f2b-token", "b2f-token", "reopd-token")
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
    def recipe(self) -> dict[str, Any]:
        """The recipe's settings, as the arm's YAML has them."""
        return {**SETTINGS, **self.arm.settings}

    @property
    def settings(self) -> dict[str, Any]:
        arm = self.arm
        run = {"seed": self.seed, "lr": self.rate, "batch": arm.batch, "updates": arm.updates, "games": self.games}
        run |= {"student": STUDENTS[arm.student], "control": arm.control, "loss": arm.loss}
        return {**run, "context_len": arm.context_len, **self.recipe}

    def done(self) -> bool:
        """Whether the result is there. Raises SystemExit when it was made with other settings."""
        if not self.path.exists():
            return False
        saved = {**OF_OLD, **json.loads(self.path.read_text())["settings"]}
        if but_places(saved) != but_places(self.settings):
            sys.exit(f"{self.path} was made with other settings than the study has now: move it away")
        return True


def but_places(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in PLACES}


def study_jobs() -> list[Job]:
    """All jobs, the main comparison first, and all arms of a seed before the next seed."""
    return [
        Job(f"{name}-{seed}", name, arm, seed, RATES[arm.family], "report", RESULTS)
        for group in (MAIN, CHECKS, EQUAL_RATE, CONTROLS, SENSITIVITY)
        for seed in SEEDS
        for name, arm in group.items()
        if seed in arm.seeds
    ]


def tuning_jobs() -> list[Job]:
    """The same effort for each arm: all rates."""
    return [
        Job(f"{name}-{rate:g}-{seed}", name, arm, seed, rate, "tuning", RESULTS / "tuning")
        for seed in TUNING_SEEDS
        for rate in TUNING_RATES
        for name, arm in TUNING.items()
    ]


def loss_jobs() -> list[Job]:
    """The second part, all arms of a seed before the next seed."""
    return [
        Job(f"{name}-{seed}", name, arm, seed, rate, "losses", RESULTS / "losses")
        for seed in SEEDS
        for arms, rate in ((LOSS_GRID, LONG_RATE), (CALM, CALM_RATE), (DEPTH, LONG_RATE))
        for name, arm in arms.items()
    ]


def pilot_jobs() -> list[Job]:
    folder = RESULTS / "pilot"
    return [
        Job(f"{name}-{LONG_RATE:g}-{PILOT_SEED}", name, LOSS_GRID[name], PILOT_SEED, LONG_RATE, "pilot", folder)
        for name in PILOT
    ]


# ------------------------------------------------------------------------------------------- games and students


def make_data(out: Path, teacher: SGLangServer) -> None:
    """Games and demonstrations in the folders of GAMES: train.jsonl, heldout.jsonl and heldout_kl.jsonl.

    No game is in two of them but for the held-out ones of one half. A training game, for every arm, is one that the
    teacher solved in a single episode, which is its demonstration.
    """
    if all((out / name).exists() for name in GAMES):
        return
    games = out / "games"
    make_games.make_games(games, 2 * TRAIN_GAMES, HELDOUT_GAMES + TUNING_HELDOUT_GAMES)
    config = out / "demonstrations.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, **OPD}))
    command = [sys.executable, "-m", "examples.tcod.tools.collect_demos", "--out", str(out / "demos.jsonl")]
    command += ["--rows", str(games / "train.jsonl"), "--url", teacher.url, "--model", str(make_models.SHIPPED)]
    command += ["--samples", "1", "--max-turn-len", str(RESPONSE_LEN), "--max-context-len", str(CONTEXT_LEN)]
    command += ["--config", str(config), "--concurrency", "32"]
    with Process("demonstrations", command, out / "logs" / "demonstrations.log", child_environment(out)) as process:
        process.popen.wait()
        process.check()
    # The first half of the games is the report's, the other the tuning's.
    number = {json.loads(line)["metadata"]["game_file"]: i for i, line in enumerate(read_lines(games / "train.jsonl"))}
    train: dict[str, list[str]] = {"report": [], "tuning": []}
    for line in read_lines(out / "demos.jsonl"):
        metadata = json.loads(line)["metadata"]
        if metadata["demo"]["actions"]:
            train["report" if number[metadata["game_file"]] < TRAIN_GAMES else "tuning"].append(line)
    heldout = read_lines(games / "heldout.jsonl")
    rows = {"report": heldout[:HELDOUT_GAMES], "tuning": heldout[HELDOUT_GAMES:]}
    for name, (half, games_at_04, games_at_1) in GAMES.items():
        partial = out / f"{name}.partial"
        partial.mkdir(exist_ok=True)
        (partial / "train.jsonl").write_text("".join(train[half]))
        (partial / "heldout_kl.jsonl").write_text("".join(rows[half][:games_at_1]))
        (partial / "heldout.jsonl").write_text("".join(rows[half][:games_at_04]))
        shutil.rmtree(out / name, ignore_errors=True)
        partial.rename(out / name)


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def student_folder(out: Path, kind: str, seed: int) -> Path:
    return out / "students" / f"{kind}-{seed}"


def make_student(out: Path, kind: str, seed: int) -> None:
    """A student of STUDENTS, a function of the teacher and the seed."""
    folder = student_folder(out, kind, seed)
    if folder.exists() or kind == "teacher":
        return
    print(f"training the {kind} student of seed {seed}", flush=True)
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(make_models.SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(make_models.SHIPPED, dtype=torch.float32)
    {"late": lose_late_turns, "weak": weaken}[kind](model, ChatTokens(tokenizer, make_models.CHAT), seed)
    partial = folder.with_name(f"{folder.name}.partial")
    make_models.save(model, tokenizer, partial)
    partial.rename(folder)


def lose_late_turns(model: torch.nn.Module, chat: ChatTokens, seed: int) -> None:
    """STUDENT_STEPS steps on the first STUDENT_TURNS turns of episodes.

    These demonstrations are the teacher's kind (make_models.py): the scripted searcher, disturbed by random actions.
    """
    first = make_models.GAMES + 1000 * seed
    plays = make_models.demonstrations(range(first, first + STUDENT_GAMES))
    examples = [make_models.encode(chat, *first_turns(*play)) for play in plays]
    make_models.train(model, make_models.batches(examples, seed), [STUDENT_RATE] * STUDENT_STEPS)


def first_turns(observation: str, steps: list[Step]) -> tuple[str, list[Step]]:
    return observation, steps[:STUDENT_TURNS]


def weaken(model: torch.nn.Module, chat: ChatTokens, seed: int) -> None:
    """WEAK_STEPS steps on random actions at every turn, as the smoke run's student has a few of."""
    rng = random.Random(seed)
    stream = iter(lambda: [make_models.random_play(chat, rng) for _ in range(make_models.DAMAGE_BATCH)], None)
    make_models.train(model, stream, [WEAK_RATE] * WEAK_STEPS)


# -------------------------------------------------------------------------------------------------------- jobs


def child_environment(out: Path) -> dict[str, str]:
    return {"SMOKE_GAMES": str(out / "games"), "PYTHONPATH": hooks.python_path(), "OMP_NUM_THREADS": "1"}


class Running:
    """A job under way: the student's server and the training, both ended by `stop`."""

    def __init__(self, job: Job, out: Path, teacher: SGLangServer) -> None:
        self.job, self.folder = job, out / "runs" / job.games / job.name
        self._started = time.monotonic()
        arm = job.arm
        shutil.rmtree(self.folder, ignore_errors=True)  # of an attempt that was killed
        self.folder.mkdir(parents=True)
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(job.recipe))
        student = make_models.SHIPPED if arm.student == "teacher" else student_folder(out, arm.student, job.seed)
        with ExitStack() as stack:
            server = stack.enter_context(SGLangServer(f"{job.name}'s server", student, self.folder / "server.log"))
            server.wait_ready()
            command = [
                *(sys.executable, "-m", "benchmarks.study_arm"),
                *(["--control", arm.control] if arm.control else []),
            ]
            command += ["--config", str(config), "--student", str(student), "--data", str(out / job.games)]
            command += ["--run-dir", str(self.folder), "--seed", str(job.seed), "--lr", str(job.rate)]
            command += ["--student-port", str(server.port), "--teacher-port", str(teacher.port)]
            command += ["--batch", str(arm.batch), "--updates", str(arm.updates), "--eval-interval", str(arm.every)]
            command += ["--response-len", str(RESPONSE_LEN), "--context-len", str(arm.context_len)]
            command += ["--loss", arm.loss, *([] if arm.evaluate_first else ["--skip-first-evaluation"])]
            log = self.folder / "train.log"
            self._process = stack.enter_context(Process(job.name, command, log, child_environment(out)))
            self._stack = stack.pop_all()

    def stop(self) -> None:
        self._stack.close()

    def ended(self) -> bool:
        return self._process.popen.poll() is not None

    def save(self, circumstances: dict[str, str]) -> str:
        """Write the result and say it in a line. Raises RuntimeError when the training ended with an error."""
        self._process.check()
        result = study_report.result(read_run(self.folder), self.job.arm.batch)
        minutes = round((time.monotonic() - self._started) / 60, 1)
        about = {"arm": self.job.arm_name, "settings": self.job.settings, "minutes": minutes}
        report.save(self.job.path, {**about, **circumstances, **result})
        return f"{self.job.name}, {minutes} minutes: {study_report.one_line(result)}"


def run_jobs(jobs: list[Job], out: Path, parallel: int) -> None:
    """Run the jobs that have no result, `parallel` of them at once.

    Raises:
        SystemExit: jobs failed; the others were run.
    """
    waiting = [job for job in jobs if not job.done()]
    print(f"{len(waiting)} of {len(jobs)} jobs to do, {parallel} at once; working folder {out}", flush=True)
    if not waiting:
        return
    running: list[Running] = []
    failed: list[str] = []

    def fail(job: Job, error: Exception) -> None:
        failed.append(job.name)
        print(f"{job.name} failed: {error}", flush=True)

    with ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        try:
            fcntl.flock(stack.enter_context((out / "lock").open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another study runs in {out}: wait for its end, or choose another --out")
        circumstances = {**report.circumstances("study"), "slime": SLIME}
        if DEVICE == "cuda":
            circumstances["machine"] += f", engines on one {torch.cuda.get_device_name()}"
        log = out / "logs" / "teacher.log"
        teacher = stack.enter_context(SGLangServer("teacher server", make_models.SHIPPED, log, 64 * parallel))
        teacher.wait_ready()
        make_data(out, teacher)
        stack.callback(lambda: [one.stop() for one in running])
        while waiting or running:
            teacher.check_running()
            for one in [one for one in running if one.ended()]:
                one.stop()
                running.remove(one)
                try:
                    print(one.save(circumstances), flush=True)
                except RuntimeError as error:
                    fail(one.job, error)
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                try:
                    make_student(out, job.arm.student, job.seed)
                    running.append(Running(job, out, teacher))
                except RuntimeError as error:
                    fail(job, error)
            time.sleep(0.5)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command runs what has no result")


JOBS = {"curricula": study_jobs, "tuning": tuning_jobs, "losses": loss_jobs, "pilot": pilot_jobs}


def main() -> None:
    options = parse_options()
    jobs = JOBS[options.part]()
    if options.only:
        if unknown := set(options.only) - {job.name for job in jobs}:
            sys.exit(
                f"--only: no such job: {', '.join(sorted(unknown))}; jobs are {', '.join(job.name for job in jobs)}"
            )
        jobs = [job for job in jobs if job.name in options.only]
    if not options.report:
        for number in (signal.SIGINT, signal.SIGTERM):  # either takes the servers down
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        transformers.utils.logging.disable_progress_bar()
        run_jobs(jobs, options.out.resolve(), options.parallel)
    study_pages.write_all(RESULTS)


def parse_options() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    part = parser.add_mutually_exclusive_group()
    for flag, name, about in (
        ("--tune", "tuning", "the first part's tuning"),
        ("--losses", "losses", "the second part"),
        ("--pilot", "pilot", "the second part's pilot"),
    ):
        part.add_argument(
            flag, dest="part", action="store_const", const=name, default="curricula", help=f"run {about}"
        )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--only", nargs="+", metavar="JOB", help="jobs by name, such as f2b-1")
    parser.add_argument("--parallel", type=int, default=max((os.cpu_count() or 1) // 2, 1), help="jobs at once")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "study", help="games, students, logs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
