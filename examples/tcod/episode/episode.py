"""What an episode leaves behind: its tokens, in sequences, and a record of what happened."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..environments.protocol import Observation
from ..model.chat_template import Rules, Turn

logger = logging.getLogger(__name__)


@dataclass
class TurnRecord:
    """One turn that the student played."""

    turn: int
    """Its index in the episode, 0-based, replayed turns counted."""
    observation: str
    """The user turn that it answers."""
    action: str
    """As it was sent to the environment."""
    valid: bool
    """The response had the answer format."""
    admissible: bool
    """The environment listed the action, or does not list all of them."""
    cut: bool
    """A length limit ended the response before a stop token did."""
    refused: bool = False
    """The environment did not execute the action."""
    weight_version: str | None = None
    """Of the engine that sampled it, as SGLang reports it."""


@dataclass
class ReplayedTurn:
    """One turn of the demonstration, replayed in the prompt."""

    observation: str
    action: str
    response: str = ""
    as_sampled: bool = False
    """Its tokens are those that it was sampled with when it was recorded; else they are its text's."""


@dataclass
class EpisodeRecord:
    """What is known of an episode beside its tokens. Times are wall-clock seconds.

    A sample that was drawn and not played has n and k only. Of a failed one, `failure` says why, and the turns before
    it are kept for reading; an aborted one is as it was drawn.
    """

    n: int | None = None
    """Rollout id when the sample was drawn; None in an evaluation."""
    k: int | None = None
    """Depth at that rollout, in turns."""
    evaluation: bool = False
    environment: str = ""
    """Its name in tcod_environments; "" where a run has one."""
    replayed: int = 0
    """Turns of the demonstration that are played before the student takes over."""
    budget: int = 0
    """Turns that the student may play."""
    replayed_turns: list[ReplayedTurn] = field(default_factory=list)
    turns: list[TurnRecord] = field(default_factory=list)
    outcome: str = ""
    """What the environment said to the last action."""
    won: bool = False
    reward: float | None = None
    """The environment's own grade of the episode at its end, where it gives one."""
    best_grade: float | None = None
    """The best grade on the way."""
    context_limited: bool = False
    """The context had no room for a further turn."""
    untempered: bool = False
    """Sampled from the policy itself (temperature 1, no top-p, no top-k), so that a KL to the teacher is one."""
    env_s: float = 0.0
    episode_s: float = 0.0
    teacher_s: float = 0.0
    failure: str | None = None
    """Why the episode cannot be used, see docs/FAULTS.md."""
    detail: str = ""
    """The failure in the words of what failed, at most 500 characters."""
    no_signal: bool = False
    """It was not trained on: without a teacher, a group of equal rewards teaches nothing."""
    unscored: str | None = None
    """Why an evaluation episode has no teacher log-probs although tcod_eval_kl asks for them."""

    @property
    def truncated(self) -> bool:
        """Whether a length limit ended the episode, rather than success or the plan."""
        return self.context_limited or (bool(self.turns) and self.turns[-1].cut and not self.won)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that Ray, JSON and torch.save take."""
        turns = {name: [dict(vars(turn)) for turn in getattr(self, name)] for name in ("replayed_turns", "turns")}
        return {**vars(self), **turns}


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens of one origin.

    Attributes:
        turn: of a replayed or sampled response, its index in the episode.
        log_probs: of a sampled one, the engine's, in nats, of an imitated one 0.0; None for all that is not trained.
        meta_info: of a sampled one, see Response.
    """

    ids: list[int]
    turn: int | None = None
    log_probs: list[float] | None = None
    meta_info: dict[str, Any] | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the student sampled it, or it is imitated."""
        return self.log_probs is not None


@dataclass
class TokenSequence:
    """What the student was given and what it sampled, in order: one sequence that is scored and trained on.

    Attributes:
        teacher_log_probs: one number for each token after the prompt, in nats; None before the teacher was asked.
        plain_log_probs: the same without a note, where tcod_save_plain_scores asks for them.
        texts: what the first span is the rendering of: [system, user, answer, user, ..].
    """

    spans: list[Span] = field(default_factory=list)
    teacher_log_probs: list[float] | None = None
    plain_log_probs: list[float] | None = None
    texts: list[Rules | Turn] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for span in self.spans for token in span.ids]

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first sampled one."""
        return [token for span in self.spans[: self._first()] for token in span.ids]

    @property
    def after_prompt(self) -> list[Span]:
        """The spans from the first sampled one on."""
        return self.spans[self._first() :]

    def sampled(self, plain: bool = False) -> Iterator[tuple[Span, list[float] | None]]:
        """Each sampled (or imitated) span, and the teacher's log-probs of its tokens, with `plain` without a note."""
        scores, end = self.plain_log_probs if plain else self.teacher_log_probs, 0
        for span in self.after_prompt:
            start, end = end, end + len(span.ids)
            if span.is_trained:
                yield span, scores and scores[start:end]

    def _first(self) -> int:
        return next((i for i, span in enumerate(self.spans) if span.is_trained), len(self.spans))


@dataclass(frozen=True)
class Note:
    """What the teacher was shown of an episode beside the conversation, see note.py. False where it says nothing."""

    text: str = ""
    parts: tuple[str, ...] = ()  # "demo", "hindsight", as far as steps of it are shown
    left_out: int = 0  # observations, and then steps, that tcod_note_len had no room for
    tokens: int = 0  # by which the first sequence got longer

    def __bool__(self) -> bool:
        return bool(self.text)


@dataclass
class Episode:
    """An episode from the draw to its end; sample.metadata["tcod"] until slime's samples are made of it."""

    record: EpisodeRecord = field(default_factory=EpisodeRecord)
    sequences: list[TokenSequence] = field(default_factory=list)
    """Those that are trained on: one under tcod_history append, under turns one for each turn of the student."""
    seen: list[Observation] = field(default_factory=list)
    """What the environment said: at its reset, and to every action, replayed turns' included."""
    note: Note | None = None

    @classmethod
    def of(cls, sample: Any) -> "Episode":
        """The episode of one of slime's samples."""
        return sample.metadata["tcod"]

    @property
    def observed(self) -> list[str]:
        """What the environment said to each action, replayed ones included."""
        return [observation.full_text for observation in self.seen[1:]]

    @property
    def is_scored(self) -> bool:
        return bool(self.sequences) and all(sequence.teacher_log_probs is not None for sequence in self.sequences)

    def sampled(self, plain: bool = False) -> Iterator[tuple[Span, list[float] | None]]:
        """Each response of the student, and the teacher's log-probs of its tokens, see TokenSequence.sampled."""
        for sequence in self.sequences:
            yield from sequence.sampled(plain)

    def fail(self, reason: str, detail: str) -> None:
        """It is never trained on. What was played until then is kept, for reading."""
        self.record.failure, self.record.detail = reason, detail

    def leave_unscored(self, reason: str, detail: str) -> None:
        """An evaluation's episode counts all the same, without a KL."""
        logger.warning("evaluation episode without a KL, %s: %s", reason, detail)
        self.record.unscored = reason
