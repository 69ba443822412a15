"""From episodes to slime's samples: what is handed to slime of one that was played, and of one that was lost."""

import contextlib
import copy
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from slime.observability.trace_utils import build_sglang_meta_trace_attrs, trace_span
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.types import Sample

from .. import ABORTED, Failure
from ..episode.history import History
from ..episode.loop import EpisodeRecord
from ..settings.config import TcodConfig

logger = logging.getLogger(__name__)

Groups = list[list[Sample]]  # slime's batch: the samples of each prompt


def fill(args: Namespace, sample: Sample, history: History, record: EpisodeRecord) -> None:
    """Put an episode into slime's sample: its tokens, which of them are trained, and how it ended.

    An episode of several sequences holds them end to end; fan_out makes the samples that are trained on.
    """
    _undo(sample)
    sample.tokens = list(history.prompt)
    for span in history.spans:
        if span.sampled:
            sampled = span.sampled
            sample.append_response_tokens(
                args, tokens=sampled.ids, log_probs=sampled.log_probs, trainable=True, meta_info=sampled.meta_info
            )
        else:
            sample.append_response_tokens(args, tokens=span.ids, trainable=False)
    said = [i for span in history.spans if span.sampled or len(history.prompts) == 1 for i in span.ids]
    sample.response = history.chat.tokenizer.decode(said, skip_special_tokens=False)
    sample.status = Sample.Status.TRUNCATED if record.truncated else Sample.Status.COMPLETED
    sample.non_generation_time = record.env_s
    record.store(sample)


# slime's statistics of all requests of an episode, which its first sample keeps.
_COUNTED_ONCE = ("trace", "prefix_cache_info", "spec_info", "non_generation_time")


def fan_out(sample: Sample, tokenizer: Any) -> list[Sample]:
    """An episode's sequences, each a sample; slime weighs those of one rollout_id as one trajectory.

    The record of each is the episode's, but of turns it has its own only, counted from its own first token.
    """
    record, laid = EpisodeRecord.of(sample), len(sample.tokens) - sample.response_length
    samples = []
    for turn, (start, begin, end) in zip(record.turns, record.sequences(len(sample.tokens)), strict=True):
        one = copy.copy(sample)
        for name in _COUNTED_ONCE if samples else ():
            setattr(one, name, getattr(Sample(), name, None))
        one.status = Sample.Status.TRUNCATED if turn.cut else Sample.Status.COMPLETED
        one.weight_versions = [turn.weight_version] if turn.weight_version else []
        one.rollout_id = sample.index
        one.tokens, one.response_length = sample.tokens[start:end], end - begin
        for name in ("loss_mask", "rollout_log_probs", "teacher_log_probs"):
            values = getattr(sample, name)
            setattr(one, name, values and values[begin - laid : end - laid])
        one.response = tokenizer.decode(sample.tokens[begin:end], skip_special_tokens=False)
        one.metadata = dict(sample.metadata)
        own = replace(turn, start=0, end=end - begin)
        replace(record, replay=[], turns=[own], prompts=[(0, begin - start)]).store(one)
        samples.append(one)
    samples[-1].status = sample.status
    return samples


def flat(groups: Groups) -> list[Sample]:
    return [sample for group in groups for sample in group]


def to_train(args: Namespace, config: TcodConfig, groups: Groups) -> Groups:
    """Groups of episodes as slime trains on them: under tcod_history turns an episode is a list of samples."""
    if config.tcod_history == "append":
        return groups
    tokenizer = GenerateState(args).tokenizer
    return [[fan_out(sample, tokenizer) for sample in group] for group in groups]


def _undo(sample: Sample) -> None:
    """Take the response away: what a sample has before it is played."""
    sample.tokens, sample.response, sample.response_length = [], "", 0
    sample.loss_mask = sample.rollout_log_probs = sample.teacher_log_probs = None
    sample.weight_versions = []


def fail(sample: Sample, record: EpisodeRecord, failure: Failure) -> None:
    """The sample is never trained on and has no reward; its record says why, and what was played until then."""
    if failure.reason == ABORTED:  # a surplus episode: slime throws it away
        _undo(sample)
        sample.status = Sample.Status.ABORTED
        record = EpisodeRecord(n=record.n, k=record.k, evaluation=record.evaluation)
    else:
        line = " ".join(str(failure).split())[:500]  # Ray tells of a dead worker in ten
        logger.warning("sample %s failed, %s: %s", sample.index, failure.reason, line)
        sample.status, sample.reward = Sample.Status.FAILED, 0.0
        record = replace(record, failure=failure.reason, detail=line)
    record.store(sample)


@contextlib.contextmanager
def timeline_span(sample: Sample, name: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A span on slime's timeline."""
    with trace_span(sample, name) as opened:
        yield lambda meta_info: opened.update(build_sglang_meta_trace_attrs(meta_info))
