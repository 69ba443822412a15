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
import re
from collections.abc import Callable
from typing import Any

import aiohttp
import orjson

from .. import Failure

logger = logging.getLogger(__name__)

RETRIES = 8  # After a connection error, 429 or 5xx: about 1.5 minutes, in which slime may restart an engine.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
KEPT_S = 4.0  # An idle connection; SGLang's server closes them after 5.


def without_login(url: str) -> str:
    """For messages: the URL without a user and a password."""
    return re.sub(r"(?<=://)[^/]*@", "", url)


def is_log_prob(value: object) -> bool:
    """Whether a value in a server's reply is a log-probability that float32, in which training computes, can hold.

    Rounding may lift one above 0.
    """
    return type(value) in (int, float) and -1e30 < value <= 1e-3  # not isinstance: False would pass for 0


class SGLangClient:
    """A server's /generate over kept connections; belongs to the event loop that first awaits it.

    Args:
        whom: "engine" or "teacher", the first word of its failures' reasons.
        url: the server's base URL.
        timeout_s: longest single attempt, in seconds, waiting in the server's queue included. It is not repeated: a
            server that is this slow has too much to do already.
        concurrency: requests in flight at once, or None for any number. A pause between attempts holds no place.
        headers: of every request.
    """

    def __init__(
        self,
        whom: str,
        url: str,
        timeout_s: float,
        concurrency: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._whom, self._url, self._place = whom, f"{url}/generate", without_login(url)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._slots = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._session: aiohttp.ClientSession | None = None

    async def post(self, payload: dict[str, Any], session: str, check_wanted: Callable[[], None]) -> Any:
        """The server's JSON reply.

        Args:
            session: a router sends requests of the same one to the same server, whose cache holds their prefix.
            check_wanted: is called before each attempt: nobody may need the reply any more.

        Raises:
            Failure: {whom}_unavailable (after all retries), {whom}_timeout, {whom}_refused (HTTP 4xx except 429), or
                what check_wanted raises.
        """
        body = orjson.dumps(payload)  # thousands of ids a turn: json would take most of this loop's time
        headers = {**self._headers, "X-SMG-Routing-Key": session}
        for attempt in itertools.count():
            async with self._slots:
                check_wanted()
                reply, trouble = await self._attempt(body, headers)
            if trouble is None:
                return reply
            if attempt == RETRIES:
                raise Failure(f"{self._whom}_unavailable", f"{self._place}: {trouble}")
            pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
            logger.warning("%s: %s; again in %.1f s", self._place, trouble, pause_s)
            await asyncio.sleep(pause_s)

    async def _attempt(self, body: bytes, headers: dict[str, str]) -> tuple[Any, str | None]:
        """The reply, or the trouble that another attempt may not see."""
        try:
            async with self._connections().post(self._url, data=body, headers=headers) as response:
                if response.status == 200:
                    return json.loads(await response.read()), None
                detail = f"HTTP {response.status} {(await response.text())[:200]}"
                if response.status == 429 or response.status >= 500:
                    return None, detail
                raise Failure(f"{self._whom}_refused", f"{self._place}: {detail}")
        except asyncio.TimeoutError as error:
            detail = f"{self._place}: no reply in {self._timeout.total:g} s"
            raise Failure(f"{self._whom}_timeout", detail) from error
        except (aiohttp.ClientError, ValueError) as error:  # ValueError: cut-off JSON
            return None, f"{type(error).__name__} {error}"

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
