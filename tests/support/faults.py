"""Ways to inject faults into one task of a batch, and what must hold of its sample then."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from examples.tcod.environments.pool import EnvironmentPool
from examples.tcod.model import client as sglang_client
from examples.tcod.settings import build
from slime.utils.types import Sample
from tests.support.corridor import CONTROL_TOKENS
from tests.support.fake_sglang import generated, scored
from tests.support.fault_proxy import FaultProxy
from tests.support.rig import teacher_value

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


def samples(reply: Callable[[Scene, dict], Any], turn: int = 1, times: float = math.inf) -> Callable[[Scene], None]:
    """The engine's reply to the hit task from its request `turn` (0-based) on, `times` times, is `reply(..)`."""

    def inject(scene: Scene) -> None:
        requests = iter(range(10**6))

        def answer(payload: dict) -> Any:
            hit = scene.hits(payload) and turn <= next(requests) < turn + times
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


def with_one_log_prob(scene: Scene, payload: dict) -> dict:
    reply = scene.rig.student_reply(payload)
    del reply["meta_info"]["output_token_logprobs"][1:]
    return reply


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


def all_retries(scene: Scene) -> None:
    scene.monkeypatch.setattr(sglang_client, "RETRIES", RETRIES)


RETRIES = sglang_client.RETRIES
PAUSES = {name: getattr(sglang_client, name) for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S")}


def in_processes(scene: Scene) -> None:
    """Environments in Ray's worker processes."""
    pool = scene.pool()
    scene.monkeypatch.setattr(build, "EnvironmentPool", lambda *args, **kwargs: pool)


def cut_once(scene: Scene, payload: dict) -> dict:
    seen = scene.rig.tokenizer.decode(payload["input_ids"])
    return (
        scene.rig.student_reply(payload)
        if "<action>rig<" in seen
        else sampled("<action>rig", "length")(scene, payload)
    )


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
