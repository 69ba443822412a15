"""Does an environment play its rows? Run it while you write one; the run script does it before a GPU is taken.

    python -m examples.tcod.tools.check_environment --config tcod.yaml --rows train.jsonl

All rows are checked as a training run checks them. Some are played in a worker process, with training's time limit:
reset, rendered, a nonsense action sent, and their demonstrations replayed by the rules of B2F. Then it prints what an
engine costs, and how many workers and engines that suggests. A fault is one sentence and exit status 1.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import ConfigError, Failure
from ..environments.pool import BorrowedEnvironment
from ..environments.protocol import Environment, Observation, ask, load_environment
from ..episode.demonstration import Demonstration
from ..episode.rows import Row, place, read_rows
from ..settings.checks import check_environment, check_training_rows
from ..settings.config import TcodConfig
from .command import at_least, new_parser, one_sentence
from .prepare import new_pool, play_demonstration
from .ray_start import start_ray

NONSENSE = "no such action"
# What the suggestion assumes.
EPISODES = 64  # at once; --episodes
TURN_S = 5.0  # that the student thinks about a turn, under load
LOAD = 0.5  # share of its time for which a worker may be busy


@dataclass
class Cost:
    """What was measured: seconds per call, MB of a worker without and with engines, and what engines printed."""

    resets: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    printed: str = ""
    demonstrations: int = 0
    """So many were replayed."""
    first: Observation | None = None
    """Of the first row."""

    @property
    def engine_mb(self) -> float:
        """What a further engine takes; the first one's worker has imported its modules too."""
        return self.memory_mb[-1] - self.memory_mb[0]


class _MeasuredEngine:
    """An engine whose calls are timed. Its resets also ask the text side all that the episode loop asks it."""

    def __init__(self, engine: BorrowedEnvironment, environment: type[Environment], shows_list: bool) -> None:
        self.engine, self.environment, self.shows_list = engine, environment, shows_list
        self.finish, self.cost = engine.finish, Cost()

    async def reset(self, task: dict[str, Any]) -> Observation:
        began = time.perf_counter()
        observation = await self.engine.reset(task)
        self.cost.resets.append(time.perf_counter() - began)
        self.cost.first = self.cost.first or observation
        if not ask(self.environment, "system_prompt", task).strip():
            raise self.fault("system_prompt is empty")
        for first in (True, False):
            if not ask(self.environment, "render", observation, first, self.shows_list).strip():
                raise self.fault("render gives an empty user turn")
        if observation.won or observation.done:
            raise self.fault("reset begins an episode that is already over")
        for action in observation.admissible[:3]:
            response = ask(self.environment, "format_action", action)
            parsed = ask(self.environment, "parse_action", response)
            if parsed != (action, True):
                raise self.fault(
                    f"parse_action makes {parsed} of {response!r}, which is format_action's response for {action!r}: "
                    f"it must be ({action!r}, True)"
                )
        return observation

    async def step(self, action: str) -> Observation:
        began = time.perf_counter()
        observation = await self.engine.step(action)
        self.cost.steps.append(time.perf_counter() - began)
        return observation

    def fault(self, what: str) -> Failure:
        return Failure("env_error", f"{self.environment.__name__}.{what}")


async def _play(engine: _MeasuredEngine, row: Row) -> None:
    """One row: nonsense, then its demonstration, on the same engine."""
    await engine.reset(row.task)
    await engine.finish(await engine.step(NONSENSE))
    demo = Demonstration.of(row.metadata)
    if demo.actions:
        await play_demonstration(engine, engine.environment, row.task, demo)
        engine.cost.demonstrations += 1


def play_rows(config: TcodConfig, rows: Sequence[Row], source: str) -> Cost:
    """Play rows on an engine, and the first one on another engine of the same worker. Needs Ray.

    Args:
        source: the file of the rows, for the message.

    Raises:
        ConfigError: with the first row that cannot be played, and why.
    """
    environment, shows_list = load_environment(config.tcod_environment), config.tcod_admissible == "turn"

    async def play() -> Cost:
        pool, costs = new_pool(config, 1, 2), []
        try:
            async with pool.borrow() as first, pool.borrow() as second:
                for borrowed, played in ((first, rows), (second, rows[:1])):
                    engine = _MeasuredEngine(borrowed, environment, shows_list)
                    for row in played:
                        try:
                            await _play(engine, row)
                        except Failure as failure:
                            raise ConfigError(
                                f"{config.tcod_environment} does not play {place(row, source)}, {failure.reason}: "
                                f"{' '.join(str(failure).split())[:500]}"
                            ) from failure
                    memory_mb, engine.cost.printed = await borrowed.inspect()
                    costs.append(engine.cost)
                    costs[0].memory_mb.append(memory_mb)
        finally:
            await pool.close()
        return costs[0]

    return asyncio.run(play())


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` rows, evenly spaced over the file, whose parts are often of different kinds."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else list(rows)


def report(cost: Cost, episodes: int) -> str:
    """What an engine costs, and settings for `episodes` at once."""
    reset_s, step_s = fmean(cost.resets), fmean(cost.steps)
    per_worker = max(1, min(16, int(LOAD * TURN_S / max(step_s, 1e-3))))
    workers = -(-episodes // per_worker)
    needed_mb = workers * cost.memory_mb[0] + (episodes - workers) * max(cost.engine_mb, 0)
    lines = [
        f"seconds per reset: mean {reset_s:.3f}, largest {max(cost.resets):.3f} (the first starts worker and engine)",
        f"seconds per step: mean {step_s:.3f}, largest {max(cost.steps):.3f}",
        f"a worker with one engine takes {cost.memory_mb[0]:.0f} MB, each further engine {cost.engine_mb:.0f} MB",
        f"for {episodes} episodes at once (--episodes): tcod_env_workers: {workers}, tcod_engines_per_worker: "
        f"{per_worker}; they take {needed_mb / 1024:.1f} GB and {episodes * step_s / TURN_S:.1f} cores",
    ]
    if cost.printed.strip():
        lines.append(f"the engine prints, which training does not show: {cost.printed.strip()[-200:]!r}")
    return "\n".join(lines)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML of tcod_* settings")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL rows to train on")
    parser.add_argument("--count", type=at_least(1), default=8, help="rows to play, default: %(default)s")
    parser.add_argument("--episodes", type=at_least(1), default=EPISODES, help="at once, default: %(default)s")
    options = parser.parse_args()
    with one_sentence("check_environment"):
        config = TcodConfig.read(options.config)
        check_environment(config)
        rows = read_rows(options.rows)
        check_training_rows(config, rows, str(options.rows))
        start_ray(workers=1)
        played = spread(rows, options.count)
        cost = play_rows(config, played, str(options.rows))
    print(report(cost, options.episodes))
    more = "" if len(played) == len(rows) else f" (--count {len(rows)} plays all)"
    print(f"{options.rows}: {len(played)} of {len(rows)} rows play{more}, {cost.demonstrations} demonstrations replay")


if __name__ == "__main__":
    main()
