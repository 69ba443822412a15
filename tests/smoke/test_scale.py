"""The arithmetic of benchmarks/scale.py: what a mode can save and what it costs."""

import pytest

from benchmarks import report, scale

NUM_GPUS = 0


@pytest.fixture
def inputs():
    return report.options(scale.__doc__, scale.INPUTS, argv=[])


@pytest.mark.parametrize("k", [1, 9, 30])
def test_a_mode_that_waits_for_less_takes_less(inputs, k):
    split = scale.Split(4, 2, 1, 2)
    sync, asynchronous, continuous = (scale.mode_step(inputs, "f2b", k, split, mode) for mode in scale.MODES[:3])
    assert sync[0] == scale.wall(scale.step(inputs, "f2b", k, split))
    assert sync[0] > asynchronous[0] >= continuous[0]
    assert (sync[1], asynchronous[1]) == (0, 1) and continuous[1] > 1


def test_engines_may_share_the_gpus_that_train(inputs):
    rows = {row["mode"]: row for row in scale.by_mode(inputs, 8, [1, 30])}
    assert list(rows) == ["sync", "async", "fully_async", "colocated"]  # what the run script offers
    shared = scale.best(inputs, "f2b", [30], 8, "colocated")
    assert shared.actor == shared.rollout and shared.actor + shared.teacher <= 8
    sync = scale.wall(scale.step(inputs, "f2b", 30, shared))
    assert scale.mode_step(inputs, "f2b", 30, shared, "colocated") == (sync + inputs.switch_s, 0)
