"""What an episode's reward is, and what is trained on of it: tcod_reward and tcod_reward_coef."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from .. import Failure
from ..episode.episode import EpisodeRecord

NO_SIGNAL = "no_signal"


def reward_of(record: EpisodeRecord, kind: str) -> float:
    """1.0 or 0.0 ("won"), or the environment's grade of the episode at its end ("grade"). Raises Failure: no_grade."""
    if kind == "won":
        return float(record.won)
    if record.reward is None:
        raise Failure("no_grade", "the environment gives no grade: have finish return one, or set tcod_reward: won")
    return record.reward


def normalised(samples: Sequence[Any], coef: float) -> list[float]:
    """coef x (r - mean of its group) / (standard deviation of its group + 1e-6) for each sample of a batch.

    r is the reward of the sample's episode, which counts once, however many samples it has (they share a rollout_id).
    The deviation is slime's, with n - 1. Sums are exact: a group of equals has 0.
    """
    groups: defaultdict[Any, dict[Any, float]] = defaultdict(dict)
    for sample in samples:
        groups[sample.group_index][sample.rollout_id] = sample.reward
    means = {group: mean(rewards.values()) for group, rewards in groups.items()}
    scales = {group: stdev(rewards.values()) if len(rewards) > 1 else 0.0 for group, rewards in groups.items()}
    return [
        coef * (sample.reward - means[sample.group_index]) / (scales[sample.group_index] + 1e-6) for sample in samples
    ]
