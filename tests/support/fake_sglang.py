"""A scripted SGLang server for tests: the engine, its router and the teacher in one, on a free loopback port.

    def reply(payload: dict) -> dict | web.Response:
        return generated([7, 8], [-0.5, -0.25], text="ok", prompt_tokens=len(payload["input_ids"]))

    with FakeSGLang(reply) as server:
        ...  # server.url, server.host, server.port; server.requests holds what arrived

`reply` runs in the server's own thread, once per POST /generate. It may be `async`: a reply that waits (for ever with
`await hold()`) is interrupted by POST /abort_request, and its request answered as SGLang does: HTTP 200 and
finish_reason "abort". A reply that is `Broken`, or awaits `go_down`, fails as a network and a restart do.
"""

import asyncio
import inspect
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web


@dataclass
class Broken:
    """An answer of which half is sent; then comes a TCP reset, or an orderly end of the connection."""

    answer: dict
    reset: bool = True


Reply = dict | web.Response | Broken


def generated(
    tokens: Sequence[int],
    log_probs: Sequence[float],
    text: str = "",
    finish: str = "stop",
    **meta_info: Any,
) -> dict:
    """SGLang's answer to a sampling request. finish: stop, length or abort; meta_info: more keys, as prompt_tokens."""
    return {
        "text": text,
        "output_ids": list(tokens),
        "meta_info": {
            "finish_reason": {"type": finish},
            "completion_tokens": len(tokens),
            "cached_tokens": 0,
            "weight_version": "default",
            "output_token_logprobs": [[p, t, None] for t, p in zip(tokens, log_probs, strict=True)],
            **meta_info,
        },
    }


def scored(payload: dict, log_prob: Callable[[int, int], float]) -> dict:
    """SGLang's answer to a scoring request: `log_prob(position, token)` from logprob_start_len on.

    As in SGLang, the first of these positions has no value.
    """
    ids, start = payload["input_ids"], payload["logprob_start_len"]
    entries = [[None if at == start else log_prob(at, ids[at]), ids[at], None] for at in range(start, len(ids))]
    return generated([], [], finish="length", prompt_tokens=len(ids), input_token_logprobs=entries)


async def hold() -> None:
    """Wait for ever: the request stays in flight until it is aborted or its client gives up."""
    await asyncio.Event().wait()


@dataclass
class Request:
    path: str
    payload: dict
    headers: dict[str, str]  # names in lower case


class FakeSGLang:
    """POST /generate answers `reply(payload)`; /abort_request interrupts waiting replies, those of a rid or all.

    GET answers `pages[path]`; else /workers names this server, /v1/loads counts the waiting replies, others are 404.
    Any other POST is recorded and answered {"success": true}.
    """

    def __init__(self, reply: Callable[[dict], Reply | Awaitable[Reply]]):
        self.reply = reply
        self.requests: list[Request] = []  # every POST, in order of arrival
        self.pages: dict[str, dict] = {}
        self.host, self.port = "127.0.0.1", 0
        self._in_flight: dict[asyncio.Task, str | None] = {}

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def payloads(self, path: str = "/generate") -> list[dict]:
        return [request.payload for request in self.requests if request.path == path]

    def __enter__(self) -> "FakeSGLang":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/{path:.*}", self._get)
        app.router.add_post("/{path:.*}", self._post)
        # A client that disconnects ends its request, as in SGLang.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        await self._listen()
        self.port = self._runner.addresses[0][1]

    async def _listen(self) -> None:
        await web.TCPSite(self._runner, self.host, self.port).start()

    async def go_down(self, for_s: float | None = None) -> None:
        """For a reply to await: all connections end, and new ones are refused, for good or for so many seconds."""
        for site in self._runner.sites:
            await site.stop()
        if for_s is not None:
            self._loop.call_later(for_s, lambda: self._loop.create_task(self._listen()))
        for connection in self._runner.server.connections:
            connection.force_close()

    async def _get(self, request: web.Request) -> web.Response:
        if request.path in self.pages:
            return web.json_response(self.pages[request.path])
        if request.path == "/workers":
            return web.json_response({"workers": [{"url": self.url}]})
        if request.path == "/v1/loads":
            return web.json_response({"loads": [{"num_running_reqs": len(self._in_flight), "num_waiting_reqs": 0}]})
        return web.Response(status=404)

    async def _post(self, request: web.Request) -> web.StreamResponse:
        payload = await request.json()
        self.requests.append(Request(request.path, payload, {k.lower(): v for k, v in request.headers.items()}))
        if request.path == "/generate":
            answer = await self._generate(payload)
            if isinstance(answer, Broken):
                return await _break_off(request, answer)
            return answer if isinstance(answer, web.Response) else web.json_response(answer)
        if request.path == "/abort_request":
            for task, rid in list(self._in_flight.items()):
                if payload.get("abort_all") or (rid is not None and rid == payload.get("rid")):
                    del self._in_flight[task]
                    task.cancel()
        return web.json_response({"success": True})

    async def _generate(self, payload: dict) -> Reply:
        answer = self.reply(payload)
        if not inspect.isawaitable(answer):
            return answer
        task = asyncio.ensure_future(answer)
        self._in_flight[task] = payload.get("rid")
        try:
            return await task
        except asyncio.CancelledError:
            if task in self._in_flight:  # the client left, nobody aborted
                task.cancel()
                raise
            return generated([], [], finish="abort")
        finally:
            self._in_flight.pop(task, None)


async def _break_off(request: web.Request, broken: Broken) -> web.StreamResponse:
    body = json.dumps(broken.answer).encode()
    response = web.StreamResponse(headers={"Content-Length": str(len(body))})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    if broken.reset:
        linger = struct.pack("ii", 1, 0)
        request.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.transport.close()
    return response
