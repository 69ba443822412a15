"""What the teacher is shown beside the conversation: a solution of the task, and how the student's episode ended.

The note stands at the end of the first user turn of the teacher's own copy. Behind that turn every token is the
student's. The student, the environment and an evaluation never see it; its words are Environment.teacher_note.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import ConfigError, Failure
from ..environments.protocol import Environment, Execution, Step, ask
from ..model.chat_template import conversation
from ..model.chat_tokens import ChatTokens
from .demonstration import Demonstration
from .record import Episode, Note, Span, TokenSequence

NO_ACTION = "(no valid action)"  # in the place of a response that may be all thought


@dataclass(frozen=True)
class NoteWriter:
    """Writes the teacher's notes of a run.

    Args:
        sees: tcod_teacher_sees: "demo", "hindsight", both or neither.
        max_tokens: tcod_note_len.
        begins: tcod_sees_from: the first rollout whose episodes have a note.

    Raises:
        ConfigError: the chat template does not show a note, or changes what stands behind it.
    """

    environment: type[Environment]
    chat: ChatTokens
    sees: Sequence[str]
    max_tokens: int
    begins: int

    def __post_init__(self) -> None:
        texts = conversation(3)
        if self.sees:
            try:
                self.tokens(TokenSequence([Span("prompt", self.chat.context(texts))], texts=texts), Note("A note."))
            except Failure as failure:
                raise ConfigError(f"{failure}: use another one, or remove tcod_teacher_sees") from failure

    def write(self, metadata: dict[str, Any], episode: Episode) -> Note | None:
        """The note on an episode that was played; one without a text where there is nothing to show, None for none.

        Raises:
            Failure: note_too_long; or what the row's demonstration or the environment's method does wrong.
        """
        record = episode.record
        if not self.sees or record.evaluation or record.n < self.begins:
            return None
        known = {"demo": _demonstrated(metadata), "hindsight": _attempted(episode)}
        told = {name: execution for name, execution in known.items() if name in self.sees and execution.steps}
        # What is left out first comes first; of the student's episode, for then all of a task share a beginning.
        order = [
            (is_whole, name, i)
            for is_whole in (False, True)
            for name in reversed(told)
            for i, step in enumerate(told[name].steps)
            if is_whole or step.observation is not None
        ]

        def text(left_out: int) -> str:
            gone = set(order[:left_out])
            shown = [told.get(name) and _without(gone, name, told[name]) for name in ("demo", "hindsight")]
            return ask(self.environment, "teacher_note", *shown) if told else ""

        def fits(left_out: int) -> bool:  # with what stands around a turn, which a note does without
            return len(self.chat.user(text(left_out))) <= self.max_tokens

        left_out = 0 if not told or fits(0) else bisect.bisect_left(range(len(order)), True, lo=1, key=fits)
        if left_out == len(order) > 0 and not fits(left_out):
            raise Failure("note_too_long", f"more than {self.max_tokens} tokens without any step: raise tcod_note_len")
        note, first = Note(text(left_out), tuple(told), left_out), episode.sequences[0]
        return replace(note, tokens=len(self.tokens(first, note)) - len(first.tokens))

    def tokens(self, sequence: TokenSequence, note: Note | None) -> list[int]:
        """A sequence as the teacher is given it.

        Raises:
            Failure: note_misplaced, where more than the first user turn would be another.
        """
        if not (note and note.text):
            return sequence.tokens
        (system, first, *later), head = sequence.texts, sequence.spans[0].ids
        noted = self.chat.context([system, f"{first}\n\n{note.text}", *later])
        opening = len(self.chat.context([system, first])) - len(self.chat.after_user)
        if len(noted) <= len(head) or noted[len(noted) - len(head) + opening :] != head[opening:]:
            raise Failure("note_misplaced", "the chat template leaves a note out, or changes what stands behind it")
        return [*noted, *(token for span in sequence.spans[1:] for token in span.ids)]


def _demonstrated(metadata: dict[str, Any]) -> Execution:
    demo = Demonstration.of(metadata)
    return Execution(tuple(map(Step, demo.actions, demo.observations or [None] * len(demo.actions))), won=True)


def _without(gone: set[Any], name: str, execution: Execution) -> Execution:
    steps = (
        replace(step, observation=None) if (False, name, i) in gone else step
        for i, step in enumerate(execution.steps)
        if (True, name, i) not in gone
    )
    return replace(execution, steps=tuple(steps))


def _attempted(episode: Episode) -> Execution:
    """The whole episode, from its first action on: replayed turns are the student's in its conversation."""
    record = episode.record
    actions = [turn.action for turn in record.demonstration]
    actions += [turn.action if turn.valid else NO_ACTION for turn in record.turns]
    return Execution(tuple(map(Step, actions, [*episode.answers[:-1], record.outcome])), record.won)
