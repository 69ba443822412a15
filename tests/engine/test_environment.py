"""The pool of examples/tcod/environment_pool.py on real Ray, with small environments that fail on request."""

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


class Textless(Environment):
    """An environment whose text side no test here reads."""

    check_row = staticmethod(lambda metadata, data_root: None)
    system_prompt = staticmethod(lambda metadata: "")


class Counter(Textless):
    """Says which process and engine played which step of which episode, and misbehaves as its actions say."""

    built = 0

    def __init__(self, data_root: str, prefix: str = "") -> None:
        Counter.built += 1
        self.name = f"{prefix}{os.getpid()}/{Counter.built}"
        self.data_root = Path(data_root)

    def reset(self, metadata: dict[str, Any]) -> Observation:
        self.episode, self.steps = metadata["episode"], 0
        return self._observe()

    def step(self, action: str) -> Observation:
        if action == "raise":
            raise ValueError("no such door")
        if action == "die":
            os._exit(1)
        if action == "exit":
            print("cannot translate")
            sys.exit("bad game")
        if action == "interrupt":
            raise KeyboardInterrupt
        if action == "slow":
            time.sleep(0.6)
        if action == "hang":
            (self.data_root / "hanging").touch()
            time.sleep(3600)
        if action == "wait":
            (self.data_root / "waiting").touch()
            while not (self.data_root / "gate").exists():
                time.sleep(0.01)
        self.steps += 1
        return self._observe()

    def finish(self, last: Observation) -> Observation:
        return replace(last, won=True, reward=self.steps / 4)

    def close(self) -> None:
        if self.data_root != Path():  # not into the current folder
            (self.data_root / f"closed {self.name.split('/')[0]}").touch()

    def _observe(self) -> Observation:
        return Observation(f"{self.name} {self.episode} {self.steps}")


class Unbuildable(Counter):
    def __init__(self, data_root: str) -> None:
        raise RuntimeError("no engine today")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    if ray.is_initialized():
        yield
        return
    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 80 * 2**20}
    ray.init(address="local", num_cpus=64, num_gpus=0, **options)
    yield
    ray.shutdown()


def make_pool(
    data_root: Any = "", workers: int = 1, engines: int = 2, timeout_s: float = PATIENT_S, environment: str = "Counter"
) -> EnvironmentPool:
    return EnvironmentPool(f"{__name__}.{environment}", str(data_root), workers, engines, timeout_s)


async def play(pool: EnvironmentPool, episode: Any, actions: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Play one episode; returns the engine's name and what it said about episode and step."""
    async with pool.borrow() as env:
        said = [await env.reset({"episode": episode})]
        said += [await env.step(action) for action in actions]
    names = {observation.text.split()[0] for observation in said}
    assert len(names) == 1
    return names.pop(), [tuple(observation.text.split()[1:]) for observation in said]


async def failure(episode: Any) -> str:
    with pytest.raises(Failure) as caught:
        await episode
    return caught.value.reason


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def process_of(name: str) -> Path:
    return Path("/proc") / name.split("/")[0]


def test_engines_are_reused_and_never_shared():
    async def main():
        pool = make_pool(workers=2, engines=2)
        results = await asyncio.gather(*[play(pool, i, ["go"] * 3) for i in range(12)])
        return results

    results = asyncio.run(main())
    for i, (_, said) in enumerate(results):
        assert said == [(str(i), str(step)) for step in range(4)]
    engines = {name for name, _ in results}
    assert len(engines) == 4
    assert len({process_of(name) for name in engines}) == 2


def test_borrowers_wait_for_a_free_engine_and_calls_are_timed():
    async def main():
        pool = make_pool(engines=1)
        async with pool.borrow() as env:
            waiting = asyncio.create_task(play(pool, "second", []))
            await env.reset({"episode": "first"})
            assert not waiting.done()
            before = env.seconds
            await env.step("go")
            assert 0 < before < env.seconds
        _, said = await waiting
        assert said == [("second", "0")]

    asyncio.run(main())


def test_the_event_loop_runs_on_while_an_engine_is_busy(tmp_path):
    async def main():
        pool = make_pool(tmp_path, engines=1)
        episode = asyncio.create_task(play(pool, "slow", ["wait"]))
        await until((tmp_path / "waiting").exists)  # a blocked loop would never open the gate
        (tmp_path / "gate").touch()
        await episode

    asyncio.run(main())


def test_an_engine_that_raised_is_replaced_and_its_neighbours_finish():
    async def main():
        pool = make_pool()
        async with pool.borrow() as neighbour:
            await neighbour.reset({"episode": "neighbour"})
            async with pool.borrow() as env:
                raising = await env.reset({"episode": "raises"})
                with pytest.raises(Failure, match="ValueError: no such door") as caught:
                    await env.step("raise")
                assert caught.value.reason == "env_error"
            name, said = await play(pool, "next", ["go"])
            assert said == [("next", "0"), ("next", "1")]
            assert process_of(name) != process_of(raising.text)
            assert (await neighbour.step("go")).text.endswith("neighbour 1")
        await until(lambda: not process_of(raising.text).exists())  # its last borrower has left

    asyncio.run(main())


@pytest.mark.parametrize(
    "action, detail",
    [
        ("exit", "Counter.step raised SystemExit: bad game; it printed 'cannot translate'"),
        ("interrupt", "Counter.step raised KeyboardInterrupt"),
    ],
)
def test_an_engine_that_exits_costs_its_own_episode_only(action, detail):
    async def main():
        pool = make_pool()
        async with pool.borrow() as neighbour:
            await neighbour.reset({"episode": "neighbour"})
            with pytest.raises(Failure) as caught:
                await play(pool, "exits", [action])
            assert (caught.value.reason, str(caught.value)) == ("env_error", detail)
            assert (await neighbour.step("go")).text.endswith("neighbour 1")

    asyncio.run(main())


def test_waiting_behind_a_neighbour_is_not_hanging():
    """Eight calls of 0.6 s on one worker: the last one waits 4 s and takes 0.6."""

    async def main():
        pool = make_pool(engines=8)
        async with contextlib.AsyncExitStack() as stack:
            engines = [await stack.enter_async_context(pool.borrow()) for _ in range(8)]
            await asyncio.gather(*(engine.reset({"episode": i}) for i, engine in enumerate(engines)))
            pool._timeout_s = 1.5
            said = await asyncio.gather(*(engine.step("slow") for engine in engines))
        assert [observation.text.split()[1:] for observation in said] == [[str(i), "1"] for i in range(8)]

    asyncio.run(main())


def test_arguments_grades_and_closing_reach_the_engine(tmp_path):
    async def main():
        pool = EnvironmentPool(f"{__name__}.Counter", str(tmp_path), 1, 2, PATIENT_S, {"prefix": "p"})
        async with pool.borrow() as env:
            first = await env.reset({"episode": "graded"})
            last = await env.finish(await env.step("go"))
        assert first.text.startswith("p") and not first.won
        assert last.won and last.reward == 0.25
        await pool.close()
        name = first.text.split("/")[0]
        assert (tmp_path / f"closed {name}").exists()
        await until(lambda: not process_of(name.removeprefix("p")).exists())

    asyncio.run(main())


def test_a_dead_worker_fails_all_its_borrowers_and_is_replaced():
    async def main():
        pool = make_pool()
        async with pool.borrow() as neighbour:
            await neighbour.reset({"episode": "neighbour"})
            assert await failure(play(pool, "dies", ["die"])) == "env_worker_died"
            assert await failure(neighbour.step("go")) == "env_worker_died"
        _, said = await play(pool, "next", ["go"])
        assert said == [("next", "0"), ("next", "1")]

    asyncio.run(main())


def test_a_hanging_engine_is_killed_and_replaced(tmp_path):
    async def main():
        pool = make_pool(tmp_path)
        async with pool.borrow() as neighbour:
            name = (await neighbour.reset({"episode": "neighbour"})).text
            async with pool.borrow() as env:
                await env.reset({"episode": "hangs"})
                pool._timeout_s = 1.0  # from here on: starting a process and an engine are not what is tested
                hanging = asyncio.create_task(failure(env.step("hang")))
                await until((tmp_path / "hanging").exists)
                pool._timeout_s = PATIENT_S
                assert await failure(neighbour.step("go")) == "env_worker_died"
                assert await hanging == "env_timeout"
        await until(lambda: not process_of(name).exists())
        _, said = await play(pool, "next", ["go"])
        assert said == [("next", "0"), ("next", "1")]

    asyncio.run(main())


def test_a_cancelled_borrower_leaves_a_consistent_engine(tmp_path):
    async def main():
        pool = make_pool(tmp_path, engines=1)
        cancelled = asyncio.create_task(play(pool, "cancelled", ["wait", "go"]))
        await until((tmp_path / "waiting").exists)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        following = asyncio.create_task(play(pool, "following", ["go", "go"]))
        await until(lambda: pool._capacity.locked())  # it has borrowed the engine that is still busy
        (tmp_path / "gate").touch()
        _, said = await following
        assert said == [("following", "0"), ("following", "1"), ("following", "2")]

    asyncio.run(main())


def test_an_engine_that_cannot_be_built_is_an_environment_error():
    async def main():
        async with make_pool(environment="Unbuildable").borrow() as env:
            with pytest.raises(Failure, match="no engine today") as caught:
                await env.reset({})
            assert caught.value.reason == "env_error"

    asyncio.run(main())


def test_a_worker_that_cannot_import_its_environment_says_so():
    async def main():
        pool = EnvironmentPool("no_such_module.Engine", "", 1, 1, PATIENT_S)
        async with pool.borrow() as env:
            with pytest.raises(Failure, match="no_such_module") as caught:
                await env.reset({})
            assert caught.value.reason == "env_error"

    asyncio.run(main())


def test_a_worker_that_ray_never_schedules_is_a_timeout(monkeypatch):
    monkeypatch.setattr(environment_pool, "WORKER_CPUS", 1000)
    monkeypatch.setattr(environment_pool, "START_TIMEOUT_S", 0.1)

    async def main():
        async with make_pool().borrow() as env:
            with pytest.raises(Failure, match="each needs 1000 CPU") as caught:
                await env.reset({})
            assert caught.value.reason == "env_timeout"

    asyncio.run(main())


def test_the_pool_works_inside_an_actor_with_its_own_import_path():
    """slime's rollouts run in an actor whose import path the driver does not share."""
    root = str(hooks.ROOT)

    @ray.remote(num_cpus=0.1, runtime_env={"env_vars": {"PYTHONPATH": ""}})
    def rollout() -> list:
        sys.path.insert(0, root)
        from tests.engine import test_environment as inside  # this file, as the actor imports it

        return asyncio.run(inside.play(inside.make_pool(engines=1), "inside", ["go"]))[1]

    assert ray.get(rollout.remote()) == [("inside", "0"), ("inside", "1")]
