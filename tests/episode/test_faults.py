"""What each fault costs: one table of cases, each played through slime's whole rollout loop on a batch of three tasks.

One task, the one of door 3, is hit. Whatever happens to it, the batch has its three groups and every number in it is
what the engine and the teacher said. `python tests/fault_table.py` writes the same table as documentation.
"""

import functools
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support import fault_table
from smoke import hooks
import pytest
import ray
from aiohttp import web
from tests.support.corridor import CONTROL_TOKENS, alive
from tests.support.fake_sglang import generated, hold, scored
from tests.support.fault_proxy import FaultProxy

SLIME = hooks.find_slime()

from examples.tcod import sglang_client
from examples.tcod import tcod_rollout
from examples.tcod.environment import EnvironmentPool
from tests.support.rig import RIGHT, checkpoint, local_pool, rig, student_value, teacher_value, tokenizer  # noqa: F401
from examples.tcod.config import ConfigError, TcodConfig

from slime.utils.types import Sample

NUM_GPUS = 0
HIT = "Goal: door 3."


@dataclass
class Scene:
    """The rig, with a proxy in front of each server."""

    rig: Any
    engine: FaultProxy
    teacher: FaultProxy
    monkeypatch: pytest.MonkeyPatch
    pool: Callable[[], EnvironmentPool]

    def hits(self, payload: dict) -> bool:
        return HIT in self.rig.tokenizer.decode(payload.get("input_ids", []))


@dataclass(frozen=True)
class Case:
    """fault, and what it comes to. outcome: dropped (the sample's group is replaced), trained, or stops (the run).

    says: words of the log, or of the error that stops the run; counted: the metric below rollout/tcod/.
    """

    fault: str
    inject: Callable[[Scene], None]
    outcome: str
    says: str = ""
    counted: str = ""
    row: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Scene, Sample], None] = lambda scene, sample: None


# --------------------------------------------------------------------------------------------- ways to inject faults


def nothing(scene: Scene) -> None:
    """The fault is in the row or in the settings."""


def scores(damage: Callable[[dict], Any], times: float = math.inf) -> Callable[[Scene], None]:
    """The teacher's reply about the hit task is `damage(reply)`, the first `times` times."""

    def inject(scene: Scene) -> None:
        hits = iter(range(10**6))

        def reply(payload: dict) -> Any:
            answer = scored(payload, teacher_value)
            return damage(answer) if scene.hits(payload) and next(hits) < times else answer

        scene.rig.teacher_reply = reply

    return inject


def samples(reply: Callable[[Scene, dict], Any], turn: int = 1) -> Callable[[Scene], None]:
    """The engine's reply to the hit task at `turn` (0-based) is `reply(scene, payload)`."""

    def inject(scene: Scene) -> None:
        turns = iter(range(10**6))

        def answer(payload: dict) -> Any:
            hit = scene.hits(payload) and next(turns) >= turn
            return reply(scene, payload) if hit else scene.rig.student_reply(payload)

        scene.rig.student.reply = answer

    return inject


def wire(server: str, fault: str, times: float = math.inf, back_s: float | None = None) -> Callable[[Scene], None]:
    """The proxy's `fault` for requests about the hit task, the first `times` times; it listens again after back_s."""

    def inject(scene: Scene) -> None:
        proxy, hits = getattr(scene, server), iter(range(10**6))

        def decide(body: bytes) -> str | None:
            if not (scene.hits(json.loads(body)) and next(hits) < times):
                return None
            if back_s is not None:
                proxy.listen(after_s=back_s)
            return fault

        proxy.fault = decide

    return inject


def then(*injections: Callable[[Scene], None]) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        for injection in injections:
            injection(scene)

    return inject


def http(status: int, text: str = "busy") -> Callable[..., web.Response]:
    return lambda *_: web.Response(status=status, text=text)


def entries(edit: Callable[[list], Any]) -> Callable[[dict], dict]:
    """A damage to the teacher's list of [log-prob, id, text]."""

    def damage(reply: dict) -> dict:
        edit(reply["meta_info"]["input_token_logprobs"])
        return reply

    return damage


def value(number: Any) -> Callable[[dict], dict]:
    return entries(lambda them: them[-2].__setitem__(0, number))


def echoed(wrong: Callable[[int], int]) -> Callable[[dict], dict]:
    def edit(them: list) -> None:
        for entry in them:
            entry[1] = wrong(entry[1])

    return entries(edit)


def echoed_as_sglang_does(scene: Scene) -> None:
    last = len(scene.rig.tokenizer) - 1
    scores(echoed(lambda token: 0 if token >= last else token))(scene)


def sampled(text: str, finish: str = "stop", log_prob: Any = -0.5) -> Callable[[Scene, dict], dict]:
    """A reply of the engine with the tokens of `text`, special ones included."""

    def reply(scene: Scene, payload: dict) -> dict:
        ids = scene.rig.tokenizer.encode(text, add_special_tokens=False)
        return generated(ids, [log_prob] * len(ids), finish=finish, prompt_tokens=len(payload["input_ids"]))

    return reply


def minute_of_a_second(scene: Scene) -> None:
    """The pauses of the HTTP client, sixty times as short, and as short as chance allows."""
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        scene.monkeypatch.setattr(sglang_client, name, PAUSES[name] / 60)
    scene.monkeypatch.setattr(sglang_client.random, "uniform", lambda low, high: low)


PAUSES = {name: getattr(sglang_client, name) for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S")}


def in_processes(scene: Scene) -> None:
    """Environments in Ray's worker processes."""
    pool = scene.pool()
    scene.monkeypatch.setattr(tcod_rollout, "EnvironmentPool", lambda *args, **kwargs: pool)


# ------------------------------------------------------------------------------------------ what else must hold after


def ids_of(scene: Scene, sample: Sample, text: str) -> int:
    return sample.tokens.count(scene.rig.tokenizer.convert_tokens_to_ids(text))


def has_no_foreign_control_token(scene: Scene, sample: Sample) -> None:
    """System and first user turn, then two turns for each response but the last, which nothing follows."""
    turns = len(sample.metadata["tcod"]["turns"])
    assert ids_of(scene, sample, "<|im_start|>") == 3 + 2 * (turns - 1)
    assert ids_of(scene, sample, "<|im_end|>") == 2 + turns + (turns - 1)
    assert ids_of(scene, sample, "<|endoftext|>") == 0
    assert CONTROL_TOKENS in sample.response


def keeps_the_sampled_token(scene: Scene, sample: Sample) -> None:
    response = sample.tokens[-sample.response_length :]
    trained = [token for token, mask in zip(response, sample.loss_mask, strict=True) if mask]
    assert scene.rig.tokenizer.convert_tokens_to_ids("<|im_start|>") in trained and sample.reward == 1.0


def is_cut_once(scene: Scene, sample: Sample) -> None:
    assert [(turn["cut"], turn["valid"]) for turn in sample.metadata["tcod"]["turns"]][:2] == [
        (False, True),
        (True, False),
    ]


def is_truncated(scene: Scene, sample: Sample) -> None:
    assert sample.status == Sample.Status.TRUNCATED


# ---------------------------------------------------------------------------------------------------------- the table

UNAVAILABLE = {"outcome": "dropped", "counted": "failed/teacher_unavailable"}
INVALID_SCORE = {"outcome": "dropped", "counted": "failed/teacher_invalid"}
INVALID_REPLY = {"outcome": "dropped", "counted": "failed/engine_invalid"}
HEALED = {"outcome": "trained"}
NO_VALUE = "is no log-probability, at position"

TEACHER = [
    Case("connection refused during a restart", wire("teacher", "down", 1, 0.05), says="; again in", **HEALED),
    Case(
        "gone for a minute and back (all times a sixtieth)",
        then(minute_of_a_second, wire("teacher", "down", 1, 1.0)),
        says="; again in",
        changes={"tcod_teacher_retries": TcodConfig.tcod_teacher_retries},
        **HEALED,
    ),
    Case(
        "gone for good",
        wire("teacher", "down"),
        "stops",
        "more than tcod_max_replacements whole batches of failed groups were replaced",
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
        "no reply in 0.3 s",
        "failed/teacher_timeout",
        changes={"tcod_teacher_timeout_s": 0.3},
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

ABORTED = {"outcome": "dropped", "counted": "aborted"}

ENGINE = [
    Case(
        "aborts a queued request", samples(lambda *_: {"meta_info": {"finish_reason": {"type": "abort"}}}), **ABORTED
    ),
    Case("aborts a running request", samples(sampled("<action>ri", "abort")), **ABORTED),
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
        "no reply in 0.5 s",
        "failed/engine_timeout",
        changes={"tcod_engine_timeout_s": 0.5},
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


def cut_once(scene: Scene, payload: dict) -> dict:
    seen = scene.rig.tokenizer.decode(payload["input_ids"])
    return (
        scene.rig.student_reply(payload)
        if "<action>rig<" in seen
        else sampled("<action>rig", "length")(scene, payload)
    )


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
        "env_error: RuntimeError: the corridor collapsed",
        "failed/env_error",
        {"hazard": "raises"},
    ),
    Case(
        "a corrupt game file",
        in_processes,
        "dropped",
        "env_error: JSONDecodeError",
        "failed/env_error",
        {"game_file": "corrupt.json"},
    ),
    Case(
        "a game file that has gone since the launch",
        in_processes,
        "dropped",
        "env_error: FileNotFoundError",
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
    demonstration("empty", "stops", "of 3 rows 1 have none and 0 are longer", actions=[]),
    demonstration("longer than the horizon", "stops", "of 3 rows 0 have none and 1 are longer", actions=["right"] * 5),
    demonstration(
        "no list of texts", "stops", "row 2 of --prompt-data cannot be played: actions of its demo", actions=[1]
    ),
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
        "dropped",
        "demo_mismatch",
        "failed/demo_mismatch",
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


# ------------------------------------------------------------------------------------------------------------ the test


@pytest.fixture(scope="module", autouse=True)
def nothing_leaks(tmp_path_factory):
    """Far fewer file descriptors, threads and ports are left over than cases were played, and no temporary file."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    folder = tmp_path_factory.mktemp("temporary")
    before = used()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield
    assert list(folder.iterdir()) == []
    assert {name: count - before[name] for name, count in used().items() if count - before[name] > SPARE} == {}
    ray.shutdown()


SPARE = 15  # threads and connections that slime, Ray and the event loop keep for good


def used() -> dict[str, int]:
    return {"files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """One pool of three worker processes for all cases that need them: the next one finds whole what one broke."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "corrupt.json").write_text("{")
    pools = []

    def make() -> EnvironmentPool:
        if not pools:
            environment = "corridor.HazardousCorridor"
            pools.append(EnvironmentPool(environment, str(folder), workers=3, engines_per_worker=1, timeout_s=5.0))
        return pools[0]

    yield make
    if pools:
        wait_until(lambda: len(alive(folder)) <= 3)


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def scene(rig, monkeypatch, pool):
    monkeypatch.setattr(sglang_client, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(tcod_rollout, "ENGINE_RETRIES", 2)
    with FaultProxy(rig.student.port) as engine, FaultProxy(rig.teacher.port) as teacher:
        yield Scene(rig, engine, teacher, monkeypatch, pool)


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{part}: {c.fault}") for part in CASES for c in CASES[part]])
def test_fault(case, scene, caplog):
    rows = [{"goal": goal, "demo": {"actions": ["right"] * goal}} for goal in (2, 3, 2)]
    rows[1] |= case.row
    case.inject(scene)
    servers = {"rm_url": f"{scene.teacher.url}/generate", "sglang_router_port": scene.engine.port}
    play = functools.partial(scene.rig.rollout, rows, **{"tcod_teacher_retries": 2, **servers, **case.changes})
    if case.outcome == "stops":
        with pytest.raises((ConfigError, RuntimeError), match=re.escape(case.says)) as stop:
            play()
        assert "\n" not in str(stop.value)
        return

    trained, metrics = play()  # asserts that masks and log-probs are aligned and finite
    drawn = scene.rig.drawn
    [hit] = [sample for sample in drawn if sample.metadata["goal"] == 3]
    count = {name: metrics[f"rollout/tcod/{name}"] for name in ("failed", "aborted")}
    assert case.says in caplog.text
    assert len(trained) == len(rows) and len(drawn) == len(trained) + sum(count.values())
    assert not case.counted or metrics[f"rollout/tcod/{case.counted}"] > 0
    if case.outcome == "trained":
        assert hit in trained and sum(count.values()) == 0
        case.check(scene, hit)
        return
    assert case.outcome == "dropped" and hit not in trained and sum(count.values()) == 1
    assert metrics[f"rollout/dynamic_filter/drop_{case.counted.removeprefix('failed/')}"] == 1
    assert hit.tokens == [] and hit.response == "" and hit.response_length == 0
    assert hit.loss_mask is hit.rollout_log_probs is hit.teacher_log_probs is None


def test_the_document_is_what_the_table_says():
    assert fault_table.DOCUMENT.read_text() == fault_table.document(), "run `python tests/fault_table.py`"


def test_the_default_retries_outlast_a_minute():
    """Even where every pause is as short as chance makes it, which is half of its length."""
    pauses = [
        min(PAUSES["FIRST_PAUSE_S"] * 2**i, PAUSES["LONGEST_PAUSE_S"]) / 2
        for i in range(TcodConfig.tcod_teacher_retries)
    ]
    assert sum(pauses) >= 60
