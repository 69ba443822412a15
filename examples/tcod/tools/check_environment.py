"""Does an environment play its rows? Run it while you write one; the run script does it before a GPU is taken.

    python -m examples.tcod.tools.check_environment --config tcod.yaml --rows train.jsonl

In a worker process, as in training and with its time limit, some rows are played: reset, rendered, their
demonstrations replayed by the rules of B2F, and a nonsense action sent. Then it prints what an engine costs, and how
many workers and engines that suggests. A fault is one sentence and exit status 1.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import ConfigError, Failure
from ..environments.pool import BorrowedEnvironment, EnvironmentPool
from ..environments.protocol import Environment, Observation, ask, load_environment
from ..episode.demonstration import Demonstration
from ..episode.rows import Row, check_rows, read_rows, task_of
from ..settings.checks import check_environment
from ..settings.config import TcodConfig
from .ray_start import start_ray

NONSENSE = "no such action"
# What the suggestion assumes.
EPISODES = 64  # at once; --episodes
TURN_S = 5.0  # that the student thinks about a turn, under load
LOAD = 0.5  # share of its time for which a worker may be busy, and of the memory that engines may take


@dataclass
class Cost:
    """What was measured: seconds per call, MB of a worker without and with engines, and what engines printed."""

    resets: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    printed: str = ""
    replayed: int = 0
    first: Observation | None = None
    """Of the first row."""

    @property
    def engine_mb(self) -> float:
        """What a further engine takes; the first one's worker has imported its modules too."""
        return self.memory_mb[-1] - self.memory_mb[0]


class _Session:
    """One engine while rows are played on it."""

    def __init__(self, engine: BorrowedEnvironment, environment: type[Environment], cost: Cost) -> None:
        self.engine, self.environment, self.cost = engine, environment, cost

    async def reset(self, metadata: dict[str, Any], shows_list: bool) -> Observation:
        """Begin an episode, and ask the text side all that the episode loop asks it."""
        began = time.perf_counter()
        observation = await self.engine.reset(metadata)
        self.cost.resets.append(time.perf_counter() - began)
        self.cost.first = self.cost.first or observation
        if not ask(self.environment, "system_prompt", metadata).strip():
            raise Failure("env_error", f"{self.environment.__name__}.system_prompt is empty")
        for first in (True, False):
            if not ask(self.environment, "render", observation, first, shows_list).strip():
                raise Failure("env_error", f"{self.environment.__name__}.render gives an empty user turn")
        if observation.won or observation.done:
            raise Failure("env_error", f"{self.environment.__name__}.reset begins an episode that is already over")
        for action in observation.admissible[:3]:
            self.check_round_trip(action)
        return observation

    async def step(self, action: str) -> Observation:
        began = time.perf_counter()
        observation = await self.engine.step(action)
        self.cost.steps.append(time.perf_counter() - began)
        return observation

    def check_round_trip(self, action: str) -> None:
        """Whether the student could say the action. Raises Failure: env_error."""
        response = ask(self.environment, "format_action", action)
        parsed = ask(self.environment, "parse_action", response)
        if parsed != (action, True):
            raise Failure(
                "env_error",
                f"{self.environment.__name__}.parse_action makes {parsed} of {response!r}, which is format_action's "
                f"response for {action!r}: it must be ({action!r}, True)",
            )


async def _play(session: _Session, row: Row, config: TcodConfig) -> None:
    """One row: nonsense, then its demonstration, on the same engine."""
    shows_list, metadata = config.tcod_admissible == "turn", task_of(row.metadata)
    await session.reset(metadata, shows_list)
    await session.engine.finish(await session.step(NONSENSE))
    demo = Demonstration.of(row.metadata)
    if not demo.actions:
        return
    observation = await session.reset(metadata, shows_list)
    for turn, action in enumerate(demo.actions):
        session.check_round_trip(action)
        demo.response(turn, observation, session.environment)
        observation = await session.step(action)
        over = observation.won or observation.done
        demo.check_step(turn, observation, over and turn + 1 < len(demo.actions))
    if not (await session.engine.finish(observation)).won:
        raise Failure("demo_not_won", f"the {len(demo.actions)} actions of its demonstration do not reach the goal")
    session.cost.replayed += 1


def play_rows(config: TcodConfig, rows: Sequence[Row], source: str) -> Cost:
    """Play rows on two engines of one worker. Needs Ray.

    Args:
        source: the file of the rows, for the message.

    Raises:
        ConfigError: with the first row that cannot be played, and why.
    """
    environment = load_environment(config.tcod_environment)
    cost = Cost()

    async def play() -> None:
        pool = EnvironmentPool(
            config.tcod_environment,
            config.tcod_data_root,
            workers=1,
            engines_per_worker=2,
            timeout_s=config.tcod_env_timeout_s,
            env_args=config.tcod_env_args,
        )
        try:
            async with pool.borrow() as first, pool.borrow() as second:
                for engine, played in ((first, rows), (second, rows[:1])):
                    for row in played:
                        await _play_named(_Session(engine, environment, cost), row, config, source)
                    memory_mb, cost.printed = await engine.inspect()
                    cost.memory_mb.append(memory_mb)
                cost.replayed -= "demo" in rows[0].metadata  # the second engine's, of a row that was counted
        finally:
            await pool.close()

    asyncio.run(play())
    return cost


async def _play_named(session: _Session, row: Row, config: TcodConfig, source: str) -> None:
    try:
        await _play(session, row, config)
    except Failure as failure:
        reason = " ".join(str(failure).split())[:500]
        raise ConfigError(
            f"{config.tcod_environment} does not play the row {str(task_of(row.metadata))[:200]} of {source}, "
            f"{failure.reason}: {reason}"
        ) from failure


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` rows, evenly spaced over the file, whose parts are often of different kinds."""
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))] if count < len(rows) else list(rows)


def report(cost: Cost, episodes: int) -> str:
    """What an engine costs, and settings for `episodes` at once."""
    reset_s, step_s = fmean(cost.resets), fmean(cost.steps)
    lines = [
        f"seconds per reset: mean {reset_s:.3f}, largest {max(cost.resets):.3f} (the first starts worker and engine)",
        f"seconds per step: mean {step_s:.3f}, largest {max(cost.steps):.3f}",
        f"a worker with one engine takes {cost.memory_mb[0]:.0f} MB, each further engine {cost.engine_mb:.0f} MB",
    ]
    per_worker = max(1, min(16, int(LOAD * TURN_S / max(step_s, 1e-3))))
    workers = -(-episodes // per_worker)
    needed_mb = workers * cost.memory_mb[0] + (episodes - workers) * max(cost.engine_mb, 0)
    available_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    lines.append(
        f"for {episodes} episodes at once (--episodes): tcod_env_workers: {workers}, "
        f"tcod_engines_per_worker: {per_worker}; they take {needed_mb / 1024:.1f} GB and "
        f"{episodes * step_s / TURN_S:.1f} cores"
    )
    if needed_mb > LOAD * available_mb:
        lines.append(
            f"that is more than half of this machine's {available_mb / 1024:.0f} GB: spread the workers over nodes, "
            "or play fewer episodes at once (--sglang-server-concurrency)"
        )
    if cost.printed.strip():
        lines.append(f"the engine prints, which training does not show: {cost.printed.strip()[-200:]!r}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML of tcod_* settings")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL rows")
    parser.add_argument("--count", type=int, default=8, help="rows to play, default: %(default)s")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="at once in training, default: %(default)s")
    options = parser.parse_args()
    try:
        config = TcodConfig.read(options.config)
        check_environment(config)
        rows = read_rows(options.rows)
        check_rows(rows, str(options.rows), load_environment(config.tcod_environment), config.tcod_data_root)
        start_ray(workers=1)
        played = spread(rows, options.count)
        cost = play_rows(config, played, str(options.rows))
        print(report(cost, options.episodes))
        more = "" if len(played) == len(rows) else f" (--count {len(rows)} plays all)"
        print(f"{options.rows}: {len(played)} of {len(rows)} rows play{more}, {cost.replayed} demonstrations replay")
    except ConfigError as error:
        sys.exit(f"check_environment: {error}")


if __name__ == "__main__":
    main()
