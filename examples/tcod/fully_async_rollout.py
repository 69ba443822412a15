"""TCOD under slime's train_async.py, where episodes go on while the model is trained. slime loads by flag:

    --rollout-function-path examples.tcod.fully_async_rollout.generate_rollout_fully_async

and the other hooks of tcod_rollout.py.
"""

import copy
import time
from argparse import Namespace
from collections import Counter
from typing import Any

from slime.rollout.base_types import RolloutFnTrainOutput
from slime.rollout.fully_async_rollout import generate_rollout_fully_async as collect

from . import ConfigError
from .episode.loop import EpisodeRecord
from .records.episode_log import save_rollout
from .records.metrics import rollout_metrics
from .settings.config import TcodConfig
from .tcod_rollout import StampedSource, checked_config, drop_failed, too_many_failures
from .training.samples import Groups, flat, to_train
from .training.schedule import count_rollout, depth_of


def generate_rollout_fully_async(
    args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """slime's fully asynchronous rollout (train_async.py), in which episodes go on while the model is trained.

    An episode's depth is k(rollout id when it was drawn). slime has no filter there, so groups with a failed sample
    are dropped here and others taken instead. Nothing that was played is dropped for its age: that would train on the
    fastest episodes only. Instead a rollout takes the oldest groups first, waits for those drawn tcod_max_staleness
    rollouts ago, and draws only as far ahead as that leaves room for.

    Raises:
        ConfigError: on the first call, when a setting cannot work; always in an evaluation, which slime lacks there.
        RuntimeError: when more than tcod_max_replacements whole batches of failed groups were replaced.
    """
    if evaluation:
        raise ConfigError("slime cannot evaluate in a fully asynchronous run: remove --eval-interval")
    config = checked_config(args, data_source)
    depth_of(config, data_source, rollout_id)  # slime's worker would swallow its ConfigError
    started = time.monotonic()
    source = _continuous_source(args, config, data_source)
    source.rollout_id = rollout_id
    one = copy.copy(args)  # slime's worker keeps the arguments of the first call
    one.rollout_batch_size = 1
    dropped: Groups = []
    while source.waits_for(rollout_id):
        if len(dropped) > config.tcod_max_replacements * args.rollout_batch_size:
            missing = args.rollout_batch_size - len(source.ready)
            raise too_many_failures(rollout_id, missing, flat(dropped))
        for group in collect(one, rollout_id, source):
            source.playing[_drawn_at(group)] -= 1
            (source.ready if drop_failed(args, group).keep else dropped).append(group)
    kept = source.take_oldest()
    drawn = flat(kept) + flat(dropped)
    metrics = rollout_metrics(flat(kept), drawn, time.monotonic() - started)
    metrics |= count_rollout(config, data_source, rollout_id, flat(kept))
    source.rollout_id = rollout_id + 1  # whatever the worker draws from now on
    stale = sum(rollout_id - _drawn_at(group) > config.tcod_max_staleness for group in kept)
    metrics |= {"rollout/tcod/stale": stale * args.n_samples_per_prompt, **save_rollout(args, rollout_id, drawn)}
    return RolloutFnTrainOutput(samples=to_train(args, config, kept), metrics=metrics)


class _ContinuousSource(StampedSource):
    """The source of a whole run: counts what is played, and keeps what was played ahead.

    Attributes:
        playing: groups drawn and not finished yet, by the rollout of the draw.
        ready: groups that are finished and go to training, this rollout's or a later one's.
    """

    def __init__(self, config: TcodConfig, source: Any, batch_size: int) -> None:
        super().__init__(config, source)
        self.batch_size = batch_size
        self.playing: Counter[int] = Counter()
        self.ready: Groups = []

    def get_samples(self, num_samples: int) -> Groups:
        """slime's worker asks for one group after the other, until it gets none."""
        if self.playing.total() + len(self.ready) >= (self.config.tcod_max_staleness + 1) * self.batch_size:
            return []
        groups = super().get_samples(num_samples)
        self.playing[self.rollout_id] += len(groups)
        return groups

    def waits_for(self, rollout_id: int) -> bool:
        """Whether a batch is incomplete, or groups are still played that are as old as they may get."""
        oldest = rollout_id - self.config.tcod_max_staleness
        overdue = any(count and drawn_at <= oldest for drawn_at, count in self.playing.items())
        return len(self.ready) < self.batch_size or overdue

    def take_oldest(self) -> Groups:
        self.ready.sort(key=lambda group: (_drawn_at(group), group[0].index))
        batch, self.ready = self.ready[: self.batch_size], self.ready[self.batch_size :]
        return batch


_continuous: _ContinuousSource | None = None


def _continuous_source(args: Namespace, config: TcodConfig, data_source: Any) -> _ContinuousSource:
    """One for the run: slime's worker draws from the first source it was given, for ever."""
    global _continuous
    if _continuous is None or _continuous.source is not data_source:
        _continuous = _ContinuousSource(config, data_source, args.rollout_batch_size)
    return _continuous


def _drawn_at(group: list[Any]) -> int:
    """The rollout in which a group was drawn."""
    return EpisodeRecord.of(group[0]).n
