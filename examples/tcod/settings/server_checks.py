"""The checks that ask servers: the student's engines, and the teacher, which must score the student's tokens."""

import contextlib
import math
import ssl
import time
from argparse import Namespace
from typing import Any

import httpx

from .. import ConfigError, Failure
from ..model.chat_tokens import ChatTokens
from ..model.client import without_login
from ..model.teacher import checked_scores, scoring_request, teacher_headers
from .config import SELF, TcodConfig

ROUTER_PATIENCE_S = 60  # The router lists an engine only after its own check of it, which slime does not wait for.
PROBED_TOKENS = 256  # Of the vocabulary, evenly spaced: two tokenizers may agree on a short text.


def check_models(args: Namespace, config: TcodConfig, chat: ChatTokens) -> None:
    """Whether the student's engines take long enough episodes, and the teacher scores the student's tokens.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    training = (args.rollout_max_context_len, "--rollout-max-context-len")
    longest = max(training, (args.eval_max_context_len or 0, "--eval-max-context-len"))
    scored = config.scored_len(*training)
    router = router_url(args)
    teachers = {*teacher_urls(config, teacher_url(args)).values()} if args.opd_type == "sglang" else set()
    _check_engines(router, *(max(longest, scored) if router in teachers else longest))
    for teacher in teachers:
        check_teacher_scores(teacher, chat, *(max(longest, scored) if config.tcod_eval_kl else scored))


def router_url(args: Namespace) -> str:
    """The router of the student's engines. slime has put an IPv6 address in brackets."""
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}"


def teacher_url(args: Namespace) -> str:
    """The teacher's server: that of slime's --rm-url, or with "self" the router of the student's engines."""
    return router_url(args) if args.rm_url == SELF else args.rm_url or ""


def teacher_urls(config: TcodConfig, url: str) -> dict[str, str]:
    """The base URL of each environment's teacher, by the environment's name: its own teacher's, or this one."""
    urls = {own.name: own.tcod_teacher_url or url for own in config.per_environment}
    return {name: url.rstrip("/").removesuffix("/generate") for name, url in urls.items()}


def _check_engines(router: str, needed: int, flag: str) -> None:
    deadline = time.monotonic() + ROUTER_PATIENCE_S
    try:
        while (engines := _ask(f"{router}/workers")["workers"]) == [] and time.monotonic() < deadline:
            time.sleep(0.5)
        limit = min((_longest_sequence(engine["url"]) for engine in engines), default=None)
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the student's engines behind {router} do not answer ({error}): see their logs") from error
    if limit is None:
        raise ConfigError(f"the router {router} knows no engine of the student: see the engines' logs")
    _check_length("the student's engine", limit, needed, flag, "--sglang-context-length")


def check_teacher_scores(url: str, chat: ChatTokens, needed: int, flag: str = "--rollout-max-context-len") -> None:
    """Whether this teacher scores the student's tokens, and sequences as long as needed; `url` is its base URL.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    fix = "give its address (--rm-url, tcod_teacher_url) and, where it needs one, its key in TCOD_TEACHER_API_KEY"
    check_server(f"the teacher {without_login(url)}", url, chat, needed, flag, fix, teacher_headers())


def check_server(
    name: str, url: str, chat: ChatTokens, needed: int, flag: str, fix: str, headers: dict[str, str] | None = None
) -> None:
    """Whether the SGLang server at a base URL encodes text as the student's tokenizer, and takes long sequences.

    Args:
        name: what the server is called in a message.
        needed: tokens of a sequence, by this flag.
        fix: what to do, besides starting the server, when it does not answer.

    Raises:
        ConfigError: with one sentence that names the server or the flag, and the fix.
    """
    try:
        limit = _longest_sequence(url, headers)
        _check_tokens(url, chat, headers)
    except (httpx.HTTPError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(f"{name} does not score ({said}): start it, or {fix}") from error
    except Failure as failure:
        raise ConfigError(
            f"{name} does not score the student's tokens ({failure}): use a model with the student's tokenizer"
        ) from failure
    _check_length(name, limit, needed, flag, "its --context-length")


def _check_length(name: str, limit: float, needed: int, flag: str, remedy: str) -> None:
    if limit < needed:
        raise ConfigError(
            f"{name} takes sequences of at most {limit} tokens, less than {flag} {needed}: raise {remedy}"
        )


def _check_tokens(server: str, chat: ChatTokens, headers: dict[str, str] | None) -> None:
    """Raises httpx.HTTPError or ValueError where there is no SGLang, Failure where it encodes a text otherwise."""
    tokenizer = chat.tokenizer
    every = max(1, len(tokenizer) // PROBED_TOKENS)
    text = tokenizer.decode(chat.context(["Rules.", "Go to cabinet 1: żółw, 龟, 🐢."]))
    text += tokenizer.decode(list(range(0, len(tokenizer), every)), skip_special_tokens=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    reply = _ask(f"{server}/generate", headers, scoring_request(0, text=text))
    # SGLang and transformers may differ in putting a bos before a text; before ids, which episodes are, none is put.
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    with contextlib.suppress(Failure):
        checked_scores(reply, [*bos, *ids], 0, len(tokenizer))
        return
    checked_scores(reply, ids, 0, len(tokenizer))


def _longest_sequence(server: str, headers: dict[str, str] | None = None) -> float:
    """In tokens, as an SGLang server says it; infinite for a router, which does not know."""
    limit = _ask(f"{server}/server_info", headers).get("max_req_input_len")
    return limit - 1 if isinstance(limit, int) else math.inf


def _ask(url: str, headers: dict[str, str] | None = None, payload: dict[str, Any] | None = None) -> dict:
    """The JSON object that the server answers to GET, or to POST with a payload; {} where it has no such page.

    Never by a proxy, inside a cluster; a private certificate authority is that of the system, as for the clients.
    """
    verify = url.startswith("https:") and ssl.create_default_context()
    with httpx.Client(trust_env=False, timeout=60, headers=headers, verify=verify) as client:
        try:
            reply = client.post(url, json=payload) if payload else client.get(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"{without_login(url)} is no URL: {error}") from error
    if reply.status_code == 404 and not payload:
        return {}
    if reply.is_error:
        raise ValueError(" ".join(f"HTTP {reply.status_code} {reply.text[:200]}".split()))
    if not isinstance(answer := reply.json(), dict):
        raise ValueError(f"{without_login(url)} answers with {str(answer)[:200]}")
    return answer
