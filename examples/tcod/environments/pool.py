"""The pool of processes that the rollout borrows environments from.

The processes are Ray actors: each is single-threaded and hosts several environments, built on first use and reused for
every later episode.
"""

import asyncio
import contextlib
import functools
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import Failure, words
from .protocol import Environment, Observation, checked_observation, load_environment

WORKER_CPUS = 0.25  # What a worker asks Ray for: small, so that workers fit beside the placement groups of the GPUs.
START_TIMEOUT_S = 300.0  # For a worker process to be scheduled and to start.
CLOSE_TIMEOUT_S = 10.0  # For all environments of a worker to close.


class _EnvironmentHost:
    """Body of a worker process: environments by slot. Runs one call at a time, in the order of the calls."""

    def __init__(self, environment: str, data_root: str, env_args: dict[str, Any]) -> None:
        self._path, self._data_root, self._env_args = environment, data_root, env_args
        self._environments: dict[int, Environment] = {}

    def call(self, slot: int, method: str, argument: Any) -> Observation:
        """Have an environment do something; the first call builds it. Raises RuntimeError or TypeError."""
        name, doing = self._path.rpartition(".")[2], "__init__"
        try:
            if slot not in self._environments:
                self._environments[slot] = load_environment(self._path)(self._data_root, **self._env_args)
            doing = method
            value = getattr(self._environments[slot], method)(argument)
        except BaseException as error:  # an environment may even call sys.exit
            # In words: its own exception may have no way from one process to another.
            raise RuntimeError(f"{name}.{doing} raised {words(error)}") from None
        observation = checked_observation(value, f"{name}.{method}")
        if method == "reset" and observation.over:  # it would count, whatever the student does
            raise RuntimeError(f"{name}.reset begins an episode that is already over")
        return observation

    def close(self) -> None:
        for environment in self._environments.values():
            with contextlib.suppress(Exception, SystemExit):
                environment.close()


@functools.cache  # Ray exports and keeps every class that it is given
def _actor_class() -> Any:
    import ray  # here, so that importing the recipe's hooks needs no Ray

    return ray.remote(_EnvironmentHost)


class _Worker:
    """A worker process as the pool sees it. `broken`: no more episodes are begun on it."""

    def __init__(self, environment: str, data_root: str, env_args: Mapping[str, Any], slots: int) -> None:
        self.free_slots = list(range(slots))
        self.broken = False
        self.actor: Any = None
        self.last_call: asyncio.Future[Any] | None = None
        self._arguments = (environment, data_root, dict(env_args))
        self._start: asyncio.Task[Any] | None = None

    async def started(self) -> None:
        """Wait for the process, which the first call starts."""
        self._start = self._start or asyncio.create_task(self._create())
        await (await asyncio.shield(self._start))

    async def _create(self) -> Any:
        # A worker imports this module and the environment's from where this process found them.
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        env = {"env_vars": {"PYTHONPATH": path}}
        host = _actor_class().options(num_cpus=WORKER_CPUS, scheduling_strategy="SPREAD", runtime_env=env)
        self.actor = await asyncio.to_thread(host.remote, *self._arguments)
        return self.actor.__ray_ready__.remote()

    async def end(self, close: bool = True) -> None:
        """End the process, if it started; `close` its environments before."""
        import ray

        if self.actor is None:
            return
        if close:
            with contextlib.suppress(Exception):  # it may have ended by itself
                await asyncio.wait_for(self.actor.close.remote(), CLOSE_TIMEOUT_S)
        await asyncio.to_thread(ray.kill, self.actor)


@dataclass
class BorrowedEnvironment:
    """An environment of the pool for one episode. `calls`: each as (its method, the seconds that it took)."""

    _worker: _Worker
    _slot: int
    _timeout_s: float
    calls: list[tuple[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The time of all calls together."""
        return sum(seconds for _, seconds in self.calls)

    async def reset(self, metadata: dict[str, Any]) -> Observation:
        """Begin an episode. Raises Failure."""
        return await self._call("reset", metadata)

    async def step(self, action: str) -> Observation:
        """Execute one action. Raises Failure."""
        return await self._call("step", action)

    async def finish(self, last: Observation) -> Observation:
        """The final observation of the episode, of which `last` is the last one. Raises Failure."""
        return await self._call("finish", last)

    async def _call(self, method: str, argument: Any) -> Observation:
        from ray.exceptions import ActorDiedError, RayError, RayTaskError

        began, worker = time.perf_counter(), self._worker
        doing, limit_s = f"the start of a worker, which needs {WORKER_CPUS} CPU that Ray has left,", START_TIMEOUT_S
        try:
            if worker.last_call is None:
                await asyncio.wait_for(worker.started(), limit_s)
            doing, limit_s = method, self._timeout_s
            reply = asyncio.ensure_future(worker.actor.call.remote(self._slot, method, argument))
            before, worker.last_call = worker.last_call, reply
            if before is not None:
                await asyncio.wait([before])  # the worker runs one call at a time: this one's time begins now
            return await asyncio.wait_for(reply, limit_s)
        except RayTaskError as error:  # First: it is also an instance of what the host raised.
            failure = Failure("env_error", str(error.cause))
        except RayError as error:
            ended = "its process ended: os._exit, a crash, or killed, for memory or because a neighbour hung"
            detail = ended if isinstance(error, ActorDiedError) else words(error)
            failure = Failure("env_worker_died", f"{doing} got no answer, {detail}")
        except asyncio.TimeoutError:
            await worker.end(close=False)
            failure = Failure("env_timeout", f"{doing} took more than {limit_s} s")
        finally:
            self.calls.append((method, time.perf_counter() - began))
        worker.broken = True
        raise failure


class EnvironmentPool:
    """`workers` processes with `envs_per_worker` environments each, borrowed for one episode at a time.

    A call that takes longer than `timeout_s` has its worker killed. A worker that was killed, died, or has an
    environment that raised gets no new borrowers: a fresh process takes its place, and the old one ends with its last
    borrower.
    Belongs to the event loop it is used in; never blocks it.
    """

    def __init__(
        self,
        environment: str,
        data_root: str,
        workers: int,
        envs_per_worker: int,
        timeout_s: float,
        env_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._new_worker = functools.partial(_Worker, environment, data_root, env_args or {}, envs_per_worker)
        self._envs_per_worker = envs_per_worker
        self._timeout_s = timeout_s
        self._workers = [self._new_worker() for _ in range(workers)]
        self._capacity = asyncio.Semaphore(workers * envs_per_worker)

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator[BorrowedEnvironment]:
        """Wait for a free environment, on the least busy worker, and hold it for the length of the block."""
        async with self._capacity:
            self._workers = [self._new_worker() if worker.broken else worker for worker in self._workers]
            worker = max(self._workers, key=lambda worker: len(worker.free_slots))
            slot = worker.free_slots.pop(0)
            try:
                yield BorrowedEnvironment(worker, slot, self._timeout_s)
            finally:
                # Safe with a call still under way (a cancelled borrower): the next one's reset queues behind it.
                worker.free_slots.insert(0, slot)
                if worker.broken and len(worker.free_slots) == self._envs_per_worker:
                    await worker.end()

    async def close(self) -> None:
        """End all processes; new ones start with the next call. Nothing may be borrowed meanwhile."""
        ended, self._workers = self._workers, [self._new_worker() for _ in self._workers]
        await asyncio.gather(*[worker.end() for worker in ended])
