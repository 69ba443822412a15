"""An episode as plain data for people to read: what was shown, said and done, and the sampled tokens' numbers.

A transcript is a line of rollouts/*.jsonl (episode_log.py); tools/show_rollouts.py makes a page of them.

    {"task": {..}, "task_type": "..", "goal": "..", "index": 7,
     "n": 12, "k": 3, "evaluation": false, "replayed": 5, "budget": 5,      EpisodeRecord's own fields
     "won": true, "failure": null, "detail": "", "unscored": null, "context_limited": false, "outcome": "..", ..
     "kl": 1.2,                                                             nats, or null without a teacher's scores
     "turns": [{"turn": 0, "role": "replayed", "observation": "..", "response": "..", "action": ".."},
               {"turn": 5, "role": "student", .., "valid": true, "admissible": true, "cut": false,
                "weight_version": "12", "kl": 0.3}],
     "spans": [{"role": "prompt", "count": 210, "text": ".."}, {"role": "replayed", "turn": 0, ..}, ..
               {"role": "sampled", "turn": 5, "count": 9, "tokens": ["<", ..],
                "student": [-0.1, ..], "teacher": [-0.2, ..]}, {"role": "context", ..}]}

The spans are all sequences in order: what the model was given, and what it said. Under tcod_history turns what it was
given at a later turn is one span of context. An episode that failed before it was complete has no spans.

How long a transcript gets is bounded: a text has at most MAX_TEXT characters, and at most MAX_TOKENS sampled tokens
are kept one by one. With 30 turns that is at most 0.6 MB of ASCII text (JSON writes other characters as six).
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ..episode.record import Episode, EpisodeRecord
from ..episode.rows import task_of
from .metrics import turn_kl

MAX_TEXT = 4000
MAX_TOKENS = 4096
_DIGITS = 4  # of log-probs and KL, in nats


def transcript(sample: Any, tokenizer: Any) -> dict[str, Any]:
    """The transcript of one of slime's samples that was played, or failed."""
    episode = Episode.of(sample)
    record, kl = episode.record, turn_kl(episode) if episode.is_scored else {}
    facts = record.as_dict()
    del facts["demonstration"], facts["turns"]
    return {
        "task": _task(sample.metadata),
        "task_type": clip(str(sample.label or "")),
        "goal": clip(str(sample.prompt)),
        "index": sample.index,
        **facts,
        "outcome": clip(record.outcome),
        "kl": _number(sum(kl.values())) if kl else None,
        "turns": [*_replayed_turns(record), *_student_turns(episode, tokenizer, kl)],
        "spans": list(_spans(episode, tokenizer)),
    }


def clip(text: str) -> str:
    """A text of at most MAX_TEXT characters: of a longer one, the beginning and the end."""
    if len(text) <= MAX_TEXT:
        return text
    head, tail = MAX_TEXT * 3 // 4, MAX_TEXT // 4 - 50
    return f"{text[:head]} [... {len(text) - head - tail} characters left out ...] {text[-tail:]}"


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


def _task(metadata: dict[str, Any]) -> dict[str, Any] | str:
    text = json.dumps(task_of(metadata), sort_keys=True, default=str)
    return json.loads(text) if len(text) <= MAX_TEXT else clip(text)


def _replayed_turns(record: EpisodeRecord) -> Iterator[dict[str, Any]]:
    for turn, played in enumerate(record.demonstration):
        yield {
            "turn": turn,
            "role": "replayed",
            "observation": clip(played.observation),
            "response": clip(played.response),
            "action": clip(played.action),
        }


def _student_turns(episode: Episode, tokenizer: Any, kl: dict[int, float]) -> Iterator[dict[str, Any]]:
    said = {span.turn: span.ids for span, _ in episode.sampled()}
    for played in episode.record.turns:
        yield {
            "turn": played.turn,
            "role": "student",
            "observation": clip(played.observation),
            "response": _text(said.get(played.turn, []), tokenizer),
            "action": clip(played.action),
            "valid": played.valid,
            "admissible": played.admissible,
            "cut": played.cut,
            "weight_version": played.weight_version,
            "kl": _number(kl[played.turn]) if played.turn in kl else None,
        }


def _spans(episode: Episode, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """All sequences from their first token to their last."""
    scores = {span.turn: teacher for span, teacher in episode.sampled()}
    kept = 0
    for span in (span for sequence in episode.sequences for span in sequence.spans):
        one = {"role": span.role, "count": len(span.ids)}
        if span.turn is not None:
            one["turn"] = span.turn
        kept += len(span.ids) if span.role == "sampled" else 0
        if span.role != "sampled" or kept > MAX_TOKENS:
            yield {**one, "text": _text(span.ids, tokenizer)}
            continue
        teacher = scores[span.turn]
        yield {
            **one,
            "tokens": token_texts(span.ids, tokenizer),
            "student": [_number(value) for value in span.response.log_probs],
            "teacher": teacher and [_number(value) for value in teacher],
        }


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    return clip(tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


def _number(value: float) -> float | None:
    return round(value, _DIGITS) if math.isfinite(value) else None
