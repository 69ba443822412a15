"""The depth schedule and the episode plans of examples/tcod/curriculum.py. Pure CPU; needs pytest and nothing else."""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.tcod.curriculum import Curriculum, EpisodePlan

NUM_GPUS = 0

HORIZONS = (1, 2, 3, 5, 8, 13, 30)
ETAS = (1, 2, 3, 7)
LATE = 10**9  # a step at which every schedule has ended


def curricula(*variants):
    """Every combination of small settings."""
    for variant, horizon, eta, budget, slack in itertools.product(
        variants, HORIZONS, ETAS, ("slack", "horizon"), (0, 1, 2, 5)
    ):
        for k_start in range(1, horizon + 1):
            yield Curriculum(variant, horizon, k_start, eta, budget, slack)


def steps(curriculum):
    """Every step of a schedule and some beyond its end."""
    return range(curriculum.eta * (curriculum.horizon + 1) + 2)


def test_depth_follows_the_published_schedule():
    # k_start 1, eta 5, T 30, by hand: one more turn every five steps, full depth from step 145 on.
    slow, fast = Curriculum("f2b", 30, k_start=1, eta=5), Curriculum("f2b", 5, k_start=3, eta=1)
    assert [slow.depth(n) for n in (0, 4, 5, 9, 10, 144, 145, 10_000)] == [1, 1, 2, 2, 3, 29, 30, 30]
    assert [fast.depth(n) for n in range(4)] == [3, 4, 5, 5]


@pytest.mark.parametrize("eta", [1, 2, 3, 7, 60])
def test_depth_starts_low_never_falls_and_ends_at_the_largest(eta):
    for k_start, more in itertools.product((1, 2, 5, 60), (0, 1, 2, 7, 60)):
        k_max = k_start + more
        depth = Curriculum("b2f", k_max, k_start, eta).depth
        assert depth(0) == k_start
        assert depth(eta * more) == depth(LATE) == k_max
        for n in range(eta * (more + 1) + 2):
            k = depth(n)
            assert k_start <= k <= k_max
            assert 0 <= depth(n + 1) - k <= 1
            assert depth(n + eta) == min(k + 1, k_max)


def test_opd_plays_the_horizon_from_the_first_step():
    opd = Curriculum(variant="opd", horizon=30)
    assert opd.depth(0) == 30
    assert opd.plan(opd.depth(0), demo_length=7) == EpisodePlan(replayed=0, budget=30)


def test_f2b_plays_the_first_k_turns():
    f2b = Curriculum(variant="f2b", horizon=30, eta=6)
    assert [f2b.plan(f2b.depth(n)).budget for n in (0, 6, 174)] == [1, 2, 30]
    assert f2b.plan(1, demo_length=7).replayed == 0


def test_b2f_replays_what_lies_before_the_last_k_turns():
    # L = 7, T = 30, slack 2, by hand.
    b2f = Curriculum(variant="b2f", horizon=30)
    assert b2f.plan(1, 7) == EpisodePlan(replayed=6, budget=3)
    assert b2f.plan(6, 7) == EpisodePlan(replayed=1, budget=8)
    assert b2f.plan(7, 7) == EpisodePlan(replayed=0, budget=30)
    assert b2f.plan(8, 7) == EpisodePlan(replayed=0, budget=30)
    # Near the horizon T - p is the smaller one.
    assert b2f.plan(1, 30) == EpisodePlan(replayed=29, budget=1)
    assert Curriculum(variant="b2f", horizon=30, b2f_budget="horizon").plan(1, 7) == EpisodePlan(6, 24)


def test_reopd_replays_a_part_of_the_demonstration_and_plays_one_turn():
    # L = 3, gamma 0.6: 1, 0.6 and 0.36 of 1.96. 4,000 draws; five standard deviations of a share are 0.04.
    reopd = Curriculum(variant="reopd", horizon=30)
    assert reopd.depth(0) == reopd.depth(LATE) == 1
    plans = [reopd.plan(1, 3, n, index) for n in range(40) for index in range(100)]
    assert {plan.budget for plan in plans} == {1}
    shares = [sum(plan.replayed == t for plan in plans) / len(plans) for t in range(3)]
    assert shares == pytest.approx([1 / 1.96, 0.6 / 1.96, 0.36 / 1.96], abs=0.04)
    assert {reopd.plan(1, 1, n).replayed for n in range(20)} == {0}


@pytest.mark.parametrize("variant", ["b2f", "reopd"])
@pytest.mark.parametrize("length", [0, 31])
def test_a_missing_or_too_long_demonstration_is_refused(variant, length):
    with pytest.raises(ValueError, match="demonstration"):
        Curriculum(variant=variant, horizon=30).plan(1, length)


def test_imitation_has_no_plan_because_nothing_is_played():
    sft = Curriculum(variant="sft", horizon=30)
    assert sft.depth(0) == sft.depth(LATE) == 30
    with pytest.raises(AssertionError, match="nothing is played"):
        sft.plan(30, 7)


def test_a_draw_of_reopd_is_that_of_its_rollout_and_sample():
    reopd = Curriculum(variant="reopd", horizon=30, reopd_gamma=1.0)
    draws = [reopd.plan(1, 30, n, index).replayed for n in (0, 1, 12) for index in range(6)]
    # Written down once: a run that is resumed elsewhere, in another Python, draws what the killed one drew.
    assert draws == [10, 4, 5, 22, 20, 14, 28, 17, 29, 8, 17, 25, 4, 16, 5, 19, 11, 5]


@pytest.mark.parametrize("variant", ["opd", "f2b", "b2f", "reopd"])
def test_every_plan_fits_the_horizon(variant):
    for curriculum in curricula(variant):
        depths = {curriculum.depth(n) for n in steps(curriculum)}
        for k, length in itertools.product(depths, range(1, curriculum.horizon + 1)):
            plan = curriculum.plan(k, length)
            assert plan.replayed >= 0 and plan.budget >= 1
            assert plan.replayed + plan.budget <= curriculum.horizon
            if plan.replayed:
                assert curriculum.needs_demonstration and plan.replayed < length


@pytest.mark.parametrize("variant", ["opd", "f2b", "b2f"])
def test_the_last_depth_is_the_full_horizon_in_every_arm(variant):
    for curriculum in curricula(variant):
        assert curriculum.depth(LATE) == curriculum.horizon
        for length in range(1, curriculum.horizon + 1):
            plan = curriculum.plan(curriculum.depth(LATE), length)
            assert plan == curriculum.full_plan() == EpisodePlan(0, curriculum.horizon)


def test_b2f_never_replays_more_as_training_goes_on():
    for curriculum in curricula("b2f"):
        depths = [curriculum.depth(n) for n in steps(curriculum)]
        assert depths == sorted(depths)
        for length in range(1, curriculum.horizon + 1):
            replayed = [curriculum.plan(k, length).replayed for k in sorted(set(depths))]
            assert replayed == sorted(replayed, reverse=True)
