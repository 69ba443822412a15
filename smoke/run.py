"""The smoke run: TCOD on a laptop, with the real SGLang and the real ALFWorld engine, nothing downloaded but packages.

What it shows is the recovery of a perturbed teacher: the student is the tiny teacher, damaged by training on random
actions, and on-policy distillation with a temporal curriculum (F2B, then B2F, each from the same damaged checkpoint)
leads it back. `bash smoke/run.sh` sets up the environment and starts this.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

from examples.tcod.curriculum import VARIANTS
from examples.tcod.tools import plot_runs, show_rollouts
from smoke import hooks, make_models
from smoke.plays import Play, choose, write_settings
from smoke.servers import DEVICE, HERE, Process, SGLangServer

SILENCE_LIMIT_S = 600  # Without a new line of metrics; an evaluation of all games takes a tenth of it.
KL, SUCCESS = "eval/tcod/heldout_t1/kl/trajectory", "eval/tcod/heldout/success"
TABLE = {  # column: (metric, format)
    "k": ("rollout/tcod/k", "{:.0f}"),
    "turns": ("rollout/tcod/turns/student", "{:.1f}"),
    "replayed": ("rollout/tcod/turns/replayed", "{:.1f}"),
    "success": ("rollout/tcod/success", "{:.2f}"),
    "KL": ("rollout/tcod/kl/trajectory", "{:.1f}"),
    "KL/token": ("rollout/tcod/kl/token", "{:.3f}"),
    "scored": ("rollout/tcod/tokens/scored", "{:.0f}"),
    "trained": ("rollout/tcod/tokens/trained", "{:.0f}"),
    "failed": ("rollout/tcod/failed", "{:.0f}"),
    "s": ("rollout/tcod/rollout_s", "{:.1f}"),
}
Lines = list[dict[str, Any]]  # of metrics.jsonl


def main() -> None:
    options = parse_options()
    for number in (signal.SIGINT, signal.SIGTERM):  # either takes the servers down
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()
    slime = hooks.find_slime()
    # With Megatron beside slime, slime's own train.py does all of it; else the hooks run with a small trainer.
    whole = bool(os.environ.get("SLIME_DIR") and os.environ.get("MEGATRON_DIR"))
    how = "its train.py with Megatron" if whole else "with the smoke run's own trainer"
    print(f"TCOD smoke run on {slime}, {how}; everything is written to {options.out}")
    play = choose(options)
    print(play.about)
    results = run_arms(options, play, "smoke.train_slime" if whole else "smoke.train_arm")
    show(results, options, play)
    print(f"wall time {time.monotonic() - started:.0f} s")
    print(summary(results, play))


def run_arms(options: Namespace, play: Play, trainer: str) -> dict[str, Lines]:
    """Train every arm from the same checkpoint. Returns their metrics."""
    teacher, student = models(options.out / "models", options.seed, play.thinks)
    results: dict[str, Lines] = {}
    with ExitStack() as stack:
        logs = options.out / "logs"
        print(f"starting two SGLang servers ({DEVICE}), the student's and the teacher's; logs: {logs}", flush=True)
        servers = [
            stack.enter_context(SGLangServer(f"{name} server", model, logs / f"{name}.log"))
            for name, model in (("student", student), ("teacher", teacher))
        ]
        for server in servers:
            server.wait_ready()
        command = [sys.executable, "-m", trainer, *play.flags, "--student", student, "--data", play.data]
        command += ["--student-port", servers[0].port, "--teacher-port", servers[1].port]
        command += ["--seed", options.seed, "--updates", options.updates]
        for arm, settings in sorted(play.arms.items(), key=lambda one: one[0] == "sft"):  # whose evaluation has no KL
            folder = run_dir(options, play, arm)
            hooks.clear(folder)
            config = write_settings(folder / "tcod.yaml", settings)
            further = ["--config", config, "--run-dir", folder]
            # The first arm's first evaluation is that of all.
            first = [line for line in next(iter(results.values()), []) if line["kind"] == "eval"][:1]
            further += ["--skip-first-evaluation"] if first else []
            results[arm] = first + train_arm(arm, [*map(str, command + further)], folder, options.updates, servers)
    return results


def models(folder: Path, seed: int, thinks: bool) -> tuple[Path, Path]:
    """Teacher and student. What is not shipped is made, once."""
    teacher = make_models.SHIPPED
    if thinks:
        teacher = folder / f"thinking-of-{digest(teacher)}"
        if not (teacher / "model.safetensors").exists():
            print("making a teacher that thinks out of the shipped one: some minutes, once", flush=True)
            make_models.make_thinking_teacher(teacher)
    student = folder / f"student-{seed}-of-{digest(teacher)}"
    if not (student / "model.safetensors").exists():
        print("making the student: a damaged copy of the teacher", flush=True)
        make_models.make_student(teacher, student, seed, thinks)
    return teacher, student


def digest(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:8]


def train_arm(arm: str, command: list[str], folder: Path, updates: int, servers: list[SGLangServer]) -> Lines:
    """Run one arm in a process of its own, with its progress and its table on the terminal. Returns its metrics.

    Raises:
        RuntimeError: with the end of its log, when the process or one of the servers it needs has ended, or when
            nothing has come from it for SILENCE_LIMIT_S.
    """
    env = {"PYTHONPATH": hooks.python_path(), "OMP_NUM_THREADS": "1"}
    lines: Lines = []
    with Process(f"{arm} training", command, folder / "train.log", env) as process:
        with tqdm(total=updates, desc=arm, unit="update", disable=None) as bar:
            bar.write(f"\n{arm}\n" + "  ".join(["   n"] + [f"{name:>8}" for name in TABLE]))
            heard, ended = time.monotonic(), False
            while not ended:
                time.sleep(0.2)
                ended = process.popen.poll() is not None
                for server in servers:
                    server.check_running()
                if time.monotonic() - heard > SILENCE_LIMIT_S:
                    raise RuntimeError(process.describe(f"has done nothing for {SILENCE_LIMIT_S} s"))
                for line in new_lines(folder / "metrics.jsonl", len(lines)):
                    lines.append(line)
                    heard = time.monotonic()
                    bar.write(row(line))
                    bar.update(line["kind"] == "rollout")
        process.check()
    return lines


def run_dir(options: Namespace, play: Play, arm: str) -> Path:
    return options.out / "runs" / f"{play.name}-{arm}-{options.seed}"


def new_lines(path: Path, seen: int) -> Lines:
    """The complete lines of a growing file behind the first `seen` ones."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1][seen:]]


def row(line: dict[str, Any]) -> str:
    """A line of metrics.jsonl in the table on the terminal."""
    if line["kind"] == "rollout":
        cells = [fmt.format(line.get(metric, float("nan"))) for metric, fmt in TABLE.values()]
        return "  ".join([f"{line['n']:4d}"] + [f"{cell:>8}" for cell in cells])
    return (
        f"{line['n']:4d}  held-out games, full horizon: success {line[SUCCESS]:.2f} at temperature 0.4, "
        f"{line['eval/tcod/heldout_t1/success']:.2f} at 1; trajectory KL {line.get(KL, math.nan):.1f} nats "
        f"({line['eval/tcod/eval_s']:.0f} s)"
    )


def show(results: dict[str, Lines], options: Namespace, play: Play) -> None:
    """Print one trajectory; write the page of all of them, and the figure."""
    runs = show_rollouts.read_runs([run_dir(options, play, arm) for arm in results])
    print(show_rollouts.printable(show_rollouts.rollout_text(show_rollouts.shortest_won(runs[-1].episodes))))
    page = options.out / f"rollouts-{play.name}-{options.seed}.html"
    page.write_text(show_rollouts.make_page(runs))
    picture = options.out / f"smoke-{play.name}-{options.seed}.png"
    plot_runs.draw({arm: [lines] for arm, lines in results.items()}, picture)
    print(f"figure: {picture}")
    print(f"what the agent did: {page} (open it in a browser)")


def summary(results: dict[str, Lines], play: Play) -> str:
    """One line: what was run, and what changed from what to what."""
    parts = []
    for arm, lines in results.items():
        evaluations = [line for line in lines if line["kind"] == "eval"]
        first, last = evaluations[0], evaluations[-1]
        parts.append(
            f"{arm.upper()}, {last['n']} updates: held-out success {first[SUCCESS]:.2f} -> {last[SUCCESS]:.2f}, "
            f"trajectory KL {first.get(KL, math.nan):.1f} -> {last.get(KL, math.nan):.1f} nats"
        )
    return f"{play.name}, {play.title}: {'; '.join(parts)}"


def parse_options() -> Namespace:
    parser = argparse.ArgumentParser(description="TCOD on a laptop: real SGLang, real ALFWorld, tiny models.")
    parser.add_argument("--quick", action="store_true", help="a few updates and games, for CI")
    parser.add_argument("--seed", type=int, default=1, help="of the perturbation, the order of games and the run")
    parser.add_argument(
        "--variant", nargs="+", choices=VARIANTS, help="the arms, f2b and b2f or --config's by default"
    )
    parser.add_argument("--environment", choices=("alfworld", "scienceworld", "sqlite", "mixed"), default="alfworld")
    parser.add_argument(
        "--thoughts", action="store_true", help="models that think, and a history without old thoughts"
    )
    parser.add_argument("--config", type=Path, help="another environment: its YAML of tcod_* settings; needs --data")
    parser.add_argument("--data", type=Path, help="folder of its train.jsonl and, for the evaluation, heldout.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="games, models, logs, results (from the root)")
    options = parser.parse_args()
    if bool(options.config) != bool(options.data):
        parser.error("--config and --data belong together")
    if options.thoughts and (options.config or options.environment != "alfworld"):
        parser.error("--thoughts is for ALFWorld: the models think of its things only")
    for name in ("out", "config", "data"):
        if path := getattr(options, name):
            setattr(options, name, path.resolve())
    options.updates = 5 if options.quick else 20
    options.train_games, options.heldout_games = (16, 8) if options.quick else (64, 48)
    return options


if __name__ == "__main__":
    main()
