from argparse import Namespace
from typing import Any

import httpx

_client: httpx.AsyncClient | None = None


def get_rollout_num_engines(args: Namespace) -> int:
    return max(1, args.rollout_num_gpus // args.rollout_num_gpus_per_engine) if args.rollout_num_gpus else 0


def init_http_client(args: Namespace) -> None:
    global _client
    if get_rollout_num_engines(args) > 0 and _client is None:
        _client = httpx.AsyncClient(timeout=None, trust_env=False)


async def post(url: str, payload: dict | None, headers: dict | None = None) -> Any:
    """The decoded reply of one attempt: slime's makes sixty, and the recipe has a client of its own."""
    response = await _client.post(url, json=payload or {}, headers=headers)
    response.raise_for_status()
    return response.json() if response.content else None


async def get(url: str) -> Any:
    response = await _client.get(url)
    response.raise_for_status()
    return response.json()
