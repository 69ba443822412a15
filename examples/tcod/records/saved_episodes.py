"""Some episodes of every rollout and evaluation, for people to read: $TCOD_RUN_DIR/rollouts.

    train_000012.jsonl            of rollout 12
    eval_unseen_000025.jsonl      of the evaluation on the data set "unseen" after 25 rollouts, n as in metrics.jsonl

A line is a Transcript. `python -m examples.tcod.tools.show_rollouts RUN_DIR` makes a page of them.

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
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, FiniteFloat, ValidationError

from ..episode.record import Episode
from ..episode.rows import task_key, task_of
from .metrics import Metrics, turn_kl
from .run_folder import note_rollout, rollouts_before, run_dir, write

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


Text = Annotated[str, BeforeValidator(lambda text: clip(text) if isinstance(text, str) else text)]
Nats = FiniteFloat | None


class Turn(BaseModel):
    """One turn: what the model was shown, what it said, what was done. Fields without a comment are TurnRecord's."""

    turn: int
    role: Literal["replayed", "student"]
    observation: Text
    context: list[Text] = []  # what precedes the response, parted at the observation, which is not in here once more
    context_tokens: int = 0  # 0 where a replayed turn has no tokens of its own: it is in the first student's context
    response: Text = ""  # empty where `tokens` has it
    response_tokens: int = 0
    tokens: list[str] | None = None  # the text of each sampled one
    student: list[Nats] | None = None  # their log-probs
    teacher: list[Nats] | None = None
    kl: Nats = None  # summed over them
    action: Text
    valid: bool = True
    admissible: bool = True
    refused: bool = False
    cut: bool = False
    weight_version: Text | None = None


class Transcript(BaseModel):
    """An episode as plain data for people to read. Fields without a comment are EpisodeRecord's."""

    source: str = ""  # FILE:LINE that it was read from
    arm: Text
    dataset: Text  # "train", or the evaluation's
    n: int  # as in metrics.jsonl
    index: int | None = None  # the sample's
    task: Text  # the row's metadata, as JSON
    task_type: Text
    goal: Text
    k: int | None
    replayed: int
    budget: int
    won: bool
    reward: FiniteFloat | None = None
    failure: Text | None
    detail: Text = ""
    unscored: Text | None = None
    context_limited: bool = False
    outcome: Text = ""
    env_s: float = 0.0
    episode_s: float = 0.0
    teacher_s: float = 0.0
    kl: Nats  # summed over the student's tokens; None without the teacher's scores
    turns: list[Turn]

    @classmethod
    def of(cls, line: Any) -> "Transcript":
        """Of a line's JSON. Raises ValueError, which names the first field that is wrong."""
        try:
            return cls.model_validate(line)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    def line(self) -> str:
        return json.dumps(self.model_dump(exclude={"source"})) + "\n"


def transcript(episode: Episode, row: Any, tokenizer: Any, **about: Any) -> Transcript:
    """The transcript of an episode that was played, or failed.

    Args:
        row: what has prompt, label and metadata: a Row, or slime's sample.
        about: arm, dataset, n and index.
    """
    record, kl = episode.record, turn_kl(episode) if episode.is_scored else {}
    tokens = _tokens_by_turn(episode, tokenizer)
    turns = [{"turn": turn, "role": "replayed", **vars(one)} for turn, one in enumerate(record.demonstration)]
    turns += [{"role": "student", "kl": _number(kl.get(one.turn)), **vars(one)} for one in record.turns]
    for turn in turns:
        turn |= tokens.get(turn["turn"], {})
        if turn["observation"]:
            turn["context"] = [
                part for text in turn.get("context", []) for part in text.rsplit(turn["observation"], 1)
            ]
    facts = {**vars(record), "reward": _number(record.reward), "turns": turns}
    facts |= {"kl": _number(sum(kl.values())) if kl else None}
    facts |= {"task": task_key(task_of(row.metadata)), "task_type": str(row.label or ""), "goal": str(row.prompt)}
    return Transcript(**{**facts, **about})


def _tokens_by_turn(episode: Episode, tokenizer: Any) -> dict[int, dict[str, Any]]:
    """What Turn says of the tokens of each response, and of those in front of it."""
    turns: dict[int, dict[str, Any]] = {}
    for given, span in (pair for sequence in episode.sequences for pair in pairwise(sequence.spans)):
        if span.turn is not None:
            context, response = (tokenizer.decode(one.ids, skip_special_tokens=False) for one in (given, span))
            turns[span.turn] = {"context": [context], "context_tokens": len(given.ids)}
            turns[span.turn] |= {"response": response, "response_tokens": len(span.ids)}
    room = MAX_TOKENS
    for span, teacher in episode.sampled():
        room -= len(span.ids)
        if room >= 0:
            turns[span.turn] |= {
                "response": "",
                "tokens": token_texts(span.ids, tokenizer),
                "student": [_number(value) for value in span.response.log_probs],
                "teacher": teacher and [_number(value) for value in teacher],
            }
    return turns


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


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


# --------------------------------------------------------------------------------------------- which ones, and where


@dataclass(frozen=True)
class EpisodeLog:
    """Saves some episodes of every rollout and evaluation of a run.

    Attributes:
        arm: tcod_variant.
        limit: tcod_save_episodes, of a rollout; of an evaluation's data set twice as many.
    """

    arm: str
    limit: int | Literal["all"]
    tokenizer: Any

    def save_rollout(self, n: int, drawn: Sequence[Any]) -> Metrics:
        """Save some of the samples that were drawn for rollout n, failed ones included.

        Returns rollout/tcod/unsaved_episodes: how many of them could not be written.
        """
        note_rollout()
        return {"rollout/tcod/unsaved_episodes": self._save("train", n, drawn, self.limit)}

    def save_evaluation(self, evaluation_id: int, data: dict[str, dict[str, Any]]) -> Metrics:
        """Save some samples of every data set of an evaluation; `data` is RolloutFnEvalOutput.data."""
        limit = self.limit if self.limit == "all" else 2 * self.limit
        n = rollouts_before(evaluation_id)
        return {
            f"eval/tcod/{name}/unsaved_episodes": self._save(f"eval_{name}", n, result["samples"], limit)
            for name, result in data.items()
        }

    def _save(self, stem: str, n: int, samples: Sequence[Any], limit: int | Literal["all"]) -> int:
        """Write stem_n.jsonl. Returns how many samples are missing there, 0 where there is no run directory."""
        if run_dir() is None or limit == 0:
            return 0
        try:
            chosen = choose(samples, limit)
            about = {"arm": self.arm, "dataset": stem.removeprefix("eval_"), "n": n}
            lines = [transcript(Episode.of(one), one, self.tokenizer, index=one.index, **about) for one in chosen]
            name = f"rollouts/{re.sub(r'[^A-Za-z0-9._-]', '_', stem)}_{n:06d}.jsonl"
            return 0 if write(name, "".join(one.line() for one in lines), "episodes") else len(lines)
        except Exception:  # a mistake in here must not end the run
            logger.exception("episodes are not saved")
            return len(samples) if limit == "all" else min(len(samples), limit)


def choose(samples: Sequence[Any], limit: int | Literal["all"]) -> list[Any]:
    """Samples to save, at most `limit` unless it is "all".

    One that was won, one that was lost and one for every reason of a failure come first. The others are those of the
    same tasks at every step, so that one can see what was learned. The choice depends on nothing but the tasks and how
    they ended. Aborted samples have nothing to show, and samples of other hooks are not ours.
    """
    ours = [sample for sample in samples if "tcod" in (sample.metadata or {}) and sample.status.value != "aborted"]
    times: Counter[str] = Counter()
    rank: dict[int, tuple[int, str]] = {}
    for sample in ours:
        task = hashlib.sha256(task_key(task_of(sample.metadata)).encode()).hexdigest()
        rank[id(sample)] = (times[task], task)  # of a group, one sample before any task's second one
        times[task] += 1
    ranked = sorted(ours, key=lambda sample: rank[id(sample)])
    if limit == "all":
        return ranked
    one_of_each = {_ending(sample): sample for sample in reversed(ranked)}
    first = [one_of_each[ending] for ending in sorted(one_of_each)]
    return list({id(sample): sample for sample in [*first, *ranked]}.values())[:limit]


def _ending(sample: Any) -> tuple[int, str]:
    """Won, lost, and each reason of a failure, in this order."""
    record = Episode.of(sample).record
    return (2, record.failure) if record.failure else (0 if record.won else 1, "")
