"""From episodes to slime's samples: what is handed to slime of one that was played, and of one that was lost."""

import contextlib
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from slime.observability.trace_utils import build_sglang_meta_trace_attrs, trace_span
from slime.utils.types import Sample

from .episode import EpisodeRecord
from .errors import ABORTED, Failure
from .history import AppendHistory

logger = logging.getLogger(__name__)


def fill(args: Namespace, sample: Sample, history: AppendHistory, record: EpisodeRecord) -> None:
    """Hand an episode to slime: its tokens, which of them are trained, and how it ended."""
    _undo(sample)
    sample.tokens = history.tokens[: history.prompt_length]
    for span in history.spans:
        if span.sampled:
            sampled = span.sampled
            sample.append_response_tokens(
                args, tokens=sampled.ids, log_probs=sampled.log_probs, trainable=True, meta_info=sampled.meta_info
            )
        else:
            sample.append_response_tokens(args, tokens=span.ids, trainable=False)
    sample.response = history.chat.tokenizer.decode(history.tokens[history.prompt_length :], skip_special_tokens=False)
    sample.status = Sample.Status.TRUNCATED if record.truncated else Sample.Status.COMPLETED
    sample.non_generation_time = record.env_s
    record.store(sample)


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
