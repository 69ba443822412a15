"""Does an environment play its rows? Run it while you write one; the run script does it before a GPU is taken.

    python -m examples.tcod.tools.check_environment --config tcod.yaml --rows train.jsonl

All rows are checked as a training run checks them. Some are played in a worker process, with training's time limit:
reset, rendered, a nonsense action sent, and their demonstrations replayed by the rules of B2F. Two rows are played in
turn, on two environments of one process, which must answer as they do alone. Then it prints what a reset and a step
cost, and how many workers and environments that suggests. A fault is one sentence and exit status 1.

--record OUT plays all rows, and writes them with what the environment says in their demonstrations (VARIANT=sft).
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import ConfigError, Failure
from ..environments.pool import BorrowedEnvironment
from ..environments.protocol import Observation, action_of
from ..episode.demonstration import Demonstration
from ..episode.rows import Row, place
from ..episode.text_side import TextSide
from ..settings.build import new_pool, text_side_factory
from ..settings.checks import check_environment_class
from ..settings.config import TcodConfig
from ..settings.row_checks import by_environment, check_training_rows
from .common.command import at_least, check_writable, new_parser, one_sentence
from .common.jsonl import read_rows, write_jsonl
from .common.prepare import Task, play_demonstration
from .common.ray_start import start_ray

NONSENSE = "no such action"
IN_TURN = 30  # actions of each row that is played in turn with another
# What the suggestion assumes.
CONCURRENCY = 64  # episodes at once; --concurrency
TURN_S = 5.0  # that the student thinks about a turn, under load
LOAD = 0.5  # share of its time for which a worker may be busy


@dataclass(frozen=True)
class Played:
    """What playing rows has shown.

    Attributes:
        first: the observation that the first row begins with.
        demos: the rows' demonstrations as they were played.
        calls: of the environments, each as (its method, its seconds).
    """

    first: Observation
    demos: list[Demonstration]
    calls: list[tuple[str, float]]


@contextlib.contextmanager
def _naming(side: TextSide, row: Row, source: str) -> Iterator[None]:
    """What an environment does wrong in the block is a ConfigError that names the row."""
    try:
        yield
    except Failure as failure:
        name, reason = side.environment.__name__, " ".join(str(failure).split())[:500]
        raise ConfigError(f"{name} does not play {place(row, source)}, {failure.reason}: {reason}") from failure


async def _play(env: BorrowedEnvironment, side: TextSide, row: Row) -> tuple[Observation, Demonstration]:
    """Nonsense, then the row's demonstration, on the same environment. Raises Failure.

    Returns the observation that the row begins with, and the demonstration as it was played.
    """
    calls = [[{"name": tool["function"]["name"], "arguments": {}}] for tool in side.tools]
    for action in (NONSENSE, *map(action_of, calls)):
        first = await env.reset(row.task)
        _check_text_side(side, first)
        last = await env.step(action)
        side.show(last, first=False)
        await env.finish(last)
    demo = Demonstration.of(row.metadata)
    return first, await play_demonstration(env, side, demo) if demo.actions else demo


def _check_text_side(side: TextSide, observation: Observation) -> None:
    """Raises Failure where a method does not do what the episode loop needs."""
    shown = [side.show(observation, first) for first in (True, False)]
    faults = [] if side.rules().text.strip() else ["system_prompt is empty"]
    faults += [] if all(text.strip() for text in shown) else ["render gives an empty user turn"]
    for action in () if side.tools else observation.admissible[:3]:
        response = side.format(action)
        if (parsed := side.parse(response)) != (action, True):
            said = f"parse_action makes {parsed} of {response!r}, format_action's response for {action!r}"
            faults.append(f"{said}: it must be ({action!r}, True)")
    if faults:
        raise Failure("env_error", f"{side.environment.__name__}.{faults[0]}")


async def _play_in_turn(envs: Sequence[BorrowedEnvironment], rows: Sequence[Row]) -> list[list[Observation]]:
    """What each answers to its row's demonstration, or to listed actions and nonsense: an action of each in turn.

    Raises:
        Failure: what an environment does wrong.
    """
    played = [(env, row, [await env.reset(row.task)]) for env, row in zip(envs, rows, strict=True)]
    for turn in range(IN_TURN):
        for env, row, seen in played:
            actions = Demonstration.of(row.metadata).actions[turn : turn + 1] or seen[-1].admissible or (NONSENSE,)
            if not seen[-1].over:
                seen.append(await env.step(actions[0]))
    return [seen for _, _, seen in played]


async def _check_neighbours(envs: Sequence[BorrowedEnvironment], rows: Sequence[Row], source: str) -> None:
    """Raises ConfigError where they answer otherwise beside a neighbour, though alone twice the same; Failure."""
    alone, again = [[(await _play_in_turn(envs[:1], [row]))[0] for row in rows] for _ in range(2)]
    if alone != again:
        return  # it is never the same
    try:
        together, said = await _play_in_turn(envs, rows), "answers otherwise"
    except Failure as failure:
        together, said = [], f"fails ({failure})"
    if together != alone:
        raise ConfigError(
            f"the environment {said} where {place(rows[0], source)} and {place(rows[-1], source)} are played in turn, "
            "on two environments of one process: keep in the object what they share (the global random generator, the "
            "current folder, an environment variable, a signal handler, a module's cache), or set "
            "tcod_envs_per_worker: 1"
        )


def play_rows(config: TcodConfig, rows: Sequence[Row], source: str) -> Played:
    """Play rows in one process: all on an environment, the first one on another, and two in turn. Needs Ray.

    Args:
        source: the file of the rows, for the message.

    Raises:
        ConfigError: with the first row that cannot be played, and why.
    """
    new_side = text_side_factory(config)

    async def play() -> Played:
        pool, played = new_pool(config, 1, 2), []
        try:
            async with pool.borrow() as one, pool.borrow() as other:
                for env, row in (*((one, row) for row in rows), (other, rows[0])):
                    with _naming(new_side(row.task), row, source):
                        played.append(await _play(env, new_side(row.task), row))
                if config.tcod_envs_per_worker > 1:
                    with _naming(new_side(rows[0].task), rows[0], source):
                        await _check_neighbours((one, other), (rows[0], rows[-1]), source)
                return Played(played[0][0], [demo for _, demo in played[:-1]], one.calls + other.calls)
        finally:
            await pool.close()

    return asyncio.run(play())


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` rows, evenly spaced over the file, whose parts are often of different kinds."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else list(rows)


def report(calls: Sequence[tuple[str, float]], episodes: int) -> str:
    """What a reset and a step cost, and settings for `episodes` at once; `calls` as Played has them."""
    resets, steps = [[seconds for of, seconds in calls if of == method] for method in ("reset", "step")]
    step_s = fmean(steps)
    per_worker = max(1, min(16, int(LOAD * TURN_S / max(step_s, 1e-3))))
    workers = -(-episodes // per_worker)
    lines = [
        f"seconds per reset: mean {fmean(resets):.3f}, largest {max(resets):.3f} (the first starts its worker)",
        f"seconds per step: mean {step_s:.3f}, largest {max(steps):.3f}",
        f"for {episodes} episodes at once (--concurrency): tcod_env_workers: {workers}, tcod_envs_per_worker: "
        f"{per_worker}; they take {episodes * step_s / TURN_S:.1f} cores",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML of tcod_* settings")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL rows to train on")
    parser.add_argument("--count", type=at_least(1), default=8, help="rows to play, default: %(default)s")
    parser.add_argument("--record", type=Path, metavar="OUT", help="see above")
    parser.add_argument(
        "--concurrency", type=at_least(1), default=CONCURRENCY, help="episodes at once, default: %(default)s"
    )
    options = parser.parse_args()
    with one_sentence("check_environment", options.record):
        if options.record:
            check_writable(options.record)
        config = TcodConfig.read(options.config)
        check_environment_class(config)
        rows = read_rows(options.rows)
        check_training_rows(config, rows, str(options.rows), recorded=not options.record)
        start_ray(workers=1)
        written: list[dict[str, Any]] = []
        for own, group in by_environment(config, rows, str(options.rows)):
            chosen = group if options.record else spread(group, options.count)
            played = play_rows(own, chosen, str(options.rows))
            tasks = zip(chosen, played.demos, strict=True)
            written += [Task("", row.label, row.task, goal=row.prompt, demo=demo).row() for row, demo in tasks]
            print(report(played.calls, options.concurrency))
            more = "" if len(chosen) == len(group) else f" (--count {len(group)} plays all)"
            demos = sum(bool(demo.actions) for demo in played.demos)
            of = f" of {own.name}" if own.name else ""
            print(f"{options.rows}: {len(chosen)} of {len(group)} rows{of} play{more}, {demos} demonstrations replay")
        if options.record:
            write_jsonl(options.record, written)


if __name__ == "__main__":
    main()
