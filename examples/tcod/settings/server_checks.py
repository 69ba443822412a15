"""The checks that ask servers: the student's engines, and the teacher, which must score the student's tokens."""

import contextlib
import logging
import math
import ssl
import time
from argparse import Namespace
from typing import Any

import httpx

from .. import ConfigError, Failure
from ..model.chat_tokens import ChatTokens
from ..model.teacher import check_scores, scoring_request, teacher_headers
from .config import TcodConfig

logger = logging.getLogger(__name__)

ROUTER_PATIENCE_S = 60.0  # The router lists an engine only after its own check of it, which slime does not wait for.
PROBED_TOKENS = 256  # Of the vocabulary, evenly spaced: two tokenizers may agree on a short text.


def check_models(args: Namespace, config: TcodConfig, chat: ChatTokens) -> None:
    """Whether the student's engines take long enough episodes, and the teacher scores the student's tokens.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    training, evaluation = args.rollout_max_context_len, args.eval_max_context_len or 0
    router = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
    _check_engines(router, *_longest(training, evaluation))
    if args.opd_type == "sglang":
        check_teacher(base_url(args.rm_url), chat, *_longest(training, evaluation if config.tcod_eval_kl else 0))


def _longest(training: int, evaluation: int) -> tuple[int, str]:
    """The longest sequence in tokens, and the flag that says so."""
    return (evaluation, "--eval-max-context-len") if evaluation > training else (training, "--rollout-max-context-len")


def base_url(rm_url: str) -> str:
    """The teacher's server out of slime's --rm-url."""
    return rm_url.rstrip("/").removesuffix("/generate")


def _check_engines(router: str, max_context_len: int, flag: str) -> None:
    deadline = time.monotonic() + ROUTER_PATIENCE_S
    try:
        while not (engines := _workers(router)) and time.monotonic() < deadline:
            time.sleep(0.5)
        limits = [_context_limit(engine) for engine in engines]
    except (httpx.HTTPError, ValueError) as error:
        raise ConfigError(f"the student's engines behind {router} do not answer ({error}): see their logs") from error
    if not limits:
        raise ConfigError(f"the router {router} knows no engine of the student: see the engines' logs")
    if min(limits) < max_context_len:
        raise ConfigError(
            f"the student's engine takes sequences of at most {min(limits)} tokens, less than {flag} "
            f"{max_context_len}: raise --sglang-context-length"
        )


def check_teacher(url: str, chat: ChatTokens, max_context_len: int, flag: str = "--rollout-max-context-len") -> None:
    """Whether this teacher scores the student's tokens, and long enough episodes; `url` is its base URL.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    try:
        limit = probe(url, chat, teacher_headers())
    except httpx.HTTPStatusError as error:
        raise ConfigError(
            f"the teacher at --rm-url {url}/generate is up and refuses ({_refusal(error)}): give its address and, "
            "where it needs a key, TCOD_TEACHER_API_KEY"
        ) from error
    except (httpx.HTTPError, ValueError) as error:
        raise ConfigError(f"no teacher answers at --rm-url {url}/generate ({error}): start it first") from error
    except Failure as failure:
        raise ConfigError(
            f"the teacher at --rm-url does not score a text as the student's tokens ({failure}): "
            "use a teacher with the student's tokenizer"
        ) from failure
    if limit < max_context_len:
        raise ConfigError(
            f"the teacher scores sequences of at most {limit} tokens, less than {flag} {max_context_len}: "
            "raise its --context-length"
        )


def probe(server: str, chat: ChatTokens, headers: dict[str, str] | None = None) -> float:
    """The longest sequence, in tokens, that the SGLang server at this base URL is sure to take.

    Raises:
        httpx.HTTPError, ValueError: it does not answer, or not as SGLang does.
        Failure: it does not encode a text as the student's tokenizer does.
    """
    tokenizer = chat.tokenizer
    every = max(1, len(tokenizer) // PROBED_TOKENS)
    text = tokenizer.decode(chat.context(["Rules.", "Go to cabinet 1: żółw, 龟, 🐢."]))
    text += tokenizer.decode(list(range(0, len(tokenizer), every)), skip_special_tokens=True)
    limit = _context_limit(server, headers)
    reply = _ask(f"{server}/generate", scoring_request(0, text=text), headers)
    ids = tokenizer.encode(text, add_special_tokens=False)
    # SGLang and transformers may differ in putting a bos before a text; before ids, which episodes are, none is put.
    if len(_echoed(reply)) == len(ids) + 1 and _echoed(reply)[0] == tokenizer.bos_token_id:
        ids = [tokenizer.bos_token_id, *ids]
    check_scores(reply, ids, 0, len(tokenizer))
    return limit


def _echoed(reply: dict[str, Any]) -> list[int]:
    try:
        return [token for _, token, *_ in reply["meta_info"]["input_token_logprobs"]]
    except (KeyError, TypeError, ValueError):
        return []  # check_scores says what is wrong


def _context_limit(server: str, headers: dict[str, str] | None = None) -> float:
    """The longest sequence, in tokens, that an SGLang server is sure to take; infinite where it does not say.

    A router has no limit of its own: the smallest of its workers' counts, as far as they can be reached from here.
    """
    try:
        limit = _ask(f"{server}/server_info", headers=headers).get("max_req_input_len")
        return limit - 1 if isinstance(limit, int) else math.inf
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 404:
            raise
    limits, workers = [], []
    with contextlib.suppress(httpx.HTTPError, ValueError):
        workers = [worker for worker in _workers(server, headers) if worker != server]
    for worker in workers:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            limits.append(_context_limit(worker, headers))
    if len(limits) < len(workers) or not workers:
        logger.warning("%s does not say how long a sequence may be: see to its --context-length", server)
    return min(limits, default=math.inf)


def _workers(router: str, headers: dict[str, str] | None = None) -> list[str]:
    """Base URLs of the engines behind a router. Raises httpx.HTTPError, ValueError."""
    try:
        return [worker["url"] for worker in _ask(f"{router}/workers", headers=headers)["workers"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{router}/workers lists no workers") from error


def _refusal(error: httpx.HTTPStatusError) -> str:
    return f"HTTP {error.response.status_code} {error.response.text[:200]}".strip()


def _ask(url: str, payload: dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """GET, or POST with a payload; the JSON object. Raises httpx.HTTPError, ValueError."""
    # Never by a proxy, inside a cluster; a private certificate authority is that of the system, as for the clients.
    verify = ssl.create_default_context() if url.startswith("https:") else True
    try:
        with httpx.Client(trust_env=False, timeout=60, headers=headers, verify=verify) as client:
            reply = client.get(url) if payload is None else client.post(url, json=payload)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url} is no URL: {error}") from error
    answer = reply.raise_for_status().json()
    if not isinstance(answer, dict):
        raise ValueError(f"{url} answers with {str(answer)[:200]}")
    return answer
