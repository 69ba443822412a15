"""What the teacher is shown beside the conversation: a solution of the task, and how the student's episode ended.

The note stands at the end of the first user turn of the teacher's own copy. After that turn the teacher's tokens are
those of the student's own sequence, id for id. The student, the environment and an evaluation never see the note; its
words are Environment.teacher_note.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import Failure
from ..environments.protocol import Environment, Execution, Step, ask
from ..model.chat_tokens import ChatTokens
from .demonstration import Demonstration
from .episode import Episode, Note, TokenSequence

NO_ACTION = "(no valid action)"  # in the place of a response that may be all thought


@dataclass(frozen=True)
class NoteWriter:
    """Writes the teacher's notes of a run: tcod_teacher_sees, tcod_note_len and tcod_sees_from."""

    environment: type[Environment]
    chat: ChatTokens
    sees: Sequence[str]
    note_len: int
    sees_from: int

    def write(self, metadata: dict[str, Any], episode: Episode) -> Note | None:
        """The note on an episode that was played: None where notes are off, an empty Note where there is nothing to
        show.

        Raises:
            Failure: note_too_long; or what the row's demonstration or the environment's method does wrong.
        """
        record = episode.record
        if not self.sees or record.evaluation or record.n < self.sees_from:
            return None
        told = {}
        if "demo" in self.sees:
            told["demo"] = _demonstrated(metadata)
        if "hindsight" in self.sees:
            told["hindsight"] = _attempted(episode)
        told = {name: execution for name, execution in told.items() if execution.steps}
        if not told:
            return Note()
        note, first = self._fitted(told), episode.sequences[0]
        return replace(note, tokens=len(self.teacher_ids(first, note)) - len(first.tokens))

    def check_room(self) -> None:
        """Raises Failure (note_too_long) where not even a note of no steps fits."""
        self._fitted({name: Execution((), won=True) for name in self.sees})

    def _fitted(self, told: dict[str, Execution]) -> Note:
        def text(shown: dict[str, Execution]) -> str:
            return ask(self.environment, "teacher_note", shown.get("demo"), shown.get("hindsight"))

        def fits(left_out: int) -> bool:  # with what stands around a turn, which a note does without
            return len(self.chat.user(text(_shortened(told, left_out)))) <= self.note_len

        steps = [step for execution in told.values() for step in execution.steps]
        most = len(steps) + sum(bool(step.observation) for step in steps)
        left_out = 0 if fits(0) else bisect.bisect_left(range(most + 1), True, lo=1, key=fits)
        if left_out > most:
            raise Failure("note_too_long", f"more than {self.note_len} tokens without any step: raise tcod_note_len")
        shown = _shortened(told, left_out)
        said = text(shown)
        return Note(said, tuple(name for name, execution in shown.items() if said and execution.steps), left_out)

    def teacher_ids(self, sequence: TokenSequence, note: Note | None) -> list[int]:
        """A sequence as the teacher is given it.

        Raises:
            Failure: note_misplaced, where more than the first user turn would be another.
        """
        if not note:
            return sequence.tokens
        (system, first, *later), head = sequence.texts, sequence.spans[0].ids
        noted = self.chat.context([system, f"{first}\n\n{note.text}", *later])
        opening = len(self.chat.context([system, first])) - len(self.chat.after_user)
        if len(noted) <= len(head) or noted[len(noted) - len(head) + opening :] != head[opening:]:
            raise Failure("note_misplaced", "the chat template drops it, or changes what follows: lower tcod_window")
        return [*noted, *(token for span in sequence.spans[1:] for token in span.ids)]


def _demonstrated(metadata: dict[str, Any]) -> Execution:
    demo = Demonstration.of(metadata)
    if demo.actions:
        demo.check(math.inf)
    return Execution(tuple(map(Step, demo.actions, demo.observations or [None] * len(demo.actions))), won=True)


def _attempted(episode: Episode) -> Execution:
    """The whole episode, from its first action on: replayed turns are the student's in its conversation."""
    record = episode.record
    actions = [turn.action for turn in record.replayed_turns]
    actions += [turn.action if turn.valid else NO_ACTION for turn in record.turns]
    observed = [*episode.observed[:-1], record.outcome or episode.observed[-1]]
    return Execution(tuple(map(Step, actions, observed)), record.won)


def _shortened(told: dict[str, Execution], left_out: int) -> dict[str, Execution]:
    """Without so many of the oldest observations and, if that is not enough, steps.

    The attempt's go first: the notes of a task keep a beginning in common.
    """
    for is_whole in (False, True):
        for name in reversed(told):
            kept: list[Step] = []
            for step in told[name].steps:
                goes = left_out > 0 and (is_whole or bool(step.observation))
                left_out -= goes
                kept += [] if goes and is_whole else [replace(step, observation=None) if goes else step]
            told = {**told, name: replace(told[name], steps=tuple(kept))}
    return told
