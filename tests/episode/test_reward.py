"""The reward beside the KL, and alone: what is trained on, and which groups are."""

import asyncio
import random
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest

from examples.tcod import tcod_rollout
from examples.tcod.episode.episode import Episode, EpisodeRecord
from examples.tcod.training.rewards import normalised
from slime.utils.types import Sample
from tests.support.rig import HEADER, LEFT, RIGHT, assert_failed

ALONE = {"use_opd": False, "opd_type": None, "rm_url": None, "tcod_reward_coef": 2.0, "n_samples_per_prompt": 2}
GRADED = {"tcod_reward": "grade", "tcod_environment": "tests.support.corridor.GradedCorridor"}


@pytest.fixture
def alternating(rig):
    """Of the tasks to win, every second episode is lost; the others are all lost."""
    begun = Counter()

    def play(payload):
        context = tuple(payload["input_ids"])
        text = rig.tokenizer.decode(context)
        turn = text.count(HEADER) - 1
        if turn == 0:
            begun[text] += 1
            return rig.answer(begun[text] % 2, payload)
        return rig.answer(0 if RIGHT in text else 1, payload)

    rig.script, rig.student.reply = [RIGHT, LEFT], play


def test_rewards_within_a_group_by_an_oracle():
    """Groups of other sizes, of equals too, whose episodes have other numbers of samples, in any order."""
    chance = random.Random(3)
    episodes = [(group, n) for group in range(6) for n in range(2 + group % 3)]
    rewards = {one: chance.choice((0.0, 0.3, 1.0)) for one in episodes}
    rewards |= {one: 0.1 for one in episodes if one[0] == 4}
    samples = [one for one in episodes for _ in range(chance.randint(1, 5))]
    chance.shuffle(samples)
    got = normalised([Namespace(group_index=g, rollout_id=f"{g} {n}", reward=rewards[g, n]) for g, n in samples], 0.5)
    for one, value in zip(samples, got, strict=True):
        of_group = np.array([rewards[other] for other in episodes if other[0] == one[0]])
        expected = 0.5 * (rewards[one] - of_group.mean()) / (of_group.std(ddof=1) + 1e-6)
        assert value == (0 if one[0] == 4 else pytest.approx(expected, rel=1e-9, abs=1e-9))


@pytest.mark.parametrize("history", ["append", "turns"])
def test_every_sample_of_an_episode_has_its_reward(rig, alternating, history):
    """With a teacher a group of equals is trained too, for its KL. Won: +-1 / sqrt(2) of the deviation sqrt(1/2)."""
    rows = [{"goal": 1}, {"goal": 9}]
    more = {"tcod_history": history, "tcod_reward_coef": 3.0, "n_samples_per_prompt": 2}
    samples, metrics = rig.rollout(rows, **more)
    _, trained = tcod_rollout.post_process_rewards(rig.args(rows, **more), samples)
    values = {(sample.metadata["goal"], sample.reward) for sample in samples}
    assert values == {(1, 1.0), (1, 0.0), (9, 0.0)}
    for sample, value in zip(samples, trained, strict=True):
        signed = 0 if sample.metadata["goal"] == 9 else 1 if sample.reward else -1
        assert value == pytest.approx(3 * signed * 0.5 / (0.5**0.5 + 1e-6))
    assert len({len(group) for group in rig.groups}) == 1 and metrics["rollout/tcod/kl/trajectory"] > 0
    assert len(samples) == (4 if history == "append" else 1 + 4 + 2 * 4) and "rollout/tcod/no_signal" not in metrics


def test_without_a_teacher_groups_of_equals_are_replaced(rig, alternating):
    samples, metrics = rig.rollout([{"goal": 1}, {"goal": 9}], **ALONE)
    assert [sample.metadata["goal"] for sample in samples] == [1] * 4
    assert metrics["rollout/tcod/no_signal"] == 2 and metrics["rollout/tcod/failed"] == 0
    assert metrics["rollout/tcod/steps"] == 2 * (1 + 4) + 2 * 4  # of the dropped group too
    assert metrics["rollout/dynamic_filter/drop_no_signal"] == 1
    assert not any("kl" in name for name in metrics) and metrics["rollout/tcod/tokens/scored"] == 0
    assert rig.teacher.requests == [] and {sample.teacher_log_probs for sample in samples} == {None}


def test_a_slow_group_with_a_signal_is_waited_for(rig, alternating):
    """The quick ones that take the place of those without are not taken instead of it."""
    play = rig.student.reply

    async def slowly(payload):
        if "Goal: door 1." in rig.tokenizer.decode(payload["input_ids"]):
            await asyncio.sleep(0.5)
        return play(payload)

    rig.student.reply = slowly
    rows = [{"goal": 1}, {"goal": -1}, {"goal": 9}]
    samples, metrics = rig.rollout(rows, **ALONE)
    assert Counter(sample.metadata["goal"] for sample in samples)[1] == 4
    assert metrics["rollout/tcod/aborted"] == 0 and metrics["rollout/tcod/no_signal"] == 2
    assert len(rig.drawn) == 2 * 4


def test_too_many_groups_of_equals_stop_the_run(rig):
    with pytest.raises(RuntimeError, match=r"tcod_max_replacements .*samples by reason: {'no_signal': 10}"):
        rig.rollout([{"goal": 1}], **ALONE)


def test_the_grade_is_a_reward(rig, alternating):
    samples, metrics = rig.rollout([{"goal": 4}], tcod_horizon=3, **{**ALONE, **GRADED})
    assert sorted(sample.reward for sample in samples) == [-0.75, 0.75] and metrics["rollout/tcod/success"] == 0
    [sample] = rig.play({"goal": 4}, k=4, **{**ALONE, **GRADED, "tcod_environment": "tests.support.toys.Corridor"})
    assert_failed(sample)
    assert Episode.of(sample).record.failure == "no_grade"


def test_an_evaluation_counts_what_was_won(rig):
    args, sample = rig.generate({"goal": 2}, k=4, **{**ALONE, **GRADED})
    sample.metadata["tcod"] = Episode(EpisodeRecord(evaluation=True, won=True, reward=0.5))
    assert asyncio.run(tcod_rollout.reward_func(args, sample)) == 1.0
    assert tcod_rollout.drop_failed(args, [Sample(reward=0.0), Sample(reward=1.0)]).keep
