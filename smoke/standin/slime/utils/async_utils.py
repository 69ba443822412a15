import asyncio
import threading
from collections.abc import Coroutine
from functools import cache
from typing import Any


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def run(coroutine: Coroutine) -> Any:
    """Run on the one background event loop and wait for the result."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()
