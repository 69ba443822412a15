"""Ways to inject faults into one task of a batch, and what must hold of its sample then."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from examples.tcod.environments.pool import EnvironmentPool
from examples.tcod.settings import build
from slime.utils.types import Sample
from tests.support.corridor import CONTROL_TOKENS
from tests.support.fake_sglang import Broken, generated, scored
from tests.support.rig import Rig, teacher_value

HIT = "Goal: door 3."


@dataclass
class Scene:
    rig: Rig
    monkeypatch: pytest.MonkeyPatch
    pool: Callable[[], EnvironmentPool]

    def hits(self, payload: dict) -> bool:
        return HIT in self.rig.tokenizer.decode(payload.get("input_ids", []))


Inject = Callable[[Scene], None]
Damage = Callable[[Scene, dict], Any]  # the server's answer instead of this one


@dataclass(frozen=True)
class Case:
    """fault, and what it comes to. outcome: dropped (the sample's group is replaced), trained, or stops (the run).

    says: words of the log, or of the error that stops the run; counted: the metric below rollout/tcod/.
    """

    fault: str
    inject: Inject
    outcome: str
    says: str = ""
    counted: str = ""
    row: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Scene, Sample], None] = lambda scene, sample: None


def trained(fault: str, inject: Inject, says: str = "", **more: Any) -> Case:
    return Case(fault, inject, "trained", says, **more)


def dropped(fault: str, inject: Inject, reason: str, says: str, **more: Any) -> Case:
    return Case(fault, inject, "dropped", says, f"failed/{reason}", **more)


def stops(fault: str, inject: Inject, says: str, **more: Any) -> Case:
    return Case(fault, inject, "stops", says, **more)


# --------------------------------------------------------------------------------------------- ways to inject faults


def nothing(scene: Scene) -> None:
    """The fault is in the row or in the settings."""


def scores(damage: Damage, times: float = math.inf) -> Inject:
    """The teacher's reply about the hit task is `damage(scene, reply)`, the first `times` times."""

    def inject(scene: Scene) -> None:
        hits = iter(range(10**6))

        def reply(payload: dict) -> Any:
            answer = scored(payload, teacher_value)
            return damage(scene, answer) if scene.hits(payload) and next(hits) < times else answer

        scene.rig.teacher_reply = reply

    return inject


def samples(damage: Damage, times: float = math.inf) -> Inject:
    """The engine's reply to the hit task from its second request on, `times` times, is `damage(scene, reply)`."""

    def inject(scene: Scene) -> None:
        requests = iter(range(10**6))

        def reply(payload: dict) -> Any:
            answer = scene.rig.student_reply(payload)
            return damage(scene, answer) if scene.hits(payload) and 1 <= next(requests) < 1 + times else answer

        scene.rig.student.reply = reply

    return inject


def down(server: str, for_s: float | None = None) -> Damage:
    return lambda scene, reply: getattr(scene.rig, server).go_down(for_s)


def broken(reset: bool) -> Damage:
    return lambda scene, reply: Broken(reply, reset)


def http(status: int) -> Damage:
    return lambda scene, reply: web.Response(status=status, text="busy")


def sampled(text: str, finish: str = "stop") -> Damage:
    """The tokens of `text`, special ones included."""

    def damage(scene: Scene, reply: dict) -> dict:
        ids = scene.rig.tokenizer.encode(text, add_special_tokens=False)
        return generated(ids, [-0.5] * len(ids), finish=finish, prompt_tokens=reply["meta_info"]["prompt_tokens"])

    return damage


def in_processes(scene: Scene) -> None:
    """Environments in Ray's worker processes."""
    pool = scene.pool()
    scene.monkeypatch.setattr(build, "EnvironmentPool", lambda *args, **kwargs: pool)


# ------------------------------------------------------------------------------------------ what else must hold after


def has_no_foreign_control_token(scene: Scene, sample: Sample) -> None:
    """System and first user turn, then two turns for each response but the last, which nothing follows."""
    turns = len(sample.metadata["tcod"]["turns"])
    expected = {"<|im_start|>": 3 + 2 * (turns - 1), "<|im_end|>": 2 + turns + (turns - 1), "<|endoftext|>": 0}
    for token, count in expected.items():
        assert sample.tokens.count(scene.rig.tokenizer.convert_tokens_to_ids(token)) == count
    assert CONTROL_TOKENS in sample.response


def keeps_the_sampled_token(scene: Scene, sample: Sample) -> None:
    response = sample.tokens[-sample.response_length :]
    trained = [token for token, mask in zip(response, sample.loss_mask, strict=True) if mask]
    assert scene.rig.tokenizer.convert_tokens_to_ids("<|im_start|>") in trained and sample.reward == 1.0


def is_cut_once(scene: Scene, sample: Sample) -> None:
    first, second = sample.metadata["tcod"]["turns"][:2]
    assert (first["cut"], first["valid"], second["cut"], second["valid"]) == (False, True, True, False)


def is_truncated(scene: Scene, sample: Sample) -> None:
    assert sample.status == Sample.Status.TRUNCATED
