"""Some episodes of every rollout and evaluation, for people to read: $TCOD_RUN_DIR/rollouts.

    train_000012.jsonl            of rollout 12
    eval_unseen_000025.jsonl      of the evaluation on the data set "unseen" after 25 rollouts, n as in metrics.jsonl

`python -m examples.tcod.tools.show_rollouts RUN_DIR` makes a page of them. A line is an episode: EpisodeRecord's
fields, "arm", "dataset" ("train", or the evaluation's), "index" (the sample's), "task" (the row's metadata, as JSON),
"task_type", "goal", "kl" (nats, summed over the student's tokens; null without the teacher's scores), "note" (Note's
fields, the text in lines; null where the teacher was shown none) and "turns". One of these has the fields of
ReplayedTurn or TurnRecord, and

    role                         "replayed" or "student"
    context, context_tokens      the text before the response, split where the observation stands, which is left out
    response, response_tokens    the text, empty where "tokens" has it
    tokens, student, teacher     of each sampled token: its text, the student's and the teacher's log-prob
    plain                        the teacher's without its note, null unless tcod_save_plain_scores asks for them
    kl                           summed over them

A replayed turn without tokens of its own is in the first student's context; a failed episode may have no tokens.
How long a line gets is bounded: a text has at most MAX_TEXT characters, and at most MAX_TOKENS sampled tokens are kept
one by one. With 30 turns that is at most 0.8 MB of ASCII text (JSON writes other characters as six).
"""

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..episode.episode import Episode
from ..episode.rows import task_key, task_of
from .metrics import turn_kl
from .run_folder import run_dir, write

logger = logging.getLogger(__name__)

MAX_TEXT = 4000
MAX_TOKENS = 4096


def clip(text: str) -> str:
    """A text of at most MAX_TEXT characters, all of which UTF-8 has: of a longer one, the beginning and the end."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= MAX_TEXT:
        return text
    head, tail = MAX_TEXT * 3 // 4, MAX_TEXT // 4 - 50
    return f"{text[:head]} [... {len(text) - head - tail} characters left out ...] {text[-tail:]}"


def transcript(episode: Episode, row: Any, tokenizer: Any, **about: Any) -> dict[str, Any]:
    """The line of an episode that was played, or failed, as plain data.

    Args:
        row: what has prompt, label and metadata: a Row, or slime's sample.
        about: arm, dataset, n and index.
    """
    facts, kl = dict(vars(episode.record)), turn_kl(episode) if episode.is_scored else {}
    turns = [{"turn": turn, "role": "replayed", **vars(one)} for turn, one in enumerate(facts.pop("replayed_turns"))]
    own = {"role": "student", "response": ""}  # of a failed episode nothing else is known
    turns += [{**own, "kl": kl.get(one.turn), **vars(one)} for one in facts.pop("turns")]
    _add_tokens({turn["turn"]: turn for turn in turns}, episode, tokenizer)
    note = {**vars(episode.note), "text": episode.note.text.split("\n")} if episode.note else None
    facts |= {"kl": sum(kl.values()) if kl else None, "note": note, "turns": turns}
    facts |= {"task": task_key(task_of(row.metadata)), "task_type": str(row.label or ""), "goal": str(row.prompt)}
    return _bounded({**facts, **about})


def _add_tokens(turns: dict[int, dict[str, Any]], episode: Episode, tokenizer: Any) -> None:
    for given, span in (pair for sequence in episode.sequences for pair in pairwise(sequence.spans)):
        if (turn := turns.get(span.turn)) is not None:
            context, response = (tokenizer.decode(part.ids, skip_special_tokens=False) for part in (given, span))
            parts = context.rsplit(turn["observation"], 1) if turn["observation"] else [context]
            turn |= {"context": parts, "context_tokens": len(given.ids)}
            turn |= {"response": response, "response_tokens": len(span.ids)}
    room = MAX_TOKENS
    for (span, teacher), (_, plain) in zip(episode.sampled(), episode.sampled(plain=True), strict=True):
        room -= len(span.ids)
        if room >= 0:
            texts, student = token_texts(span.ids, tokenizer), span.log_probs
            turns[span.turn] |= {"response": "", "tokens": texts, "student": student}
            turns[span.turn] |= {"teacher": teacher, "plain": plain}


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of every token. A character that several tokens make up stands at the last of them."""
    texts: list[str] = []
    pending: list[int] = []
    for position, token in enumerate(ids, 1):
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(pending) < 4 and position < len(ids):  # UTF-8 has at most four bytes
            text = ""
        else:
            pending = []
        texts.append(text)
    return texts


def _bounded(value: Any) -> Any:
    """The same data with clipped texts and short numbers; one that JSON lacks becomes None."""
    if isinstance(value, dict):
        return {name: _bounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_bounded(one) for one in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return clip(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class EpisodeLog:
    """Saves some episodes of every rollout and evaluation of a run.

    Attributes:
        arm: tcod_variant.
        limit: of a rollout; of an evaluation's data set twice as many.
    """

    arm: str
    limit: int
    tokenizer: Any

    def save(self, stem: str, n: int, samples: Sequence[Any]) -> int:
        """Write stem_n.jsonl: "train", or "eval_" and a data set's name. n is as in metrics.jsonl.

        Returns how many samples could not be written, 0 where there is no run directory.
        """
        limit = self.limit if stem == "train" else 2 * self.limit
        if run_dir() is None or limit == 0 or not samples:
            return 0
        try:
            about = {"arm": self.arm, "dataset": stem.removeprefix("eval_"), "n": n}
            lines = [
                json.dumps(transcript(Episode.of(sample), sample, self.tokenizer, index=sample.index, **about)) + "\n"
                for sample in choose_to_save(samples, limit)
            ]
            name = f"rollouts/{re.sub(r'[^A-Za-z0-9._-]', '_', stem)}_{n:06d}.jsonl"
            return 0 if write(name, "".join(lines)) else len(lines)
        except Exception:  # a mistake in here must not end the run
            logger.exception("episodes are not saved")
            return min(len(samples), limit)


def choose_to_save(samples: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` samples to save.

    One that was won, one that was lost and one for every reason of a failure come first. The others are those of the
    same tasks at every step, so that one can see what was learned. The choice depends on nothing but the tasks and how
    they ended. Aborted samples have nothing to show.
    """
    times: Counter[str] = Counter()

    def by_task(sample: Any) -> tuple[int, str]:
        task = hashlib.sha256(task_key(task_of(sample.metadata)).encode()).hexdigest()
        times[task] += 1
        return times[task], task  # of a group, one sample before any task's second one

    ranked = sorted((sample for sample in samples if sample.status.value != "aborted"), key=by_task)
    first = {_ending(sample): sample for sample in reversed(ranked)}
    chosen = [first[ending] for ending in sorted(first)]
    return [*chosen, *(sample for sample in ranked if not any(sample is one for one in chosen))][:limit]


def _ending(sample: Any) -> tuple[int, str]:
    """Won, lost, and each reason of a failure, in this order."""
    record = Episode.of(sample).record
    return (2, record.failure) if record.failure else (0 if record.won else 1, "")
