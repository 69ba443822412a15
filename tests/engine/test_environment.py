"""The pool of examples/tcod/environments/pool.py on real Ray, with a small environment that fails on request."""

import asyncio
import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from examples.tcod import Failure
from examples.tcod.environments import pool as environment_pool
from examples.tcod.environments.pool import EnvironmentPool
from examples.tcod.environments.protocol import Environment, Observation
from smoke import hooks

NUM_GPUS = 0
PATIENT_S = 300.0  # a time limit that no test waits for
pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("real_ray")]


class Counter(Environment):
    """Says which process and engine played which step of which episode. An action is the name of a method."""

    built = 0
    check_row = staticmethod(lambda metadata, data_root: None)
    system_prompt = staticmethod(lambda metadata: "")

    def __init__(self, data_root: str, prefix: str = "") -> None:
        Counter.built += 1
        self.process, self.name = f"{prefix}{os.getpid()}", f"{prefix}{os.getpid()}/{Counter.built}"
        self.folder = Path(data_root)

    def reset(self, metadata: dict[str, Any]) -> Observation:
        self.episode, self.steps = metadata["episode"], 0
        return Observation(f"{self.name} {self.episode} 0")

    def step(self, action: str) -> Observation:
        getattr(self, action)()
        self.steps += 1
        return Observation(f"{self.name} {self.episode} {self.steps}")

    def finish(self, last: Observation) -> Observation:
        return replace(last, won=True, reward=self.steps / 4)

    def close(self) -> None:
        if self.folder != Path():  # not into the current folder
            (self.folder / f"closed {self.process}").touch()

    def fail(self) -> None:
        raise ValueError("no such door")

    def interrupt(self) -> None:
        raise KeyboardInterrupt

    def exit(self) -> None:
        sys.exit("bad game")

    def hang(self) -> None:
        (self.folder / "hanging").touch()
        time.sleep(3600)

    def wait(self) -> None:
        (self.folder / "waiting").touch()
        while not (self.folder / "gate").exists():
            time.sleep(0.01)

    go = staticmethod(lambda: None)
    slow = staticmethod(lambda: time.sleep(0.6))
    die = staticmethod(lambda: os._exit(1))


@pytest.fixture
def anyio_backend():
    return "asyncio"


def make_pool(data_root: Any = "", workers: int = 1, engines: int = 2, **more: Any) -> EnvironmentPool:
    return EnvironmentPool(f"{__name__}.Counter", str(data_root), workers, engines, PATIENT_S, **more)


async def play(pool: EnvironmentPool, episode: Any, actions: list[str]) -> tuple[str, list[str]]:
    """Play one episode; returns the engine's name and what it said about episode and step."""
    async with pool.borrow() as env:
        said = [await env.reset({"episode": episode})]
        said += [await env.step(action) for action in actions]
    [name] = {observation.text.split(" ", 1)[0] for observation in said}
    return name, [observation.text.split(" ", 1)[1] for observation in said]


async def failure(episode: Any) -> tuple[str, str]:
    with pytest.raises(Failure) as caught:
        await episode
    return caught.value.reason, str(caught.value)


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def process_of(name: str) -> Path:
    return Path("/proc") / name.split("/")[0]


async def test_engines_are_reused_and_never_shared():
    pool = make_pool(workers=2, engines=2)
    results = await asyncio.gather(*[play(pool, i, ["go"] * 3) for i in range(12)])
    for i, (_, said) in enumerate(results):
        assert said == [f"{i} {step}" for step in range(4)]
    engines = {name for name, _ in results}
    assert len(engines) == 4
    assert len({process_of(name) for name in engines}) == 2


async def test_an_engine_that_raised_is_replaced_and_its_neighbours_finish():
    pool = make_pool()
    async with pool.borrow() as neighbour:
        old = (await neighbour.reset({"episode": "neighbour"})).text
        assert await failure(play(pool, "", ["fail"])) == (
            "env_error",
            "Counter.step raised ValueError: no such door",
        )
        name, said = await play(pool, "next", ["go"])
        assert said == ["next 0", "next 1"]
        assert process_of(name) != process_of(old)
        assert (await neighbour.step("go")).text.endswith("neighbour 1")
    await until(lambda: not process_of(old).exists())  # its last borrower has left


async def test_an_engine_that_exits_costs_its_own_episode_only():
    pool = make_pool(engines=3)
    async with pool.borrow() as neighbour, pool.borrow() as exits, pool.borrow() as interrupts:
        for engine in (neighbour, exits, interrupts):
            await engine.reset({"episode": "first"})
        said = "Counter.step raised SystemExit: bad game"
        assert await failure(exits.step("exit")) == ("env_error", said)
        assert await failure(interrupts.step("interrupt")) == (
            "env_error",
            "Counter.step raised KeyboardInterrupt",
        )
        assert (await neighbour.step("go")).text.endswith("first 1")


async def test_waiting_behind_neighbours_is_not_hanging():
    """Five calls of 0.6 s on one worker: the last one waits 2.4 s and takes 0.6."""
    pool = make_pool(engines=5)
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(pool.borrow()) for _ in range(5)]
        await asyncio.gather(*(engine.reset({"episode": i}) for i, engine in enumerate(engines)))
        before = engines[0].seconds
        for engine in engines:
            engine._timeout_s = 1.8
        said = await asyncio.gather(*(engine.step("slow") for engine in engines))
    assert [observation.text.split()[1:] for observation in said] == [[str(i), "1"] for i in range(5)]
    assert 0 < before <= engines[0].seconds - 0.6 and engines[4].seconds >= 3.0


async def test_arguments_grades_and_closing_reach_the_engine(tmp_path):
    pool = make_pool(tmp_path, env_args={"prefix": "p"})
    async with pool.borrow() as env:
        first = await env.reset({"episode": "graded"})
        last = await env.finish(await env.step("go"))
    assert first.text.startswith("p") and not first.won
    assert last.won and last.reward == 0.25
    await pool.close()
    name = first.text.split("/")[0]
    assert (tmp_path / f"closed {name}").exists()
    await until(lambda: not process_of(name.removeprefix("p")).exists())


async def test_a_dead_worker_fails_all_its_borrowers_and_is_replaced():
    pool = make_pool()
    async with pool.borrow() as neighbour:
        await neighbour.reset({"episode": "neighbour"})
        reason, said = await failure(play(pool, "dies", ["die"]))
        assert reason == "env_worker_died" and len(said) < 150
        assert said.startswith("step got no answer, its process ended: os._exit, a crash, or killed")
        assert (await failure(neighbour.step("go")))[0] == "env_worker_died"
    _, said = await play(pool, "next", ["go"])
    assert said == ["next 0", "next 1"]


async def test_a_hanging_engine_is_killed_and_replaced(tmp_path):
    pool = make_pool(tmp_path)
    async with pool.borrow() as neighbour:
        name = (await neighbour.reset({"episode": "neighbour"})).text
        async with pool.borrow() as env:
            await env.reset({"episode": "hangs"})
            env._timeout_s = 1.0  # from here on: starting a process and an engine are not what is tested
            hanging = asyncio.create_task(failure(env.step("hang")))
            await until((tmp_path / "hanging").exists)
            assert (await failure(neighbour.step("go")))[0] == "env_worker_died"
            assert await hanging == ("env_timeout", "step took more than 1.0 s")
    await until(lambda: not process_of(name).exists())
    _, said = await play(pool, "next", ["go"])
    assert said == ["next 0", "next 1"]


async def test_a_cancelled_borrower_leaves_a_consistent_engine_and_the_loop_runs_on(tmp_path):
    pool = make_pool(tmp_path, engines=1)
    cancelled = asyncio.create_task(play(pool, "cancelled", ["wait", "go"]))
    await until((tmp_path / "waiting").exists)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    following = asyncio.create_task(play(pool, "following", ["go", "go"]))
    await until(lambda: pool._capacity.locked())  # it has borrowed the engine that is still busy
    waiting = asyncio.create_task(play(pool, "waiting", []))
    (tmp_path / "gate").touch()
    _, said = await following
    assert said == ["following 0", "following 1", "following 2"]
    assert (await waiting)[1] == ["waiting 0"]


async def test_a_worker_that_cannot_import_its_environment_says_so():
    async with EnvironmentPool("no_such_module.Engine", "", 1, 1, PATIENT_S).borrow() as env:
        reason, said = await failure(env.reset({}))
    assert reason == "env_error" and "no_such_module is not installed" in said


async def test_a_worker_that_ray_never_schedules_is_a_timeout(monkeypatch):
    monkeypatch.setattr(environment_pool, "WORKER_CPUS", 1000)
    monkeypatch.setattr(environment_pool, "START_TIMEOUT_S", 0.1)
    async with make_pool().borrow() as env:
        reason, said = await failure(env.reset({}))
    assert reason == "env_timeout" and "which needs 1000 CPU that Ray has left, took more than 0.1 s" in said


def test_the_pool_works_inside_an_actor_with_its_own_import_path():
    """slime's rollouts run in an actor whose import path the driver does not share."""
    root = str(hooks.ROOT)

    @ray.remote(num_cpus=0.1, runtime_env={"env_vars": {"PYTHONPATH": ""}})
    def rollout() -> list:
        sys.path.insert(0, root)
        from tests.engine import test_environment as inside  # this file, as the actor imports it

        return asyncio.run(inside.play(inside.make_pool(engines=1), "inside", ["go"]))[1]

    assert ray.get(rollout.remote()) == ["inside 0", "inside 1"]
