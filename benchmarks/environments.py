"""What real ALFWorld engines give per second: the recipe's pool against the ways that it replaces.

Every way plays the same random admissible actions in the same generated games of all six task types:

    per episode   a new environment per episode through textworld.gym, blocking, as the paper's code does it (less the
                  scripted expert that it also runs at each step)
    reused        one engine for all episodes, TextWorld as it is installed
    patched       the recipe's engine: the same, with its patches of TextWorld
    pool of N     the recipe's pool: N processes of such engines, a round's episodes at once

They take turns, ROUNDS times, with other games each time; rates are medians over the rounds. The benchmark ends where
they do not say the same, or TextWorld is patched in the first two. Memory is the resident memory of the processes that
hold engines: its growth over these rounds, and of the recipe's engines over as many episodes again in the same games.
"""

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
OUT = HERE.parent / "smoke" / "out" / "environments"
TURNS, ROUNDS, PROFILED = 30, 3, 15
BANNER = "-= Welcome to TextWorld, ALFRED! =-"
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
        text = text.replace(BANNER, "").strip()
        actions = tuple(action for action in state["admissible_commands"] if action != "help")  # as the recipe's
        return Observation(text, won=bool(state["won"]), admissible=actions)


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
        from textworld.envs.pddl import textgen

        patched = textgen._parse_and_convert.__module__ != textgen.__name__
        assert patched == (name == "patched"), f"{name}: TextWorld is {'' if patched else 'not '}patched"
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
        assert self.pids, "no process of the pool was found: its worker class has another name"
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
    return {pid for pid, title in titles.items() if title and title[0].startswith("ray::_EnvironmentHost")}


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


def play_rounds(ways: dict[str, Any], jobs: list[list[Job]]) -> dict[str, list[tuple[int, float, float]]]:
    """{way: (steps, seconds, resident MB afterwards) of each round}. Raises AssertionError where the ways differ."""
    left = {name: iter(jobs) for name in ways}
    said: dict[str, list[Played]] = {name: [] for name in ways}

    def one_round(name: str) -> tuple[int, float, float]:
        started = time.monotonic()
        said[name].append(ways[name].play(next(left[name])))
        seconds = time.monotonic() - started
        return sum(steps for steps, _ in said[name][-1]), seconds, resident_mb(ways[name].pids)

    found = report.in_turns(ways, len(jobs), one_round)
    assert all(played == said["patched"] for played in said.values()), "the ways differ in what they say"
    return found


def main() -> None:
    options = report.options(__doc__, {"games": (18, "games per round"), "processes": ([1, 2, 4], "of the pool")})
    games, rounds = options.games, ROUNDS + 1  # the first round starts processes, imports and makes engines
    make_games.make_games(OUT, rounds * games, 0, list(make_games.TASKS))
    rows = [json.loads(line) for line in (OUT / "train.jsonl").read_text().splitlines()]
    jobs = [list(enumerate(rows))[i * games : (i + 1) * games] for i in range(rounds)]
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="warning", log_to_driver=False)
    loop = asyncio.new_event_loop()
    ways: dict[str, Any] = {name: OneEngine(name, OUT) for name in ENGINES}
    ways |= {f"pool of {workers}": Pool(workers, OUT, loop) for workers in options.processes}
    found = play_rounds(ways, jobs)
    memory = {name: [mb for *_, mb in each] for name, each in found.items()}
    rates = {name: median(steps / s for steps, s, _ in each[1:]) for name, each in found.items()}
    recipes = [name for name in ways if name not in ("per episode", "reused")]
    for name in recipes:  # as many episodes again, in the same games
        for batch in jobs[1:]:
            ways[name].play(batch)
        memory[name].append(resident_mb(ways[name].pids))
    profile = ways["patched"].play(jobs[0], profiled=True)
    for name in ENGINES:
        ways[name].end()

    hundreds = ROUNDS * games / 100
    table = [
        {
            "way": name,
            "episodes / s": median(games / s for _, s, _ in found[name][1:]),
            "steps / s": rates[name],
            "/ per episode": rates[name] / rates["per episode"],
            "MB": mb[-1],
            "MB per 100 episodes": (mb[ROUNDS] - mb[0]) / hundreds,
            "again": (mb[-1] - mb[ROUNDS]) / hundreds if name in recipes else None,
        }
        for name, mb in memory.items()
    ]
    report.publish("environments", table, profile_of_patched=profile, turns=TURNS, games_per_round=games)
    ray.shutdown()


if __name__ == "__main__":
    main()
