"""slime's samples made of episodes: once, when a rollout is complete."""

import contextlib
import copy
import logging
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from slime.observability.trace_utils import build_sglang_meta_trace_attrs, trace_span
from slime.utils.types import Sample

from .. import ABORTED
from ..episode.episode import Episode, EpisodeRecord, TokenSequence

logger = logging.getLogger(__name__)

Groups = list[list[Sample]]  # slime's batch: the samples of each prompt


# slime's statistics of requests, which a sample of one turn has of its own request.
_PER_REQUEST = ("trace", "prefix_cache_info", "spec_info", "non_generation_time")


def flat(groups: Groups) -> list[Sample]:
    return [sample for group in groups for sample in group]


def set_status(sample: Sample, tokenizer: Any) -> None:
    """What slime's rollout loop has to know of an episode that has ended: its status, and its text for the log.

    A failed one gets reward 0.0; an aborted one an Episode as it was drawn.
    """
    episode = Episode.of(sample)
    record = episode.record
    if record.failure == ABORTED:  # a surplus episode: slime throws it away
        sample.status, sample.response = Sample.Status.ABORTED, ""
        sample.metadata["tcod"] = Episode(EpisodeRecord(n=record.n, k=record.k, evaluation=record.evaluation))
    elif record.failure:
        logger.warning("sample %s failed, %s: %s", sample.index, record.failure, record.detail)
        sample.status, sample.reward = Sample.Status.FAILED, 0.0
    else:
        sample.status = Sample.Status.TRUNCATED if record.truncated else Sample.Status.COMPLETED
        sample.non_generation_time = record.env_s
        ids = [token for sequence in episode.sequences for span in sequence.after_prompt for token in span.ids]
        sample.response = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)  # as fast as it can be


def to_samples(args: Namespace, sample: Sample, tokenizer: Any) -> list[Sample]:
    """The samples of an episode that was played: the sample itself, or one for each of several sequences.

    slime weighs those of one rollout_id as one trajectory. Each sample's record keeps only its own turn. Afterwards
    metadata["tcod"] is the record as plain data.
    """
    episode = Episode.of(sample)
    sample.rollout_id = sample.index
    if len(episode.sequences) == 1:
        write_tokens(args, sample, episode.sequences)
        sample.teacher_log_probs = episode.sequences[0].teacher_log_probs
        sample.metadata["tcod"] = episode.record.as_dict()
        return [sample]
    samples = []
    for sequence, turn in zip(episode.sequences, episode.record.turns, strict=True):
        of_turn = copy.copy(sample)
        for name in _PER_REQUEST:
            setattr(of_turn, name, getattr(Sample(), name, None))
        of_turn.weight_versions = []
        of_turn.status = Sample.Status.TRUNCATED if turn.cut else Sample.Status.COMPLETED
        write_tokens(args, of_turn, [sequence])
        of_turn.teacher_log_probs = sequence.teacher_log_probs
        of_turn.response = tokenizer.decode(of_turn.tokens[-of_turn.response_length :], skip_special_tokens=False)
        record = replace(episode.record, replayed_turns=[], turns=[turn])
        of_turn.metadata = {**sample.metadata, "tcod": record.as_dict()}
        samples.append(of_turn)
    for name in ("trace", "non_generation_time"):  # of the whole episode: counted once
        setattr(samples[0], name, getattr(sample, name, None))
    samples[-1].status = sample.status
    return samples


def check_complete(args: Namespace, samples: Sequence[Sample], needs: str) -> None:
    """Raises ValueError where a sample has not all that it is trained with; `needs` is the flag that keeps it out."""
    for sample in samples:
        needed = {"loss_mask": sample.loss_mask}
        if args.loss_type != "sft_loss":
            needed["rollout_log_probs"] = sample.rollout_log_probs
        if args.opd_type == "sglang":
            needed["teacher_log_probs"] = sample.teacher_log_probs
        for name, values in needed.items():
            if values is None or len(values) != sample.response_length or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"sample {sample.index} ({sample.status.value}) has no complete and finite {name}: is {needs} set?"
                )


def write_tokens(args: Namespace, sample: Sample, sequences: list[TokenSequence]) -> None:
    """The tokens of these sequences, end to end after the first prompt, and which of them are trained."""
    sample.tokens, sample.response_length, status = sequences[0].prompt, 0, sample.status
    for span in [*sequences[0].after_prompt, *(span for later in sequences[1:] for span in later.spans)]:
        said = {"log_probs": span.log_probs, "meta_info": span.meta_info} if span.is_trained else {}
        sample.append_response_tokens(args, tokens=span.ids, trainable=span.is_trained, **said)
    sample.status = status  # slime's is that of the last response
    if args.loss_type == "sft_loss":
        sample.rollout_log_probs = None  # slime would not take the tokens without: nobody sampled them


@contextlib.contextmanager
def timeline_span(sample: Sample, name: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A span on slime's timeline."""
    with trace_span(sample, name) as opened:
        yield lambda meta_info: opened.update(build_sglang_meta_trace_attrs(meta_info))
