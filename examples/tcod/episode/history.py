"""What the student sees at a turn, and the tokens that an episode leaves for training: tcod_history.

Ids that were sampled are kept as they were, and each is trained once. Replayed turns are history only.

    append   One growing context, which is never rendered again: an episode is one sequence, and the teacher scores it
             in one request. Thoughts stay in the context.
    turns    What the chat template renders at each turn (most drop old thoughts), or the goal and the last turns of
             it. Every turn is a sequence of its own: what it was shown, then what it said.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ..model.chat_tokens import ChatTokens
from ..model.student import Response
from ..settings.config import TcodConfig

LEFT_OUT = "[Earlier turns are left out.]"  # behind the first user turn, where tcod_window leaves some out


@dataclass(frozen=True)
class Span:
    """Tokens behind the first prompt."""

    ids: list[int]
    sampled: Response | None = None
    """The reply that they come from; None for context, which is not trained."""


class History(ABC):
    """One episode as the student sees it.

    What is left of it is its sequences laid end to end: the first prompt, then spans. A later sequence's prompt is a
    span of context, too.

    Attributes:
        context: what the student answers next.
        prompt: ids before the first sampled one; those of replayed turns are among them.
        spans: all behind it, in pieces.
        prompts: (start, end) of each sequence's prompt in `tokens`; a sequence ends where the next one starts.
    """

    def __init__(self, chat: ChatTokens, max_context_len: int) -> None:
        self.chat, self.max_context_len = chat, max_context_len
        self.context: list[int] = []
        self.prompt: list[int] = []
        self.spans: list[Span] = []
        self.prompts: list[tuple[int, int]] = []

    @property
    def tokens(self) -> list[int]:
        """All sequences, end to end."""
        return [*self.prompt, *(i for span in self.spans for i in span.ids)]

    @property
    def response_length(self) -> int:
        """Tokens behind the first prompt."""
        return sum(len(span.ids) for span in self.spans)

    @abstractmethod
    def begin(self, system: str, user: str) -> bool:
        """The rules, and the first observation; False if no response would fit behind them."""

    @abstractmethod
    def replay(self, response: str, ids: Sequence[int] | None) -> tuple[int, int] | None:
        """A demonstration's turn, as the chat turn it was; `ids` are those it was sampled with, where known.

        Returns:
            Its place, tokens[start:end], if it was appended.
        """

    @abstractmethod
    def room(self) -> int:
        """Tokens that the next response may have."""

    @abstractmethod
    def respond(self, response: Response) -> tuple[int, int]:
        """A sampled turn: this is where tokens become trainable. Returns its place behind the first prompt."""

    @abstractmethod
    def observe(self, text: str) -> bool:
        """The environment's turn; False, and nothing changes, if no further response would fit behind it."""

    def _append(self, span: Span) -> tuple[int, int]:
        start = self.response_length
        self.spans.append(span)
        return start, start + len(span.ids)


class AppendHistory(History):
    """One growing context: tokens and context are the same."""

    def begin(self, system: str, user: str) -> bool:
        self._extend_prompt(self.chat.prompt(system, user))
        return self.room() >= 1

    def replay(self, response: str, ids: Sequence[int] | None) -> tuple[int, int]:
        start = len(self.prompt)
        self._extend_prompt(list(ids) if ids else self.chat.assistant(response))
        return start, len(self.prompt)

    def room(self) -> int:
        """One place is kept for the end-of-turn token of a cut response."""
        return self.max_context_len - len(self.context) - 1

    def respond(self, response: Response) -> tuple[int, int]:
        self.context = self.context + response.ids
        return self._append(Span(response.ids, response))

    def observe(self, text: str) -> bool:
        ids = self.chat.user(text)
        if self.context[-1] != self.chat.end_of_turn:
            # A response that was cut, or ended by another stop token: every turn in the context ends alike.
            ids = [self.chat.end_of_turn, *ids]
        if self.room() - len(ids) < 1:
            return False
        if self.spans:
            self.context = self.context + ids
            self._append(Span(ids))
        else:  # still replaying: the turn belongs to the prompt
            self._extend_prompt(ids)
        return True

    def _extend_prompt(self, ids: list[int]) -> None:
        self.prompt = self.context = self.context + ids
        self.prompts = [(0, len(self.prompt))]


class TurnHistory(History):
    """The conversation so far, rendered at each turn.

    Args:
        window: the last turns that are shown behind the rules and the first observation; None for all.
    """

    def __init__(self, chat: ChatTokens, max_context_len: int, window: int | None = None) -> None:
        super().__init__(chat, max_context_len)
        self._window = window
        self._texts: list[str] = []  # [system, user, answer, user, ..]

    def begin(self, system: str, user: str) -> bool:
        self._texts = [system, user]
        self.context = self.chat.context(self._texts)
        return self.room() >= 1

    def replay(self, response: str, ids: Sequence[int] | None) -> None:
        self._texts.append(response)

    def room(self) -> int:
        return self.max_context_len - len(self.context)

    def respond(self, response: Response) -> tuple[int, int]:
        self._texts.append(self.chat.turn_text(response.ids))
        start = len(self.prompt) + self.response_length
        self.prompts.append((start, start + len(self.context)))
        if self.spans:
            self._append(Span(self.context))
        else:
            self.prompt = self.context
        return self._append(Span(response.ids, response))

    def observe(self, text: str) -> bool:
        context = self.chat.context(self._shown([*self._texts, text]))
        if self.max_context_len - len(context) < 1:
            return False
        self._texts.append(text)
        self.context = context
        return True

    def _shown(self, texts: list[str]) -> list[str]:
        rules, first, *later = texts
        kept = 2 * self._window if self._window else len(later)
        return texts if len(later) <= kept else [rules, f"{first}\n\n{LEFT_OUT}", *later[-kept:]]


def new_history(config: TcodConfig, chat: ChatTokens, max_context_len: int) -> History:
    """An empty history of the kind that tcod_history names, for an episode in a context of so many tokens."""
    if config.tcod_history == "turns":
        return TurnHistory(chat, max_context_len, config.tcod_window)
    return AppendHistory(chat, max_context_len)
