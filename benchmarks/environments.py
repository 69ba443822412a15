"""What real ALFWorld engines give per second: the recipe's pool against the ways that it replaces.

Every way plays the same random admissible actions in the same generated games of all six task types:

    per episode   a new environment per episode through textworld.gym, blocking, as the paper's code does it (less the
                  scripted expert that it also runs at each step)
    reused        one engine for all episodes, TextWorld as it is installed
    patched       the recipe's engine: the same, with its patches of TextWorld
    pool of N     the recipe's pool: N processes of such engines, a round's episodes at once

They take turns, ROUNDS times, with other games each time; rates are medians over the rounds. Memory is the resident
memory of the processes that hold engines: its growth over these rounds, and of the recipe's engines over as many
episodes again in the same games.
"""

import argparse
import asyncio
import contextlib
import cProfile
import hashlib
import json
import multiprocessing
import os
import pstats
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import ray

from benchmarks import report
from examples.tcod import env_alfworld
from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.environments.pool import EnvironmentPool
from examples.tcod.environments.protocol import Observation
from smoke import make_games

HERE = Path(__file__).resolve().parent
TURNS, ROUNDS, PROFILED = 30, 3, 15
Job = tuple[int, dict[str, Any]]  # seed of the actions, row
Played = list[tuple[int, str]]  # steps and a digest of what was said, per episode


class EnvironmentPerEpisode:
    """The paper's way."""

    def __init__(self, data_root: str) -> None:
        self._data_root = data_root

    def reset(self, metadata: dict[str, Any]) -> Observation:
        import textworld.gym
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        game = os.path.join(self._data_root, metadata["game_file"])
        self._env = textworld.gym.make(textworld.gym.register_game(game, infos, wrappers=[AlfredDemangler]))
        text, state = self._env.reset()
        return self._observation(text, state)

    def step(self, action: str) -> Observation:
        text, _, _, state = self._env.step(action)
        return self._observation(text, state)

    @staticmethod
    def _observation(text: str, state: dict[str, Any]) -> Observation:
        text = text.replace(env_alfworld._BANNER, "").strip()
        return Observation(text, won=bool(state["won"]), admissible=tuple(state["admissible_commands"]))


def unpatched(data_root: str) -> AlfworldEnvironment:
    env_alfworld.speed_up_textworld = lambda: None
    return AlfworldEnvironment(data_root)


ENGINES = {"per episode": EnvironmentPerEpisode, "reused": unpatched, "patched": AlfworldEnvironment}


class Transcript:
    """The actions of one episode, and a digest of it."""

    def __init__(self, seed: int) -> None:
        self.steps, self._random, self._hash = 0, random.Random(seed), hashlib.sha256()

    def next(self, observation: Observation) -> str | None:
        """The next action; None at the end."""
        self._hash.update(repr((observation.text, observation.admissible)).encode())
        if observation.won or self.steps == TURNS:
            return None
        self.steps += 1
        return self._random.choice(observation.admissible)

    def result(self) -> tuple[int, str]:
        return self.steps, self._hash.hexdigest()


def play(engine: Any, jobs: list[Job]) -> Played:
    """One episode after the other."""
    played = []
    for seed, row in jobs:
        transcript = Transcript(seed)
        action = transcript.next(engine.reset(row["metadata"]))
        while action is not None:
            action = transcript.next(engine.step(action))
        played.append(transcript.result())
    return played


class OneEngine:
    """A way that blocks, in a process of its own."""

    def __init__(self, name: str, data_root: Path) -> None:
        self._pipe, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=self._serve, args=(name, str(data_root), there), daemon=True)
        self._process.start()
        self.pids = [self._process.pid]

    @staticmethod
    def _serve(name: str, data_root: str, pipe: Any) -> None:
        engine = ENGINES[name](data_root)
        while task := pipe.recv():
            jobs, profiled = task
            profile = cProfile.Profile() if profiled else contextlib.nullcontext()
            with profile:
                played = play(engine, jobs)
            pipe.send(top(pstats.Stats(profile)) if profiled else played)

    def play(self, jobs: list[Job], profiled: bool = False) -> Any:
        self._pipe.send((jobs, profiled))
        return self._pipe.recv()

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join()


class Pool:
    """The recipe's pool."""

    def __init__(self, workers: int, data_root: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = EnvironmentPool(".env_alfworld.AlfworldEnvironment", str(data_root), workers, 16, timeout_s=120)
        self._loop, self.pids = loop, []

    def play(self, jobs: list[Job]) -> Played:
        before = engine_hosts()
        played = self._loop.run_until_complete(self._play(jobs))
        self.pids += engine_hosts() - before
        return played

    async def _play(self, jobs: list[Job]) -> Played:
        return await asyncio.gather(*(self._episode(seed, row) for seed, row in jobs))

    async def _episode(self, seed: int, row: dict[str, Any]) -> tuple[int, str]:
        transcript = Transcript(seed)
        async with self._pool.borrow() as environment:
            action = transcript.next(await environment.reset(row["metadata"]))
            while action is not None:
                action = transcript.next(await environment.step(action))
        return transcript.result()


def engine_hosts() -> set[int]:
    """Ids of all worker processes of pools."""
    titles = {child.pid: child.cmdline()[:1] for child in psutil.Process().children(recursive=True)}
    return {pid for pid, title in titles.items() if title and title[0].startswith("ray::_EngineHost")}


def resident_mb(pids: list[int]) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid in pids) / 1e6


def top(stats: pstats.Stats) -> list[dict[str, Any]]:
    """The functions in which most time is spent, by what they and all that they call take."""
    rows = []
    for (file, _, name), (_, calls, own, cumulative, _) in stats.stats.items():
        place = "/".join(Path(file).parts[-2:]) if file != "~" else "built in"
        shares = {"share": cumulative / stats.total_tt, "own share": own / stats.total_tt}
        rows.append({"function": f"{place} {name}", "calls": calls, **shares})
    return sorted(rows, key=lambda row: -row["share"])[:PROFILED]


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps per second of ALFWorld engines, and their memory.")
    parser.add_argument("--games", type=int, default=18, help="games per round")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="of the pool")
    parser.add_argument("--out", type=Path, default=HERE.parent / "smoke" / "out" / "environments", help="the games")
    options = parser.parse_args()
    rounds = ROUNDS + 1  # the first one starts processes, imports and makes engines
    make_games.make_games(options.out, rounds * options.games, 0, list(make_games.TASKS))
    rows = [json.loads(line) for line in (options.out / "train.jsonl").read_text().splitlines()]
    jobs = [list(enumerate(rows))[i * options.games : (i + 1) * options.games] for i in range(rounds)]

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="warning", log_to_driver=False)
    loop = asyncio.new_event_loop()
    ways: dict[str, Any] = {name: OneEngine(name, options.out) for name in ENGINES}
    ways |= {f"pool of {workers}": Pool(workers, options.out, loop) for workers in options.processes}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[float]] = {name: [] for name in ways}
    steps = []
    for number, batch in enumerate(jobs):
        said = set()
        for name, way in ways.items():
            started = time.monotonic()
            played = way.play(batch)
            seconds[name].append(time.monotonic() - started)
            memory[name].append(resident_mb(way.pids))
            said.add(tuple(played))
        assert len(said) == 1, "the ways differ in what they say"
        steps.append(sum(count for count, _ in played))
        print(f"round {number}: " + ", ".join(f"{name} {of[-1]:.1f} s" for name, of in seconds.items()))
    recipes = [name for name in ways if name not in ("per episode", "reused")]
    for name in recipes:
        for batch in jobs[1:]:
            ways[name].play(batch)
        memory[name].append(resident_mb(ways[name].pids))
    profile = ways["patched"].play(jobs[0], profiled=True)
    for name in ENGINES:
        ways[name].end()

    rates = {n: median(count / s for count, s in zip(steps[1:], of[1:], strict=True)) for n, of in seconds.items()}
    hundreds = ROUNDS * options.games / 100
    table = [
        {
            "way": name,
            "episodes / s": median(options.games / s for s in seconds[name][1:]),
            "steps / s": rates[name],
            "/ per episode": rates[name] / rates["per episode"],
            "MB": memory[name][-1],
            "MB per 100 episodes": (memory[name][ROUNDS] - memory[name][0]) / hundreds,
            "again": (memory[name][-1] - memory[name][ROUNDS]) / hundreds if name in recipes else None,
        }
        for name in ways
    ]
    print(report.table(table))
    print(f"where the time of the patched engine goes:\n{report.table(profile)}")
    more = {"turns": TURNS, "games_per_round": options.games, "steps_per_round": steps[1:], "seconds": seconds}
    print(f"written to {report.write('environments', table, **more, profile_of_patched=profile)}")
    ray.shutdown()


if __name__ == "__main__":
    main()
