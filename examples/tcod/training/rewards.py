"""What an episode's reward is, and what slime trains on of it: tcod_reward and tcod_reward_coef.

slime's advantage of a token is what stands here for its sample, minus --opd-kl-coef times the token's KL to the
teacher. Without a teacher it is this alone, which is GRPO.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from .. import Failure
from ..episode.record import EpisodeRecord

NO_SIGNAL = "no_signal"


def reward_of(record: EpisodeRecord, kind: str) -> float:
    """An episode's reward: 1.0 or 0.0 ("won"), or the environment's grade at its end ("grade").

    Raises:
        Failure: no_grade.
    """
    if kind == "won":
        return float(record.won)
    if record.reward is None:
        raise Failure("no_grade", "the environment gives no grade: have finish return one, or set tcod_reward: won")
    return record.reward


def has_signal(group: Sequence[Any]) -> bool:
    """Whether the rewards of a group's samples differ."""
    return len({sample.reward for sample in group}) > 1


def normalised(samples: Sequence[Any], coef: float) -> list[float]:
    """coef x (r - mean of its group) / (standard deviation of its group + 1e-6) for each sample of a batch.

    r is the reward of the sample's episode. An episode counts once in its group, however many samples it has (they
    share a rollout_id). The deviation is slime's: sqrt(sum of squares / (episodes - 1)). A group of equals has 0.
    """
    groups: defaultdict[Any, dict[Any, float]] = defaultdict(dict)
    for sample in samples:
        groups[sample.group_index][sample.rollout_id] = sample.reward
    shape = {}
    for index, rewards in groups.items():
        values = list(rewards.values())
        shape[index] = mean(values), stdev(values) + 1e-6 if len(values) > 1 else 1.0  # exact: equals differ by 0
    return [coef * (sample.reward - shape[sample.group_index][0]) / shape[sample.group_index][1] for sample in samples]
