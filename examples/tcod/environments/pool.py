"""The pool of engine processes that the rollout borrows environments from.

Engines run in Ray actors: each actor is one single-threaded process that hosts several engines, built on first use and
reused for every later episode.
"""

import asyncio
import contextlib
import functools
import io
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from .. import Failure, words
from .protocol import Environment, Observation, checked_observation, load_environment

WORKER_CPUS = 0.25  # What a worker asks Ray for: small, so that workers fit beside the placement groups of the GPUs.
START_TIMEOUT_S = 300.0  # For a worker process to be scheduled and to import the environment's module.
CLOSE_TIMEOUT_S = 10.0  # For all engines of a worker to close.
KEPT_CHARS = 2000  # of what an engine printed


class EngineError(Exception):
    """What an engine did wrong, in words: its own exception may have no way from one process to another."""


class _EngineHost:
    """Body of a worker process: engines by slot. Runs one call at a time, in the order in which they were made."""

    def __init__(self, environment: str, data_root: str, env_args: dict[str, Any]) -> None:
        self._path, self._data_root, self._env_args = environment, data_root, env_args
        self._engines: dict[int, Environment] = {}
        self._printed = ""

    def ready(self) -> None:
        """Import the environment's module. Raises EngineError."""
        try:
            self._environment = load_environment(self._path)
        except BaseException as error:
            raise EngineError(str(error)) from None

    def call(self, slot: int, method: str, argument: Any) -> Observation:
        """Have an engine do something; the first call builds it. Raises EngineError, whatever the engine does."""
        doing, printed = "__init__", io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                if slot not in self._engines:
                    self._engines[slot] = self._environment(self._data_root, **self._env_args)
                doing = method
                value = getattr(self._engines[slot], method)(argument)
        except BaseException as error:  # an engine may even call sys.exit
            said = printed.getvalue().strip()
            said = f"; it printed {said[-200:]!r}" if said else ""
            raise EngineError(f"{self._environment.__name__}.{doing} raised {words(error)}{said}") from None
        else:
            return checked_observation(value, f"{self._environment.__name__}.{method}")
        finally:
            self._printed = (self._printed + printed.getvalue())[-KEPT_CHARS:]

    def inspect(self) -> tuple[float, str]:
        """Memory in MB of this process and those that its engines started, and the end of what they printed."""
        import psutil

        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return sum(process.memory_info().rss for process in family) / 2**20, self._printed

    def close(self) -> None:
        for engine in self._engines.values():
            with contextlib.suppress(Exception, SystemExit):
                engine.close()


@functools.cache  # Ray exports and keeps every class that it is given
def _engine_actor() -> Any:
    import ray  # here, so that importing the recipe's hooks needs no Ray

    return ray.remote(_EngineHost)


class _Worker:
    """A worker process as the pool sees it. The process starts with the first call."""

    def __init__(self, environment: str, data_root: str, env_args: Mapping[str, Any], engines: int) -> None:
        self.free_slots = list(range(engines))
        self._killed = False
        self._arguments = (environment, data_root, dict(env_args))
        self._start: asyncio.Task[Any] | None = None
        self._last: asyncio.Future[Any] | None = None

    async def call(self, timeout_s: float, slot: int, method: str, argument: Any) -> Observation:
        """Have the engine in a slot do something, for at most `timeout_s`; time behind other calls is not counted.

        Raises:
            Failure: env_error, env_timeout or env_worker_died.
        """
        actor = await self._started()
        # A task of its own: the call of a cancelled borrower goes on in the worker, and so does its time limit.
        call = asyncio.create_task(self._call(actor, timeout_s, slot, method, argument))
        call.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(call)

    async def _call(self, actor: Any, timeout_s: float, slot: int, method: str, argument: Any) -> Observation:
        from ray.exceptions import RayError, RayTaskError

        reply = asyncio.ensure_future(actor.call.remote(slot, method, argument))
        before, self._last = self._last, reply
        if before is not None:
            await asyncio.wait([before])  # the worker runs one call at a time: this one begins now
        try:
            return await asyncio.wait_for(reply, timeout_s)
        except RayTaskError as error:  # First: it is also an instance of what the host raised.
            raise Failure("env_error", str(error.cause)) from error
        except RayError as error:
            detail = "another engine of its process hung" if self._killed else f"its process ended: {error}"
            raise Failure("env_worker_died", f"{method} got no answer, {detail}") from error
        except asyncio.TimeoutError as error:
            await self._kill()
            raise Failure("env_timeout", f"{method} took more than {timeout_s} s") from error

    async def inspect(self) -> tuple[float, str]:
        """Memory in MB of the worker, and the end of what its engines printed."""
        actor = await self._started()
        return await actor.inspect.remote()

    async def end(self) -> None:
        """Close the engines and end the process, if it started."""
        if self._start is None or self._killed or not self._start.done() or self._start.exception():
            return
        with contextlib.suppress(Exception):  # it may have ended by itself
            await asyncio.wait_for(self._start.result().close.remote(), CLOSE_TIMEOUT_S)
        await self._kill()

    async def _kill(self) -> None:
        if not self._killed:
            import ray

            self._killed = True
            await asyncio.to_thread(ray.kill, self._start.result())

    async def _started(self) -> Any:
        if self._start is None:
            self._start = asyncio.create_task(self._create())
        return await asyncio.shield(self._start)

    async def _create(self) -> Any:
        import ray
        from ray.exceptions import RayError, RayTaskError

        # A worker imports this module and the environment's from where this process found them.
        env_vars = {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}
        options = {"num_cpus": WORKER_CPUS, "scheduling_strategy": "SPREAD", "runtime_env": {"env_vars": env_vars}}
        host = _engine_actor().options(**options)
        actor = await asyncio.to_thread(host.remote, *self._arguments)
        try:
            await asyncio.wait_for(actor.ready.remote(), START_TIMEOUT_S)
        except RayTaskError as error:
            await asyncio.to_thread(ray.kill, actor)
            raise Failure("env_error", str(error.cause)) from error
        except RayError as error:
            raise Failure("env_worker_died", f"a worker did not start: {error}") from error
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

    async def finish(self, last: Observation) -> Observation:
        """The final observation of the episode, of which `last` is the last one. Raises Failure."""
        return await self._call("finish", last)

    async def inspect(self) -> tuple[float, str]:
        """Memory in MB of the engine's worker, and the end of what was printed there. Raises Failure."""
        return await self._worker.inspect()

    async def _call(self, method: str, argument: Any) -> Observation:
        started = time.perf_counter()
        try:
            return await self._pool._call(self._worker, self._slot, method, argument)
        finally:
            self.seconds += time.perf_counter() - started


class EnvironmentPool:
    """`workers` processes with `engines_per_worker` engines each, borrowed for one episode at a time.

    A call that takes longer than `timeout_s` has its worker killed. A worker that was killed, died, or has an engine
    that raised gets no new borrowers: a fresh process takes its place, and the old one ends with its last borrower.
    Belongs to the event loop it is used in; never blocks it.
    """

    def __init__(
        self,
        environment: str,
        data_root: str,
        workers: int,
        engines_per_worker: int,
        timeout_s: float,
        env_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._new_worker = functools.partial(_Worker, environment, data_root, env_args or {}, engines_per_worker)
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
                    await worker.end()

    async def close(self) -> None:
        """End all processes; new ones start with the next call. Nothing may be borrowed meanwhile."""
        ended, self._workers = self._workers, [self._new_worker() for _ in self._workers]
        await asyncio.gather(*[worker.end() for worker in ended])

    async def _call(self, worker: _Worker, slot: int, method: str, argument: Any) -> Observation:
        try:
            return await worker.call(self._timeout_s, slot, method, argument)
        except Failure:
            if worker in self._workers:
                self._workers[self._workers.index(worker)] = self._new_worker()
            raise
