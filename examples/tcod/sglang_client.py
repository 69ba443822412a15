"""Requests to SGLang servers, the student's engines and the teacher's alike: time limits, retries, kept connections.

slime's own `post` has no time limit and repeats even a request that the server refuses sixty times. Its client also
searches all connections for every request, so that its cost grows with the number of episodes at once.
"""

import asyncio
import atexit
import contextlib
import itertools
import json
import logging
import random
from collections.abc import Callable
from typing import Any

import aiohttp
import orjson

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
KEPT_S = 4.0  # An idle connection; SGLang's server closes them after 5.


class RequestFailure(Exception):
    """A request without a reply. `reason`: "unavailable" (after all retries), "timeout", "refused" or "unwanted"."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Healing(Exception):
    """A failure that another attempt may not see."""


class SGLangClient:
    """JSON over kept connections; belongs to the event loop that first awaits it.

    Args:
        timeout_s: longest single attempt, in seconds, waiting in the server's queue included. It is not repeated: a
            server that is this slow has too much to do already.
        retries: further attempts after a connection error, 429 or 5xx, with exponential back-off; 8 take 1.5 minutes.
        concurrency: requests in flight at once, or None for any number. A pause between attempts holds no place.
    """

    def __init__(self, timeout_s: float, retries: int, concurrency: int | None = None) -> None:
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._retries = retries
        self._slots = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()
        self._session: aiohttp.ClientSession | None = None

    async def post(
        self,
        url: str,
        payload: dict[str, Any],
        headers: dict[str, str] | None = None,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> Any:
        """The server's JSON reply. `unwanted` is asked before each attempt: nobody may need the reply any more.

        Raises:
            RequestFailure: unavailable, timeout, refused (HTTP 4xx but 429) or unwanted.
        """
        body = orjson.dumps(payload)  # thousands of ids a turn: json would take most of this loop's time
        headers = {"Content-Type": "application/json", **(headers or {})}
        for attempt in itertools.count():
            try:
                async with self._slots:
                    if unwanted():
                        raise RequestFailure("unwanted", "the rollout ended before the request was made")
                    return await self._attempt(url, body, headers)
            except _Healing as error:
                if attempt == self._retries:
                    raise RequestFailure("unavailable", f"{url}: {error}") from error
                pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
                logger.warning("%s: %s; again in %.1f s", url, error, pause_s)
                await asyncio.sleep(pause_s)

    async def _attempt(self, url: str, body: bytes, headers: dict[str, str]) -> Any:
        try:
            async with self._connections().post(url, data=body, headers=headers) as response:
                if response.status == 200:
                    return json.loads(await response.read())
                detail = f"HTTP {response.status} {(await response.text())[:200]}"
                if response.status == 429 or response.status >= 500:
                    raise _Healing(detail)
                raise RequestFailure("refused", f"{url}: {detail}")
        except asyncio.TimeoutError as error:
            raise RequestFailure("timeout", f"{url}: no reply in {self._timeout.total:g} s") from error
        except (aiohttp.ClientError, ValueError) as error:  # ValueError: cut-off JSON
            raise _Healing(f"{type(error).__name__} {error}") from error

    def _connections(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
            atexit.register(self._close, asyncio.get_running_loop())
        return self._session

    def _close(self, loop: asyncio.AbstractEventLoop) -> None:
        """At the end of the process: slime's event loop still runs in a thread of its own, other loops have ended."""
        if loop.is_running():
            asyncio.run_coroutine_threadsafe(self._session.close(), loop).result(timeout=5)
        else:
            asyncio.run(self._session.close())
