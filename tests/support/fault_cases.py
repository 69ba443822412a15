"""The table of faults: what each is, what it comes to, what one sees of it. Played by tests/episode/test_faults.py.

What is wrong with the values in a reply has a table in tests/unit/test_replies.py.
"""

from typing import Any

from tests.support.fake_sglang import hold
from tests.support.faults import (
    Case,
    broken,
    down,
    dropped,
    has_no_foreign_control_token,
    http,
    in_processes,
    is_cut_once,
    is_truncated,
    keeps_the_sampled_token,
    nothing,
    sampled,
    samples,
    scores,
    stops,
    trained,
)
from tests.support.rig import RIGHT

REPLACED = "more than tcod_max_replacements whole batches of groups were replaced"

TEACHER = [
    trained("restarts: asked again", scores(down("teacher", for_s=0.05), times=1), "; again in"),
    stops("gone for good", scores(down("teacher")), REPLACED),
    trained("a reset in the middle of a reply, once", scores(broken(reset=True), times=1), "; again in"),
    dropped("a reset in every reply", scores(broken(reset=True)), "teacher_unavailable", ": Client"),
    dropped("an end in every reply", scores(broken(reset=False)), "teacher_unavailable", "ClientPayloadError"),
    dropped("a plain-text error under HTTP 200", scores(http(200)), "teacher_unavailable", "JSONDecodeError"),
    dropped(
        "slower than tcod_teacher_timeout_s: not asked again",
        scores(lambda *_: hold()),
        "teacher_timeout",
        "no reply in 2 s",
        changes={"tcod_teacher_timeout_s": 2.0},
    ),
    trained("HTTP 503, once", scores(http(503), times=1), "HTTP 503 busy; again in"),
    dropped("HTTP 500 on every attempt", scores(http(500)), "teacher_unavailable", ": HTTP 500"),
    dropped("HTTP 429 on every attempt", scores(http(429)), "teacher_unavailable", ": HTTP 429"),
    dropped("HTTP 400: not asked again", scores(http(400)), "teacher_refused", ": HTTP 400"),
    dropped(
        "a reply without log-probs", scores(lambda *_: {"error": "?"}), "teacher_invalid", "no input_token_logprobs"
    ),
]

ABORT = {"meta_info": {"finish_reason": {"type": "abort"}}}
ENGINE = [
    trained("aborts a queued request, as at a weight push: the turn is asked again", samples(lambda *_: ABORT, 1)),
    trained("aborts a running request: the turn is asked again", samples(sampled("<action>ri", "abort"), times=2)),
    dropped(
        "aborts a turn whenever it is asked",
        samples(sampled("<action>ri", "abort")),
        "engine_aborted",
        "aborted a turn 8 times",
    ),
    trained("restarts: asked again", samples(down("student", for_s=0.05), times=1), "; again in"),
    dropped("HTTP 500 on every attempt", samples(http(500)), "engine_unavailable", ": HTTP 500"),
    dropped("HTTP 400 for a length: not asked again", samples(http(400)), "engine_refused", ": HTTP 400"),
    dropped(
        "slower than tcod_engine_timeout_s: not asked again",
        samples(lambda *_: hold()),
        "engine_timeout",
        "no reply in 2 s",
        changes={"tcod_engine_timeout_s": 2.0},
    ),
    dropped("an empty response", samples(sampled("")), "nothing_sampled", "returned an empty response"),
    dropped("a reply without log-probs", samples(lambda *_: {}), "engine_invalid", "KeyError('meta_info')"),
    trained(
        "a response cut by its length inside the action",
        samples(sampled("<action>rig", "length"), times=1),
        counted="truncated_turns",
        check=is_cut_once,
    ),
    trained(
        "a special token inside a response",
        samples(sampled("I <|im_start|> go " + RIGHT + "<|im_end|>")),
        check=keeps_the_sampled_token,
    ),
]


def environment(fault: str, hazard: str, reason: str, says: str) -> Case:
    return dropped(fault, in_processes, reason, f"{reason}{says}", row={"hazard": hazard})


ENVIRONMENT = [
    environment("its worker killed (-9) during a step", "killed at step", "env_worker_died", ""),
    environment("a step that hangs: its worker is killed", "hangs", "env_timeout", ": step took more than"),
    environment("a first observation of 100 KB", "long at reset", "prompt_too_long", ": no room for a response"),
    trained(
        "a later observation of 100 KB",
        in_processes,
        counted="context_limited",
        row={"hazard": "long at step"},
        check=is_truncated,
    ),
    trained(
        "control tokens and any script in an observation: they stay text",
        in_processes,
        row={"hazard": "control tokens"},
        check=has_no_foreign_control_token,
    ),
]


def b2f(**demo: Any) -> dict[str, Any]:
    return {"row": {"demo": demo}, "changes": {"tcod_variant": "b2f"}}


STEPS = ["right"] * 3
DEMONSTRATION = [
    stops("empty", nothing, "1 of 3 rows have no usable demonstration {'demo_missing'", **b2f(actions=[])),
    dropped(
        "inadmissible in the middle",
        nothing,
        "demo_inadmissible",
        "turn 2 of the demonstration: 'fly'",
        **b2f(actions=["right", "fly", "right"]),
    ),
    dropped(
        "wins before the hand-over",
        nothing,
        "demo_won_early",
        "the episode ends at replayed turn 3",
        **b2f(actions=["right"] * 4),
    ),
    dropped(
        "a response with another action",
        nothing,
        "demo_mismatch",
        "is not the action of",
        **b2f(actions=STEPS, responses=[RIGHT, "<action>left</action>", RIGHT]),
    ),
    dropped(
        "a prefix longer than the context",
        nothing,
        "prompt_too_long",
        "prompt_too_long: no room for a response",
        **b2f(actions=STEPS, responses=["I think. " * 300 + RIGHT] * 3),
    ),
]

CASES = {"Teacher": TEACHER, "Student's engine": ENGINE, "Environment": ENVIRONMENT, "Demonstration": DEMONSTRATION}
