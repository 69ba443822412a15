"""The table of faults: what each is, what it comes to, what one sees of it. Played by tests/episode/test_faults.py."""

import math
from typing import Any

from tests.support.fake_sglang import generated, hold
from tests.support.faults import (
    Case,
    all_retries,
    cut_once,
    echoed,
    echoed_as_sglang_does,
    entries,
    has_no_foreign_control_token,
    http,
    in_processes,
    is_cut_once,
    is_truncated,
    keeps_the_sampled_token,
    minute_of_a_second,
    nothing,
    sampled,
    samples,
    scores,
    then,
    value,
    wire,
    with_one_log_prob,
)
from tests.support.rig import RIGHT

UNAVAILABLE = {"outcome": "dropped", "counted": "failed/teacher_unavailable"}
INVALID_SCORE = {"outcome": "dropped", "counted": "failed/teacher_invalid"}
INVALID_REPLY = {"outcome": "dropped", "counted": "failed/engine_invalid"}
HEALED = {"outcome": "trained"}
NO_VALUE = "is no log-probability, at position"

TEACHER = [
    Case("connection refused during a restart", wire("teacher", "down", 1, 0.05), says="; again in", **HEALED),
    Case(
        "gone for a minute and back (all times a sixtieth)",
        then(minute_of_a_second, all_retries, wire("teacher", "down", 1, 1.0)),
        says="; again in",
        **HEALED,
    ),
    Case(
        "gone for good",
        wire("teacher", "down"),
        "stops",
        "more than tcod_max_replacements whole batches of groups were replaced",
    ),
    Case("reset in the middle of a reply, once", wire("teacher", "reset", 1), says="; again in", **HEALED),
    Case(
        "reset in the middle of every reply",
        wire("teacher", "reset"),
        says=": Client",
        **UNAVAILABLE,
    ),
    Case(
        "connection closed in the middle of a reply", wire("teacher", "lost"), says="ClientPayloadError", **UNAVAILABLE
    ),
    Case("a reply of truncated JSON", wire("teacher", "truncated"), says="JSONDecodeError", **UNAVAILABLE),
    Case("a plain-text error under HTTP 200", scores(http(200)), says="JSONDecodeError", **UNAVAILABLE),
    Case(
        "slower than tcod_teacher_timeout_s: not asked again",
        scores(lambda reply: hold()),
        "dropped",
        "no reply in 2 s",
        "failed/teacher_timeout",
        changes={"tcod_teacher_timeout_s": 2.0},
    ),
    Case("HTTP 503, once", scores(http(503), times=1), says="HTTP 503 busy; again in", **HEALED),
    Case("HTTP 500 on every attempt", scores(http(500)), says=": HTTP 500", **UNAVAILABLE),
    Case("HTTP 503 on every attempt", scores(http(503)), says=": HTTP 503", **UNAVAILABLE),
    Case("HTTP 429 on every attempt", scores(http(429)), says=": HTTP 429", **UNAVAILABLE),
    Case(
        "HTTP 400: not asked again",
        scores(http(400)),
        "dropped",
        ": HTTP 400",
        "failed/teacher_refused",
    ),
    Case(
        "a reply without log-probs", scores(lambda _: {"error": "?"}), says="no input_token_logprobs", **INVALID_SCORE
    ),
    Case("an empty reply", scores(http(200, "")), says="JSONDecodeError", **UNAVAILABLE),
    Case("one log-prob too few", scores(entries(list.pop)), says="teacher_invalid: ", **INVALID_SCORE),
    Case(
        "one log-prob too many",
        scores(entries(lambda them: them.append([-1.0, 1, None]))),
        says=" entries for ",
        **INVALID_SCORE,
    ),
    Case("a log-prob that is null", scores(value(None)), says=f"None {NO_VALUE}", **INVALID_SCORE),
    Case("a log-prob that is false", scores(value(False)), says=f"False {NO_VALUE}", **INVALID_SCORE),
    Case("a log-prob that is NaN", scores(value(math.nan)), says=f"nan {NO_VALUE}", **INVALID_SCORE),
    Case("a log-prob that is infinite", scores(value(math.inf)), says=f"inf {NO_VALUE}", **INVALID_SCORE),
    Case("a log-prob above 0", scores(value(0.25)), says=f"0.25 {NO_VALUE}", **INVALID_SCORE),
    Case("a log-prob that float32 cannot hold", scores(value(-1e300)), says=f"-1e+300 {NO_VALUE}", **INVALID_SCORE),
    Case(
        "the ids of another sequence",
        scores(echoed(lambda token: token ^ 1)),
        says=" echoed for token ",
        **INVALID_SCORE,
    ),
    Case("every id echoed as 0", scores(echoed(lambda token: 0)), says="token 0 echoed for token ", **INVALID_SCORE),
    Case("the vocabulary's last id echoed as 0, as SGLang does", echoed_as_sglang_does, **HEALED),
]


ENGINE = [
    Case(
        "aborts a queued request, as at a weight push: the turn is asked again",
        samples(lambda *_: {"meta_info": {"finish_reason": {"type": "abort"}}}, times=1),
        **HEALED,
    ),
    Case(
        "aborts a running request: the turn is asked again", samples(sampled("<action>ri", "abort"), times=2), **HEALED
    ),
    Case(
        "aborts a turn whenever it is asked",
        samples(sampled("<action>ri", "abort")),
        says="aborted a turn 8 times",
        outcome="dropped",
        counted="failed/engine_aborted",
    ),
    Case(
        "fewer log-probs than sampled tokens, as with speculative decoding",
        samples(with_one_log_prob),
        says="1 log-probs for 23 sampled tokens",
        **INVALID_REPLY,
    ),
    Case(
        "tokens behind the end of the turn, as with speculative decoding",
        samples(sampled(RIGHT + "<|im_end|>I")),
        says="goes on behind a token that ends it",
        **INVALID_REPLY,
    ),
    Case("restarts: asked again", wire("engine", "down", 1, 0.05), says="; again in", **HEALED),
    Case("resets a connection in the middle of a reply", wire("engine", "reset", 1), **HEALED),
    Case(
        "HTTP 400 for a length: not asked again",
        samples(http(400)),
        "dropped",
        ": HTTP 400",
        "failed/engine_refused",
    ),
    Case(
        "slower than tcod_engine_timeout_s: not asked again",
        samples(lambda *_: hold()),
        "dropped",
        "no reply in 2 s",
        "failed/engine_timeout",
        changes={"tcod_engine_timeout_s": 2.0},
    ),
    Case("an empty response", samples(sampled("")), "dropped", "returned an empty response", "failed/nothing_sampled"),
    Case(
        "a reply of truncated JSON",
        wire("engine", "truncated"),
        "dropped",
        "JSONDecodeError",
        "failed/engine_unavailable",
    ),
    Case(
        "a reply without log-probs", samples(lambda *_: {"text": "?"}), says="KeyError('meta_info')", **INVALID_REPLY
    ),
    Case(
        "a log-prob that is infinite", samples(sampled(RIGHT, log_prob=-math.inf)), says="no log-prob", **INVALID_REPLY
    ),
    Case("a log-prob above 0", samples(sampled(RIGHT, log_prob=0.5)), says="a value is no log-prob", **INVALID_REPLY),
    Case(
        "an id outside the vocabulary",
        samples(lambda *_: generated([10**6], [-1.0])),
        says="outside the tokenizer's vocabulary",
        **INVALID_REPLY,
    ),
    Case(
        "a response cut by its length inside the action",
        samples(lambda scene, payload: cut_once(scene, payload)),
        "trained",
        counted="truncated_turns",
        check=is_cut_once,
    ),
    Case(
        "a special token inside a response",
        samples(sampled("I <|im_start|> go " + RIGHT + "<|im_end|>")),
        "trained",
        check=keeps_the_sampled_token,
    ),
]


ENVIRONMENT = [
    Case(
        "its worker killed (-9) during a reset",
        in_processes,
        "dropped",
        "env_worker_died",
        "failed/env_worker_died",
        {"hazard": "killed at reset"},
    ),
    Case(
        "its worker killed (-9) during a step",
        in_processes,
        "dropped",
        "env_worker_died",
        "failed/env_worker_died",
        {"hazard": "killed at step"},
    ),
    Case(
        "a step that hangs: the worker is killed and replaced",
        in_processes,
        "dropped",
        "env_timeout: step took more than",
        "failed/env_timeout",
        {"hazard": "hangs"},
    ),
    Case(
        "an engine that raises: its worker takes no new episodes",
        in_processes,
        "dropped",
        "env_error: HazardousCorridor.step raised RuntimeError: the corridor collapsed",
        "failed/env_error",
        {"hazard": "raises"},
    ),
    Case(
        "a corrupt game file",
        in_processes,
        "dropped",
        "env_error: HazardousCorridor.reset raised JSONDecodeError",
        "failed/env_error",
        {"game_file": "corrupt.json"},
    ),
    Case(
        "a game file that has gone since the launch",
        in_processes,
        "dropped",
        "env_error: HazardousCorridor.reset raised FileNotFoundError",
        "failed/env_error",
        {"game_file": "missing.json"},
    ),
    Case(
        "a first observation of 100 KB",
        in_processes,
        "dropped",
        "prompt_too_long: no room for a response",
        "failed/prompt_too_long",
        {"hazard": "long at reset"},
    ),
    Case(
        "a later observation of 100 KB",
        in_processes,
        "trained",
        counted="context_limited",
        row={"hazard": "long at step"},
        check=is_truncated,
    ),
    Case(
        "control tokens and any script in an observation: they stay text",
        in_processes,
        "trained",
        row={"hazard": "control tokens"},
        check=has_no_foreign_control_token,
    ),
]


def demonstration(
    fault: str, outcome: str, says: str, counted: str = "", more: dict | None = None, **demo: Any
) -> Case:
    return Case(fault, nothing, outcome, says, counted, {"demo": demo}, {"tcod_variant": "b2f", **(more or {})})


DEMONSTRATION = [
    demonstration("empty", "stops", "1 of 3 rows have no usable demonstration {'demo_missing'", actions=[]),
    demonstration(
        "longer than the horizon", "stops", "usable demonstration {'demo_too_long': 1}", actions=["right"] * 5
    ),
    demonstration("no list of texts", "stops", "of --prompt-data: its demo.actions.0 is 1", actions=[1]),
    demonstration(
        "inadmissible in the middle",
        "dropped",
        "turn 2 of the demonstration: 'fly'",
        "failed/demo_inadmissible",
        actions=["right", "fly", "right"],
    ),
    demonstration(
        "wins before the hand-over",
        "dropped",
        "the episode ends at replayed turn 3",
        "failed/demo_won_early",
        actions=["right"] * 4,
    ),
    demonstration(
        "fewer responses than actions",
        "stops",
        "{'demo_mismatch': 1}, the first is",
        "",
        actions=["right"] * 3,
        responses=[RIGHT],
    ),
    demonstration(
        "a response with another action",
        "dropped",
        "is not the action of",
        "failed/demo_mismatch",
        actions=["right"] * 3,
        responses=[RIGHT, "<action>left</action>", RIGHT],
    ),
    demonstration(
        "a prefix longer than the context",
        "dropped",
        "prompt_too_long: no room for a response",
        "failed/prompt_too_long",
        actions=["right"] * 3,
        responses=["I think. " * 300 + RIGHT] * 3,
    ),
]

CASES = {"Teacher": TEACHER, "Student's engine": ENGINE, "Environment": ENVIRONMENT, "Demonstration": DEMONSTRATION}
