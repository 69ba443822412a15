"""A TCP proxy on a free loopback port that damages chosen exchanges with an HTTP server, as a network would.

    with FaultProxy(server.port) as proxy:
        proxy.fault = lambda body: "reset" if b"door 3" in body else None

`fault` is asked for every request that has a body, and names what happens to it:

    reset       half of the reply, then a TCP reset
    truncated   half of the reply's body under a Content-Length that says it is all
    lost        half of the reply, then an orderly end of the connection
    down        a TCP reset, and the proxy stops listening: connections are refused until `listen()`
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any


class FaultProxy:
    def __init__(self, port: int) -> None:
        self.fault: Callable[[bytes], str | None] = lambda body: None
        self.host, self.port = "127.0.0.1", 0
        self._upstream = port
        self._listener: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> "FaultProxy":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def listen(self, after_s: float = 0.0) -> None:
        """Accept connections again, on the same port; with `after_s` later, without waiting for it."""
        if after_s:
            self._loop.call_soon_threadsafe(
                self._loop.call_later, after_s, lambda: self._loop.create_task(self._listen())
            )
        else:
            self._call(self._listen())

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._serve, self.host, self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _end(self) -> None:
        await self._stop()
        exchanges = asyncio.all_tasks() - {asyncio.current_task()}
        for exchange in exchanges:  # one may still wait for its reply
            exchange.cancel()
        await asyncio.gather(*exchanges, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head, body = await _read_message(reader)
            fault = self.fault(body) if body else None
            if fault == "down":
                await self._stop()
                return _reset(writer)
            reply_head, reply_body = await self._forward(head, body)
            if fault == "truncated":
                reply_body = reply_body[: len(reply_body) // 2]
            reply = b"%s\r\nContent-Length: %d\r\n\r\n" % (reply_head, len(reply_body)) + reply_body
            writer.write(reply[: len(reply) // 2] if fault in ("reset", "lost") else reply)
            await writer.drain()
            if fault == "reset":
                _reset(writer)
        except (OSError, asyncio.IncompleteReadError):  # one of the two sides has left
            pass
        finally:
            writer.close()

    async def _forward(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection(self.host, self._upstream)
        with contextlib.closing(writer):
            writer.write(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return await _read_message(reader)


async def _read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """A request's or reply's head, for a connection that ends with this exchange and without its length; the body."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).strip().split(b"\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in lines)
    body = await reader.readexactly(int(headers.get(b"content-length", 0)))
    kept = [line for line in lines if not line.lower().startswith((b"content-length:", b"connection:"))]
    return b"\r\n".join([first, *kept, b"Connection: close"]), body


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a TCP reset instead of an orderly end."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
