"""What the student sees at a turn, and the tokens that an episode leaves for training: tcod_history.

Ids that were sampled are kept as they were, and each is trained once. Replayed turns are history only.

    append   One growing context, which is never rendered again: an episode is one sequence, and the teacher scores it
             in one request. Thoughts stay in the context.
    turns    What the chat template renders at each turn (most drop old thoughts), or the goal and the last turns of
             it. Every turn is a sequence of its own: what it was shown, then what it said.
"""

import itertools
from abc import ABC, abstractmethod
from typing import Any

from ..model.chat_template import Rules, Turn
from ..model.chat_tokens import ChatTokens
from ..model.student import Response
from .episode import Span, TokenSequence

LEFT_OUT = "[Earlier turns are left out.]"  # at the end of the first user turn, where a window leaves some out


class History(ABC):
    """One episode as the student sees it.

    Attributes:
        context: the ids that the student answers next.
        sequences: what was sampled so far, each after what it was sampled from.
    """

    def __init__(self, chat: ChatTokens, max_context_len: int) -> None:
        self.chat, self.max_context_len = chat, max_context_len
        self.context: list[int] = []
        self.sequences: list[TokenSequence] = []
        self._turns = itertools.count()  # of the demonstration and of the student

    @abstractmethod
    def begin(self, system: str | Rules, user: str) -> bool:
        """The rules, and the first observation; False if no response would fit after them."""

    @abstractmethod
    def add_replayed(self, response: str, recorded_ids: list[int] | None) -> bool:
        """A demonstration's turn, as the chat turn it was. Returns whether it has the ids that were recorded."""

    @abstractmethod
    def room(self) -> int:
        """Tokens that the next response may have."""

    @abstractmethod
    def add_response(self, response: Response, text: str | None = None) -> None:
        """A sampled turn, or a demonstrated one with its text: this is where tokens become trainable."""

    @abstractmethod
    def add_turn(self, turn: Turn) -> bool:
        """The environment's turn; False, and nothing changes, if no further response would fit after it."""

    def _sampled(self, response: Response) -> Span:
        return Span(response.ids, next(self._turns), response.log_probs, response.meta_info)


class AppendHistory(History):
    """One growing context, which is the one sequence."""

    def begin(self, system: str | Rules, user: str) -> bool:
        self._spans: list[Span] = []
        self._texts = [system, user]
        self._extend(Span(self.chat.context([system, user])))
        return self.room() >= 1

    def add_replayed(self, response: str, recorded_ids: list[int] | None) -> bool:
        self._extend(Span(recorded_ids or self.chat.assistant(response), next(self._turns)))
        return bool(recorded_ids)

    def room(self) -> int:
        """One place is kept for the end-of-turn token of a cut response."""
        return self.max_context_len - len(self.context) - 1

    def add_response(self, response: Response, text: str | None = None) -> None:
        self._extend(self._sampled(response))
        self.sequences = [TokenSequence(self._spans, texts=self._texts)]

    def add_turn(self, turn: Turn) -> bool:
        ids = self.chat.user(turn)
        if self.context[-1] != self.chat.end_of_turn:
            # A response that was cut, or ended by another stop token: every turn in the context ends alike.
            ids = [self.chat.end_of_turn, *ids]
        if self.room() - len(ids) < 1:
            return False
        self._extend(Span(ids))
        return True

    def _extend(self, span: Span) -> None:
        self._spans.append(span)
        self.context += span.ids


class TurnHistory(History):
    """The conversation so far, rendered at each turn.

    Args:
        window: the last turns that are shown after the rules and the first observation; None for all.
    """

    def __init__(self, chat: ChatTokens, max_context_len: int, window: int | None = None) -> None:
        super().__init__(chat, max_context_len)
        self._window = window

    def begin(self, system: str | Rules, user: str) -> bool:
        self._texts: list[Any] = [system, user]  # [Rules, user, answer, Turn, ..]
        self._context_texts = self._texts[:]
        self.context = self.chat.context(self._texts)
        return self.room() >= 1

    def add_replayed(self, response: str, recorded_ids: list[int] | None) -> bool:
        self._texts.append(response)
        next(self._turns)
        return False  # rendered anew at every turn

    def room(self) -> int:
        return self.max_context_len - len(self.context)

    def add_response(self, response: Response, text: str | None = None) -> None:
        self._texts.append(self.chat.turn_text(response.ids) if text is None else text)
        spans = [Span(self.context), self._sampled(response)]
        self.sequences.append(TokenSequence(spans, texts=self._context_texts))

    def add_turn(self, turn: Turn) -> bool:
        texts = self._shown([*self._texts, turn])
        context = self.chat.context(texts)
        if self.max_context_len - len(context) < 1:
            return False
        self._texts.append(turn)
        self.context, self._context_texts = context, texts
        return True

    def _shown(self, texts: list[Any]) -> list[Any]:
        rules, first, *later = texts
        kept = 2 * self._window if self._window else len(later)
        return texts if len(later) <= kept else [rules, f"{first}\n\n{LEFT_OUT}", *later[-kept:]]
