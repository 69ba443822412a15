import asyncio
import json
import logging
from argparse import Namespace
from typing import Any

import httpx

logger = logging.getLogger(__name__)
_client: httpx.AsyncClient | None = None


def get_rollout_num_engines(args: Namespace) -> int:
    if getattr(args, "rollout_num_engines", None) is not None:
        return int(args.rollout_num_engines)
    gpus = getattr(args, "rollout_num_gpus", None) or 0
    return max(1, gpus // (getattr(args, "rollout_num_gpus_per_engine", None) or 1)) if gpus > 0 else 0


def init_http_client(args: Namespace) -> None:
    global _client
    engines = get_rollout_num_engines(args)
    if engines > 0 and _client is None:
        limits = httpx.Limits(max_connections=args.sglang_server_concurrency * engines)
        _client = httpx.AsyncClient(limits=limits, timeout=None, trust_env=False)


async def post(url: str, payload: dict | None, max_retries: int = 60, headers: dict | None = None) -> Any:
    """The decoded reply. Any error, HTTP 4xx included, is tried again after a second, `max_retries` times in all."""
    for attempt in range(1, max_retries + 1):
        try:
            response = await _client.post(url, json=payload or {}, headers=headers)
            response.raise_for_status()
        except Exception as error:
            logger.info("POST %s failed (attempt %d of %d): %s", url, attempt, max_retries, error)
            if attempt == max_retries:
                raise
            await asyncio.sleep(1)
            continue
        try:
            return json.loads(response.content)
        except json.JSONDecodeError:
            return response.text


async def get(url: str) -> Any:
    response = await _client.get(url)
    response.raise_for_status()
    return json.loads(response.content)
