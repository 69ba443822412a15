"""What the prepare tools of all environments share: from tasks and demonstrations to slime's JSONL files.

A prepare tool lists tasks, each with the split that it belongs to and with candidates for its demonstration, best
first. Here every task is opened in the real engine, in worker processes: whatever an engine does there (raise, exit,
crash, hang) is that task's failure.

The first candidate that settles a training task decides. A demonstration that the engine replays (nothing refused, won
exactly by the last action, no longer than the horizon) puts the task into train.jsonl. An empty one says that its
teacher never solved the task: it goes into hard.jsonl, which is for evaluation. After an unusable one the next
candidate is tried. So all arms train on the same tasks, those with a demonstration. Whatever is left out, a
demonstration or a task, is a line of left_out.jsonl with its reason.
"""

import argparse
import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from tqdm.asyncio import tqdm

from .. import ConfigError, Failure
from ..environments.pool import BorrowedEnvironment, EnvironmentPool
from ..environments.protocol import Environment, Observation, load_environment
from ..episode.demonstration import Demonstration
from ..settings.config import TcodConfig
from .ray_start import start_ray

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TRAIN, HARD = "train", "hard"


@dataclass(frozen=True)
class Candidate:
    """A demonstration that may do; a Failure stands for one that its source should have and has not."""

    source: str
    demo: Demonstration | Failure
    cut: bool = False
    """It may go on after the success: what comes later is cut off."""


@dataclass(frozen=True)
class Task:
    """One task. `metadata`: what the environment's `reset` needs."""

    split: str
    label: str
    metadata: dict[str, Any]
    candidates: Sequence[Candidate] = ()
    fault: Failure | None = None
    """Why the task cannot be used, where that is known without the engine."""


@dataclass(frozen=True)
class LeftOut:
    """A line of left_out.jsonl. `source` is the demonstration's, or "" where the task itself is left out."""

    task: dict[str, Any]
    source: str
    reason: str
    detail: str


@dataclass
class Checked:
    """What the engine says of a task. `source` settled it: with a demonstration, or without one as never solved."""

    task: Task
    goal: str = ""
    demo: Demonstration | None = None
    source: str | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    playable: bool = False

    def leave_out(self, source: str, failure: Failure) -> None:
        self.left_out.append(LeftOut(self.task.metadata, source, failure.reason, " ".join(str(failure).split())))


# ------------------------------------------------------------------------------------------------------- the engine


async def replay(
    engine: BorrowedEnvironment, environment: type[Environment], task: Task, candidate: Candidate, horizon: int
) -> Demonstration:
    """Play a demonstration to its end, by the rules by which B2F replays one. Returns what is to be kept of it.

    Raises:
        Failure: demo_{missing, too_long, mismatch, inadmissible}; demo_won_early or demo_not_won, where the task is
            not won exactly by the last action; or what the engine does wrong.
    """
    demo = candidate.demo
    if not candidate.cut:
        demo.check(horizon)
    observation = await engine.reset(task.metadata)
    for turn, action in enumerate(demo.actions):
        demo.response(turn, observation, environment)
        observation = await engine.step(action)
        if candidate.cut and observation.won:
            demo = replace(demo, actions=demo.actions[: turn + 1])
            break
        demo.check_step(turn, observation, over=_is_over(observation) and turn + 1 < len(demo.actions))
    demo.check(horizon)
    if not (await engine.finish(observation)).won:
        raise Failure("demo_not_won", f"{len(demo.actions)} actions do not reach the goal")
    return demo


def _is_over(observation: Observation) -> bool:
    return observation.won or observation.done


async def check_task(
    pool: EnvironmentPool,
    environment: type[Environment],
    task: Task,
    horizon: int,
    goal: Callable[[Observation], str],
) -> Checked:
    """Open a task and try its candidates in order."""
    checked = Checked(task)
    try:
        if task.fault:
            raise task.fault
        async with pool.borrow() as engine:
            checked.goal = goal(await engine.reset(task.metadata))
    except Failure as failure:
        checked.leave_out("", failure)
        return checked
    checked.playable = True
    for candidate in task.candidates:
        try:
            if isinstance(candidate.demo, Failure):
                raise candidate.demo
            if candidate.demo.actions:
                async with pool.borrow() as engine:
                    checked.demo = await replay(engine, environment, task, candidate, horizon)
            checked.source = candidate.source
            return checked
        except Failure as failure:
            checked.leave_out(candidate.source, failure)
    return checked


def check_tasks(
    config: TcodConfig, tasks: Sequence[Task], goal: Callable[[Observation], str], processes: int | None
) -> list[Checked]:
    """check_task for each task, in worker processes with one engine each, with a progress bar."""
    processes = processes or os.cpu_count() or 1
    environment = load_environment(config.tcod_environment)

    async def check() -> list[Checked]:
        pool = EnvironmentPool(
            config.tcod_environment,
            config.tcod_data_root,
            workers=processes,
            engines_per_worker=1,
            timeout_s=config.tcod_env_timeout_s,
            env_args=config.tcod_env_args,
        )
        checks = (check_task(pool, environment, task, config.tcod_horizon, goal) for task in tasks)
        checked = await tqdm.gather(*checks, desc="tasks in the engine", unit="task")
        await pool.close()
        return checked

    start_ray(processes)
    return asyncio.run(check())


# -------------------------------------------------------------------------------------------------------- the sets


def make_sets(checked: Iterable[Checked]) -> tuple[dict[str, list[dict[str, Any]]], list[LeftOut]]:
    """Rows by set: train, the other splits, hard; and what is in none of them."""
    checked = list(checked)
    sets: dict[str, list[dict[str, Any]]] = {TRAIN: []}
    sets |= {entry.task.split: [] for entry in checked} | {HARD: []}
    left_out = []
    for entry in checked:
        left_out += entry.left_out
        if not entry.playable:
            continue
        name, metadata = entry.task.split, dict(entry.task.metadata)
        if name == TRAIN:
            if entry.source is None:
                detail = "no source has a usable demonstration for this training task"
                left_out.append(LeftOut(metadata, "", "no demonstration", detail))
                continue
            if entry.demo:
                metadata["demo"] = {name: value for name, value in asdict(entry.demo).items() if value}
            else:
                name = HARD
        sets[name].append({"prompt": entry.goal, "label": entry.task.label, "metadata": metadata})
    return sets, left_out


def write_sets(out: Path, checked: Sequence[Checked], left_out: Sequence[LeftOut] = ()) -> None:
    """Write the JSONL files below `out`, and print what is in them.

    Args:
        left_out: what was left out before the engine was asked.

    Raises:
        ConfigError: no set that could be trained on comes of it, or one to evaluate on is empty.
    """
    sets, more = make_sets(checked)
    left_out = [*left_out, *more]
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "left_out.jsonl", map(asdict, left_out))
    print(left_out_table(left_out, out / "left_out.jsonl"))
    if not sets[TRAIN]:
        raise ConfigError(
            f"no training task has a usable demonstration: see {out / 'left_out.jsonl'}, or name another source"
        )
    for name, rows in sets.items():
        if not rows and name != HARD:
            raise ConfigError(f"no task of {name} can be played: see {out / 'left_out.jsonl'}")
    for name, rows in sets.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    print(sets_table(sets))
    print(lengths_table(sets[TRAIN]))
    used = Counter(entry.source for entry in checked if entry.demo)
    print("demonstrations by source: " + ", ".join(f"{source} {count}" for source, count in used.most_common()))
    print(f"written to {out}")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Whole or not at all; a set without rows has no file, since slime refuses an empty one."""
    lines = [json.dumps(row) + "\n" for row in rows]
    if not lines:
        path.unlink(missing_ok=True)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines))
    partial.replace(path)


# ------------------------------------------------------------------------------------------------------- the report


def sets_table(sets: dict[str, list[dict[str, Any]]]) -> str:
    counts = {name: Counter(row["label"] for row in rows) for name, rows in sets.items()}
    labels = sorted(set().union(*counts.values()))
    width = max(map(len, labels)) + 2
    lines = [f"{'tasks':<{width}}" + "".join(f"{name:>14}" for name in sets)]
    lines += [f"{label:<{width}}" + "".join(f"{counts[name][label]:>14}" for name in sets) for label in labels]
    lines.append(f"{'all':<{width}}" + "".join(f"{len(rows):>14}" for rows in sets.values()))
    return "\n".join(lines)


def lengths_table(rows: Sequence[dict[str, Any]]) -> str:
    labels = sorted({row["label"] for row in rows})
    width = max(len(name) for name in (*labels, "demonstrations, in actions")) + 2
    lines = [f"{'demonstrations, in actions':<{width}}{'shortest':>14}{'median':>14}{'mean':>14}{'longest':>14}"]
    for label in (*labels, "all"):
        lengths = [len(row["metadata"]["demo"]["actions"]) for row in rows if label in (row["label"], "all")]
        lines.append(
            f"{label:<{width}}{min(lengths):>14}{median(lengths):>14.0f}{mean(lengths):>14.1f}{max(lengths):>14}"
        )
    return "\n".join(lines)


def left_out_table(left_out: Sequence[LeftOut], path: Path) -> str:
    if not left_out:
        return "nothing is left out"
    lines = [f"left out, see {path}:"]
    examples = {(entry.source, entry.reason): entry for entry in reversed(left_out)}
    for (source, reason), count in Counter((entry.source, entry.reason) for entry in left_out).most_common():
        example = examples[source, reason]
        what = f"demonstrations of {source}" if source else "tasks"
        lines.append(f"{count:>6} {what}: {reason}, as {json.dumps(example.task)}: {example.detail}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- the command line


def option_parser(description: str, config: str) -> argparse.ArgumentParser:
    """The options that every prepare tool has; `config` is the default one's name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the JSONL files")
    parser.add_argument("--processes", type=int, help="engines that check tasks at once, default: one per core")
    parser.add_argument(
        "--config",
        type=Path,
        default=CONFIGS / config,
        help="YAML of tcod_* settings, as in training, default: %(default)s",
    )
    return parser


def run(name: str, prepare: Callable[[argparse.Namespace, TcodConfig], None], options: argparse.Namespace) -> None:
    """Call a prepare tool's function; what it refuses is one sentence and exit status 1."""
    try:
        prepare(options, TcodConfig.read(options.config))
    except ConfigError as error:
        sys.exit(f"{name}: {error}")
