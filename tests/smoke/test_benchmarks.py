"""The benchmarks: the loop's variants are what they are called, and scale's arithmetic."""

import pytest

from benchmarks import loop, report, scale
from tests.support.fake_sglang import FakeSGLang, generated

inputs = report.options(scale.__doc__, scale.INPUTS, argv=[])


@pytest.mark.parametrize("name, other", [("recipe", "slime's post"), ("slime's post", "recipe")])
def test_a_loop_is_measured_with_the_client_of_its_name(checkpoint, monkeypatch, name, other):
    monkeypatch.setattr(loop.build, "EnvironmentPool", loop.build.EnvironmentPool)  # undone after the test
    monkeypatch.setattr(loop.student, "SGLangClient", loop.OwnClient)
    ids = loop.REPLY_IDS
    with FakeSGLang(lambda payload: generated(ids, [-0.5] * len(ids))) as server:
        row = loop.measure(name, server.port, episodes=2, folder=checkpoint, turns=3)
        assert (row["loop"], row["episodes"], len(server.payloads())) == (name, 2, 6)
        monkeypatch.setitem(loop.LOOPS, name, loop.LOOPS[other])  # as where the replaced name has no user
        with pytest.raises(RuntimeError, match=f"{name}: 6 of 6 requests were answered, sent by"):
            loop.measure(name, server.port, episodes=2, folder=checkpoint, turns=3)


@pytest.mark.parametrize("k", [1, 9, 30])
def test_a_mode_that_waits_for_less_takes_less(k):
    split = scale.Split(4, 2, 1, 2)
    sync, asynchronous, continuous = (scale.mode_step(inputs, "f2b", k, split, mode) for mode in scale.MODES[:3])
    assert sync[0] == scale.wall(scale.step(inputs, "f2b", k, split))
    assert sync[0] > asynchronous[0] >= continuous[0]
    assert (sync[1], asynchronous[1]) == (0, 1) and continuous[1] > 1


def test_without_a_teacher_the_engines_score_episode_and_note():
    own, other = (scale.step(inputs, "f2b", 30, scale.Split(4, 4, 1, teacher)) for teacher in (0, 4))
    tokens = inputs.prompt + scale.turns(inputs, "f2b", 30)[2] * (inputs.sampled + inputs.observed)
    assert own["scoring"] / other["scoring"] == pytest.approx(8.2 / 32.8 * (tokens + 2000) / tokens)
    assert {split.teacher for split in scale.splits(inputs, 8, "self")} == {0}


def test_engines_may_share_the_gpus_that_train():
    rows = {row["mode"]: row for row in scale.by_mode(inputs, 8, [1, 30])}
    assert list(rows) == ["sync", "async", "fully_async", "colocated", "self"]  # what the run script offers
    shared = scale.best(inputs, "f2b", [30], 8, "colocated")
    assert shared.actor == shared.rollout and shared.actor + shared.teacher <= 8
    sync = scale.wall(scale.step(inputs, "f2b", 30, shared))
    assert scale.mode_step(inputs, "f2b", 30, shared, "colocated") == (sync + inputs.switch_s, 0)
