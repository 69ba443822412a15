"""TCOD under slime's train_async.py, where episodes go on while the model is trained. slime loads by flag:

    --rollout-function-path examples.tcod.fully_async_rollout.generate_rollout_fully_async

and the other hooks of tcod_rollout.py.
"""

import copy
import logging
import time
from argparse import Namespace
from typing import Any

from slime.rollout.base_types import RolloutFnTrainOutput
from slime.rollout.fully_async_rollout import generate_rollout_fully_async as collect

from .config import TcodConfig
from .episode import EpisodeRecord
from .episode_log import save_rollout
from .errors import ConfigError
from .metrics import rollout_metrics
from .schedule import count_rollout
from .tcod_rollout import Groups, StampedSource, checked_config, drop_failed, flat, too_many_failures

logger = logging.getLogger(__name__)

_continuous: StampedSource | None = None


def generate_rollout_fully_async(
    args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """slime's fully asynchronous rollout (train_async.py), in which episodes go on while the model is trained.

    An episode's depth is k(rollout id when it was drawn). slime has no filter there, so groups with a failed sample,
    and those drawn more than tcod_max_staleness rollouts ago, are dropped here and others taken instead.

    Raises:
        ConfigError: on the first call, when a setting cannot work; always in an evaluation, which slime lacks there.
        RuntimeError: when more than tcod_max_replacements whole batches of failed groups were replaced.
    """
    if evaluation:
        raise ConfigError("slime cannot evaluate in a fully asynchronous run: remove --eval-interval")
    config = checked_config(args, data_source)
    started = time.monotonic()
    kept: Groups = []
    dropped: Groups = []
    stale: Groups = []
    while missing := args.rollout_batch_size - len(kept):
        if len(dropped) > config.tcod_max_replacements * args.rollout_batch_size:
            raise too_many_failures(rollout_id, missing, flat(dropped))
        for group in _collect(args, rollout_id, _continuous_source(config, data_source), missing):
            if rollout_id - EpisodeRecord.of(group[0]).n > config.tcod_max_staleness:
                stale.append(group)
            elif drop_failed(args, group).keep:
                kept.append(group)
            else:
                dropped.append(group)
    if stale:
        logger.warning(
            f"rollout {rollout_id}: {len(stale)} groups were drawn more than tcod_max_staleness "
            f"{config.tcod_max_staleness} rollouts ago and dropped; lower --sglang-server-concurrency to draw less"
        )
    drawn = flat(kept) + flat(dropped)
    metrics = rollout_metrics(flat(kept), drawn, time.monotonic() - started)
    metrics |= count_rollout(config, data_source, rollout_id, flat(kept))
    metrics |= {"rollout/tcod/stale": len(flat(stale)), **save_rollout(args, rollout_id, drawn)}
    return RolloutFnTrainOutput(samples=kept, metrics=metrics)


def _continuous_source(config: TcodConfig, data_source: Any) -> StampedSource:
    """The one source of a fully asynchronous run: slime's worker draws from the first one it was given, for ever."""
    global _continuous
    if _continuous is None or _continuous.source is not data_source:
        _continuous = StampedSource(config, data_source)
    return _continuous


def _collect(args: Namespace, rollout_id: int, source: StampedSource, missing: int) -> Groups:
    """The next `missing` groups that slime's worker has finished."""
    source.rollout_id = rollout_id
    if missing < args.rollout_batch_size:
        args = copy.copy(args)  # the worker keeps the arguments of the first call
        args.rollout_batch_size = missing
    return collect(args, rollout_id, source)
