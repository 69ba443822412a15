"""The count of turns that slime's reducer finds in the masks; tests/slime/test_slime_loss.py has the loss itself."""

from dataclasses import dataclass

import pytest
import torch

from examples.tcod.training.turn_mean import count_turns, turn_weights
from tests.support.toys import token_weights

NUM_GPUS = 0


@dataclass
class FakeSample:
    loss_mask: list[int]
    rollout_id: int | None = None
    remove_sample: bool = False


def test_masks_carry_the_turns_of_their_step():
    samples = [FakeSample([1, 1, 0, 1]), FakeSample([0, 1]), FakeSample([1, 0, 1, 0, 1]), FakeSample([1])]
    for _ in range(2):  # twice is once
        count_turns(samples, trajectories_per_step=2)
        assert [s.loss_mask for s in samples] == [[3, 3, 0, 3], [0, 3], [4, 0, 4, 0, 4], [4]]


def test_samples_of_one_trajectory_are_in_one_step():
    samples = [FakeSample([1, 0, 1], 0), FakeSample([1], 0), FakeSample([1, 1], 8), FakeSample([1], 9)]
    count_turns(samples, trajectories_per_step=2)
    assert [max(s.loss_mask) for s in samples] == [4, 4, 4, 1]


def test_a_removed_sample_has_no_turns():
    samples = [FakeSample([1, 0, 1]), FakeSample([1, 0, 1], remove_sample=True)]
    count_turns(samples, trajectories_per_step=2)
    assert samples[0].loss_mask == [2, 0, 2]


@pytest.mark.parametrize("count", [1, 9])
def test_every_turn_weighs_one(count):
    mask = [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1]
    [expected] = token_weights([mask], "turn")
    got = turn_weights(torch.tensor(mask, dtype=torch.int) * count)
    torch.testing.assert_close(got, expected * 3)
    assert turn_weights(torch.zeros(4, dtype=torch.int)).tolist() == [0, 0, 0, 0]
