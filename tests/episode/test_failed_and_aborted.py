"""Samples that cannot be trained on: they fail or are undone, and never reach a batch."""

import math

import pytest

from examples.tcod import tcod_rollout
from examples.tcod.episode.episode import Episode
from examples.tcod.model.teacher import TeacherClient
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.async_utils import run
from slime.utils.types import Sample
from tests.support.corridor import Corridor
from tests.support.fake_sglang import hold, scored
from tests.support.rig import HEADER, assert_failed, teacher_value


def test_a_demonstration_that_no_launch_check_saw_fails_the_sample(rig):
    [sample] = rig.play({"goal": 3, "demo": {"actions": ["right"] * 5}}, k=1, tcod_variant="b2f")
    assert Episode.of(sample).record.failure == "demo_too_long"
    assert_failed(sample)


def test_one_failed_sample_drops_its_whole_group(rig):
    calls = iter(range(100))
    rig.teacher_reply = lambda p: {"error": "?"} if next(calls) == 0 else scored(p, teacher_value)
    samples, metrics = rig.rollout([{"goal": 2}, {"goal": 3}], n_samples_per_prompt=2)
    assert len(samples) == 4 and metrics["rollout/tcod/failed/teacher_invalid"] == 1
    assert len(rig.scoring_requests()) == 6


def test_few_rows_fill_a_batch(rig):
    """slime's data source gives fewer tasks than it is asked for where it has few rows: nothing is replaced."""
    samples, metrics = rig.rollout([{"goal": 2}], rollout_batch_size=12, tcod_max_replacements=1)
    assert len(samples) == 12 and metrics["rollout/tcod/failed"] == 0


def test_a_failed_replay_counts_the_steps_that_it_made(rig):
    """One of two planned: the demonstration fails before its second action is sent. Its replacement makes three."""
    rows = [{"goal": 3, "demo": {"actions": ["right", action, "right"]}} for action in ("fly", "right")]
    _, metrics = rig.rollout(rows, tcod_variant="b2f", rollout_batch_size=1)
    assert metrics["rollout/tcod/failed/demo_inadmissible"] == 1 and metrics["rollout/tcod/steps"] == 1 + 3


def test_an_unforeseen_error_of_the_teacher_client_fails_the_sample(rig, monkeypatch):
    async def broken(self, *_, **__):
        raise RuntimeError("out of threads")

    monkeypatch.setattr(TeacherClient, "score", broken)
    [sample] = rig.play({"goal": 3}, k=4)
    assert Episode.of(sample).record.failure == "internal" and sample.teacher_log_probs is None
    assert sample.status == Sample.Status.FAILED and sample.reward == 0.0
    assert not tcod_rollout.drop_failed(None, [sample]).keep


@pytest.mark.parametrize("more", [{"cached_tokens": None}, {"top_p_token_ids": [[1]]}])
def test_a_reply_that_slime_cannot_digest_fails_the_sample_and_not_the_run(rig, more):
    answer = rig.answer
    rig.answer = lambda turn, payload: (reply := answer(turn, payload)) and {
        **reply,
        "meta_info": {**reply["meta_info"], **more},
    }
    [sample] = rig.play({"goal": 2}, k=4)
    assert sample.status == Sample.Status.COMPLETED


def test_an_aborted_episode_is_undone(rig, over_sampling):
    """Over-sampling: of a surplus group one is aborted in the middle of its second turn, and leaves nothing behind."""
    seconds = iter(range(100))

    async def reply(payload):
        text = rig.tokenizer.decode(payload["input_ids"])
        if "Goal: door 9" in text and text.count(HEADER) == 2 and next(seconds) == 0:
            await hold()
        return rig.student_reply(payload)

    rig.student.reply = reply
    changes = {"rollout_batch_size": 1, "over_sampling_batch_size": 2, "n_samples_per_prompt": 2}
    samples, metrics = rig.rollout([{"goal": 9}, {"goal": 2}], **changes)
    assert [sample.metadata["goal"] for sample in samples] == [2, 2]
    aborted = [sample for sample in rig.drawn if sample.status == Sample.Status.ABORTED]
    assert metrics["rollout/tcod/aborted"] == len(aborted) > 0 == metrics["rollout/tcod/failed"]
    for one in aborted:
        assert one.tokens == [] and one.response == "" and one.loss_mask is None and not one.reward


@pytest.mark.parametrize("when", ["before the reset", "while replaying"])
def test_an_ended_rollout_is_seen_before_the_engine_is_asked(rig, monkeypatch, when):
    asked = iter(range(100))
    limit = {"before the reset": 0, "while replaying": 2}[when]
    state = type("State", (), {"aborted": property(lambda self: next(asked) >= limit), "tokenizer": rig.tokenizer})()
    monkeypatch.setattr(tcod_rollout.sglang_rollout, "GenerateState", lambda args: state)
    resets, reset = [], Corridor.reset
    monkeypatch.setattr(Corridor, "reset", lambda self, task: resets.append(task) or reset(self, task))
    [sample] = rig.play({"goal": 3, "demo": {"actions": ["right"] * 3}}, k=1, tcod_variant="b2f")
    assert sample.status == Sample.Status.ABORTED and len(resets) == (when == "while replaying")
    assert sample.tokens == [] and rig.student.requests == []


def test_a_surplus_episode_is_not_scored(rig, monkeypatch):
    args, played = rig.generate({"goal": 2}, k=4)
    GenerateState(None).aborted = True
    assert run(tcod_rollout.reward_func(args, played)) == 0.0
    assert played.status == Sample.Status.ABORTED and not Episode.of(played).sequences and played.response == ""
    assert rig.scoring_requests() == [] and not tcod_rollout.drop_failed(args, [played]).keep


def test_incomplete_samples_never_reach_training(rig):
    [sample], _ = rig.rollout([{"goal": 2}])
    args = rig.args([{"goal": 2}])
    for name, values in (
        ("loss_mask", sample.loss_mask[1:]),
        ("teacher_log_probs", None),
        ("teacher_log_probs", sample.teacher_log_probs[1:]),
        ("rollout_log_probs", [math.nan] * sample.response_length),
    ):
        broken = Sample.from_dict({**sample.to_dict(), name: values})
        with pytest.raises(ValueError, match=name):
            tcod_rollout.post_process_rewards(args, [sample, broken])
