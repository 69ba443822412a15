"""What the prepare tools of all environments share: from tasks and demonstrations to slime's JSONL files.

A prepare tool lists tasks, each with the split that it belongs to and with candidates for its demonstration, best
first. Here every task is opened in the real environment, in worker processes: whatever that does there (raise, exit,
crash, hang) is the task's failure.

The first candidate that settles a training task decides. A demonstration that replays (nothing refused, won exactly
by the last action, no longer than the horizon) puts the task into train.jsonl. An empty one says that its teacher
never solved the task: it goes into hard.jsonl, which is for evaluation. After an unusable one the next candidate is
tried. So all arms train on the same tasks, those with a demonstration. Whatever is left out, a demonstration or a
task, is a line of left_out.jsonl with its reason.
"""

import argparse
import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from tqdm.asyncio import tqdm

from ... import ConfigError, Failure
from ...environments.pool import BorrowedEnvironment, EnvironmentPool
from ...episode.demonstration import Demonstration, recorded
from ...episode.text_side import TextSide
from ...settings.build import new_pool, text_side_factory
from ...settings.checks import check_environment_class
from ...settings.config import TcodConfig
from .command import at_least, check_writable, new_parser, one_sentence, table
from .jsonl import write_jsonl
from .ray_start import start_ray

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAIN, HARD, LEFT_OUT = "train", "hard", "left_out.jsonl"


@dataclass
class Task:
    """One task, and what becomes of it.

    Attributes:
        metadata: what the environment's `reset` needs.
        candidates: (source, demonstration), best first; a Failure stands for one that its source should have.
        cut: a demonstration may go on after the success: what comes later is cut off.
        goal_of: the goal in the first observation's text.
        set: the one that it goes into, if any.
        source: what settled a training task, with a demonstration, or without one as never solved.
        left_out: lines of left_out.jsonl. With one from the start, the environment is not asked.
    """

    split: str
    label: str
    metadata: dict[str, Any]
    candidates: Sequence[tuple[str, Demonstration | Failure]] = ()
    cut: bool = False
    goal_of: Callable[[str], str] = str
    set: str | None = None
    goal: str = ""
    demo: Demonstration = Demonstration()
    source: str = ""
    left_out: list[dict[str, Any]] = field(default_factory=list)

    def leave_out(self, source: str, failure: Failure) -> None:
        """A demonstration of that source; or, where it is "", the task itself."""
        line = {"task": self.metadata, "source": source, "reason": failure.reason}
        self.left_out.append({**line, "detail": " ".join(str(failure).split())})

    def row(self) -> dict[str, Any]:
        """A line of its set."""
        demo = {name: value for name, value in asdict(self.demo).items() if value}
        metadata = self.metadata | ({"demo": demo} if demo else {})
        return {"prompt": self.goal, "label": self.label, "metadata": metadata}


# -------------------------------------------------------------------------------------------------- the environment


async def play_demonstration(
    environment: BorrowedEnvironment,
    side: TextSide,
    demo: Demonstration,
    horizon: float = math.inf,
    cut: bool = False,
) -> Demonstration:
    """Play a demonstration to its end, by the rules by which B2F replays one. Returns what is to be kept of it.

    `cut`: see Task.

    Raises:
        Failure: demo_{missing, too_long, mismatch, inadmissible}; demo_won_early or demo_not_won, where the task is
            not won exactly by the last action; or what the environment does wrong.
    """
    demo.check(math.inf if cut else horizon)
    seen = [observation := await environment.reset(side.task)]
    for turn, action in enumerate(demo.actions):
        demo.response(turn, observation, side)
        observation = await environment.step(action)
        side.show(observation, first=False)
        seen.append(observation)
        if cut and observation.won:
            demo = demo.first(turn + 1)
            break
        demo.check_step(turn, observation, observation.over and turn + 1 < len(demo.actions))
    demo.check(horizon)
    if not (await environment.finish(observation)).won:
        raise Failure("demo_not_won", f"{len(demo.actions)} actions do not reach the goal")
    return replace(demo, **recorded(seen))


async def check_task(pool: EnvironmentPool, side: TextSide, task: Task, horizon: int) -> None:
    """Open a task and try its candidates in order; the task says what became of it."""
    if task.left_out:
        return
    try:
        async with pool.borrow() as environment:
            task.goal = task.goal_of((await environment.reset(task.metadata)).text)
    except Failure as failure:
        task.leave_out("", failure)
        return
    if task.split != TRAIN:
        task.set = task.split
        return
    for source, demo in task.candidates:
        try:
            if isinstance(demo, Failure):
                raise demo
            if demo.actions:
                async with pool.borrow() as environment:
                    task.demo = await play_demonstration(environment, side, demo, horizon, task.cut)
            task.set, task.source = TRAIN if demo.actions else HARD, source
            return
        except Failure as failure:
            task.leave_out(source, failure)
    task.leave_out("", Failure("no demonstration", "no source has a usable one for this training task"))


def check_tasks(config: TcodConfig, tasks: Sequence[Task], processes: int) -> None:
    """check_task for each task, in worker processes with one environment each, with a progress bar."""
    new_side = text_side_factory(config)
    for task in tasks if config.name else ():
        task.metadata = {"environment": config.name, **task.metadata}

    async def check() -> None:
        pool = new_pool(config, processes, 1)
        first = next((task for task in tasks if not task.left_out), None)
        try:
            async with pool.borrow() as environment:
                await environment.reset(first.metadata) if first else None
        except Failure as failure:
            if ".__init__ raised" in str(failure):  # no game can be opened; else it is this one's own
                raise ConfigError(f"no environment can be made: {failure}") from failure
        checks = (check_task(pool, new_side(task.metadata), task, config.tcod_horizon) for task in tasks)
        await tqdm.gather(*checks, desc="tasks in the environment", unit="task")
        await pool.close()

    start_ray(processes)
    asyncio.run(check())


# -------------------------------------------------------------------------------------------------------- the sets


def write_sets(out: Path, tasks: Sequence[Task]) -> None:
    """Write the JSONL files below `out`, and print what is in them.

    Raises:
        ConfigError: no set that could be trained on comes of it, or one to evaluate on is empty.
        OSError: a file cannot be written.
    """
    left_out = [line for task in tasks for line in task.left_out]
    write_jsonl(out / LEFT_OUT, left_out)
    print(left_out_table(left_out))
    sets = {name: [task for task in tasks if task.set == name] for name in (TRAIN, *(t.split for t in tasks), HARD)}
    if empty := [name for name, members in sets.items() if not members and name != HARD]:
        remedy = "raise tcod_horizon, or name another source of demonstrations"
        raise ConfigError(f"no task is left for {empty[0]}: see {out / LEFT_OUT}, {remedy}")
    for name, members in sets.items():
        write_jsonl(out / f"{name}.jsonl", [task.row() for task in members])
    used = Counter(task.source for task in sets[TRAIN])
    print(sets_table(sets))
    print("demonstrations by source: " + ", ".join(f"{source} {count}" for source, count in used.most_common()))
    print(f"written to {out}")


def sets_table(sets: dict[str, list[Task]]) -> str:
    """Tasks by type and set, and how many actions the demonstrations have."""
    lines = [("tasks", *sets, "actions: shortest", "median", "mean", "longest")]
    labels = {task.label for members in sets.values() for task in members}
    for name, chosen in [*((label, {label}) for label in sorted(labels)), ("all", labels)]:
        counts = [sum(task.label in chosen for task in members) for members in sets.values()]
        lengths = [len(task.demo.actions) for task in sets[TRAIN] if task.label in chosen]
        shown = (min(lengths), f"{median(lengths):g}", f"{mean(lengths):.1f}", max(lengths)) if lengths else "----"
        lines.append((name, *counts, *shown))
    return table(lines)


def left_out_table(left_out: Sequence[dict[str, Any]]) -> str:
    """How much was left out for what reason, each with an example."""
    lines = [f"left out, see {LEFT_OUT}:" if left_out else "nothing is left out"]
    examples = {(line["source"], line["reason"]): line for line in reversed(left_out)}
    for (source, reason), count in Counter((line["source"], line["reason"]) for line in left_out).most_common():
        example, what = examples[source, reason], f"demonstrations of {source}" if source else "tasks"
        lines.append(f"{count:>6} {what}: {reason}, as {json.dumps(example['task'])}: {example['detail']}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- the command line


def option_parser(module_doc: str, config: str) -> argparse.ArgumentParser:
    """The options that every prepare tool has; `config` is the default one's name."""
    parser = new_parser(module_doc)
    add = parser.add_argument
    add("--config", type=Path, default=CONFIGS / config, help="YAML of tcod_* settings, default: %(default)s")
    add("--environment", help="whose rows these are, by its name in --config's tcod_environments")
    add("--out", type=Path, required=True, help="folder that gets the JSONL files")
    add("--processes", type=at_least(1), default=os.cpu_count(), help="environments that check tasks at once")
    return parser


def prepare(
    name: str, find_tasks: Callable[[argparse.Namespace, TcodConfig], Sequence[Task]], options: argparse.Namespace
) -> None:
    """All that a prepare tool does. What is refused is one sentence and exit status 1.

    Args:
        find_tasks: the tasks, with candidates for the training tasks' demonstrations. Raises ConfigError, OSError.
    """
    with one_sentence(name, options.out):
        check_writable(options.out / LEFT_OUT)
        config = TcodConfig.read(options.config)
        if options.environment not in (names := list(config.tcod_environments) or [None]):
            raise ConfigError(f"--environment {options.environment} is not in {options.config}: name one of {names}")
        config = config.for_row({"environment": options.environment})
        check_environment_class(config)
        tasks = find_tasks(options, config)
        check_tasks(config, tasks, options.processes)
        write_sets(options.out, tasks)
