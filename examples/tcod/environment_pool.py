"""The pool of engine processes that the rollout borrows environments from.

Engines run in Ray actors: each actor is one single-threaded process that hosts several engines, built on first use and
reused for every later episode.
"""

import asyncio
import contextlib
import functools
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from .environment import Environment, Observation, load_environment
from .errors import Failure

WORKER_CPUS = 0.25  # What a worker asks Ray for: small, so that workers fit beside the placement groups of the GPUs.
START_TIMEOUT_S = 300.0  # For a worker process to be scheduled and to import the environment's module.


class _EngineHost:
    """Body of a worker process: engines by slot. Runs one call at a time, in the order in which they were made."""

    def __init__(self, environment: str, data_root: str) -> None:
        self._make_engine = functools.partial(load_environment(environment), data_root)
        self._engines: dict[int, Environment] = {}

    def ready(self) -> None:
        """Return once the constructor has run."""

    def reset(self, slot: int, metadata: dict[str, Any]) -> Observation:
        if slot not in self._engines:
            self._engines[slot] = self._make_engine()
        return self._engines[slot].reset(metadata)

    def step(self, slot: int, action: str) -> Observation:
        return self._engines[slot].step(action)


@functools.cache  # Ray exports and keeps every class that it is given
def _engine_actor() -> Any:
    import ray  # here, so that importing the recipe's hooks needs no Ray

    return ray.remote(_EngineHost)


class _Worker:
    """A worker process as the pool sees it. The process starts with the first call."""

    def __init__(self, environment: str, data_root: str, engines: int) -> None:
        self.free_slots = list(range(engines))
        self.killed = False
        self._arguments = (environment, data_root)
        self._start: asyncio.Task[Any] | None = None

    async def call(self, timeout_s: float, method: str, *args: Any) -> Observation:
        from ray.exceptions import RayError, RayTaskError

        if self._start is None:
            self._start = asyncio.create_task(self._create())
        actor = await asyncio.shield(self._start)
        try:
            return await asyncio.wait_for(getattr(actor, method).remote(*args), timeout_s)
        except RayTaskError as error:  # First: it is also an instance of what the environment raised.
            raise Failure("env_error", f"{type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            raise Failure("env_worker_died", str(error)) from error
        except asyncio.TimeoutError as error:
            if self.killed:  # This call waited behind the one that hangs.
                raise Failure("env_worker_died", "another engine of the worker hangs") from error
            await self.kill()
            raise Failure("env_timeout", f"{method} took more than {timeout_s} s") from error

    async def kill(self) -> None:
        """End the process, whatever it does. A worker that did not start has none."""
        if not self.killed and not self._start.exception():
            import ray

            self.killed = True
            await asyncio.to_thread(ray.kill, self._start.result())

    async def _create(self) -> Any:
        import ray
        from ray.exceptions import RayError

        # A worker imports this module and the environment's from where this process found them.
        env_vars = {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}
        options = {"num_cpus": WORKER_CPUS, "scheduling_strategy": "SPREAD", "runtime_env": {"env_vars": env_vars}}
        host = _engine_actor().options(**options)
        actor = await asyncio.to_thread(host.remote, *self._arguments)
        try:
            await asyncio.wait_for(actor.ready.remote(), START_TIMEOUT_S)
        except RayError as error:
            raise Failure("env_worker_died", str(error)) from error
        except asyncio.TimeoutError as error:
            await asyncio.to_thread(ray.kill, actor)
            detail = f"no worker started in {START_TIMEOUT_S} s; each needs {WORKER_CPUS} CPU that Ray has left"
            raise Failure("env_timeout", detail) from error
        return actor


class BorrowedEnvironment:
    """One engine of the pool for one episode. `seconds`: wall-clock time that its calls took, in total."""

    def __init__(self, pool: "EnvironmentPool", worker: _Worker, slot: int) -> None:
        self._pool = pool
        self._worker = worker
        self._slot = slot
        self.seconds = 0.0

    async def reset(self, metadata: dict[str, Any]) -> Observation:
        """Begin an episode. Raises Failure."""
        return await self._call("reset", metadata)

    async def step(self, action: str) -> Observation:
        """Execute one action. Raises Failure."""
        return await self._call("step", action)

    async def _call(self, method: str, argument: Any) -> Observation:
        started = time.perf_counter()
        try:
            return await self._pool._call(self._worker, method, self._slot, argument)
        finally:
            self.seconds += time.perf_counter() - started


class EnvironmentPool:
    """`workers` processes with `engines_per_worker` engines each, borrowed for one episode at a time.

    A call that takes longer than `timeout_s` (waiting for other calls on the same worker included) has its worker
    killed. A worker that was killed, died, or has an engine that raised gets no new borrowers: a fresh process takes
    its place, and the old one ends with its last borrower. Belongs to the event loop it is used in; never blocks it.
    """

    def __init__(
        self, environment: str, data_root: str, workers: int, engines_per_worker: int, timeout_s: float
    ) -> None:
        self._new_worker = functools.partial(_Worker, environment, data_root, engines_per_worker)
        self._engines_per_worker = engines_per_worker
        self._timeout_s = timeout_s
        self._workers = [self._new_worker() for _ in range(workers)]
        self._capacity = asyncio.Semaphore(workers * engines_per_worker)

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator[BorrowedEnvironment]:
        """Wait for a free engine, on the least busy worker, and hold it for the length of the block."""
        async with self._capacity:
            worker = max(self._workers, key=lambda worker: len(worker.free_slots))
            slot = worker.free_slots.pop(0)
            try:
                yield BorrowedEnvironment(self, worker, slot)
            finally:
                # Safe with a call still under way (a cancelled borrower): the next one's reset queues behind it.
                worker.free_slots.insert(0, slot)
                if worker not in self._workers and len(worker.free_slots) == self._engines_per_worker:
                    await worker.kill()

    async def _call(self, worker: _Worker, method: str, *args: Any) -> Observation:
        try:
            return await worker.call(self._timeout_s, method, *args)
        except Failure:
            if worker in self._workers:
                self._workers[self._workers.index(worker)] = self._new_worker()
            raise
