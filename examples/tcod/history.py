"""What the student sees at a turn, and the tokens that an episode leaves for training.

AppendHistory is one growing context: what was sampled is kept id for id and nothing is ever rendered again, so a whole
episode is one sequence that the teacher scores once.
"""

from dataclasses import dataclass

from .chat import ChatTokens
from .student import Response


@dataclass(frozen=True)
class Span:
    """Tokens of the response side of a sequence."""

    ids: list[int]
    sampled: Response | None = None
    """The reply that they come from; None for context, which is not trained."""


class AppendHistory:
    """The context of one episode.

    Attributes:
        tokens: all ids so far: prompt, then response. The next response continues them.
        prompt_length: how many of them come before the first sampled one; replayed turns are among these.
        spans: the response, tokens[prompt_length:], in pieces.
    """

    def __init__(self, chat: ChatTokens, max_context_len: int) -> None:
        self.chat, self.max_context_len = chat, max_context_len
        self.tokens: list[int] = []
        self.prompt_length = 0
        self.spans: list[Span] = []

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    def begin(self, system: str, user: str) -> bool:
        """The prompt: rules, and the first observation; False if no response would fit behind it."""
        self.tokens += self.chat.prompt(system, user)
        self.prompt_length = len(self.tokens)
        return self.room() >= 1

    def replay(self, response: str) -> tuple[int, int]:
        """A demonstration's turn, as the chat turn it was, in the prompt. Returns its place: tokens[start:end]."""
        start = len(self.tokens)
        self.tokens += self.chat.assistant(response)
        self.prompt_length = len(self.tokens)
        return start, self.prompt_length

    def room(self) -> int:
        """Tokens that the next response may have; one place is kept for the end-of-turn token of a cut one."""
        return self.max_context_len - len(self.tokens) - 1

    def respond(self, response: Response) -> None:
        """A sampled turn: this is where tokens become trainable."""
        self._append(Span(response.ids, response))

    def observe(self, text: str) -> bool:
        """The environment's turn; False, and nothing appended, if no further response would fit behind it."""
        ids = self.chat.user(text)
        if self.tokens[-1] != self.chat.end_of_turn:
            # A response that was cut, or ended by another stop token: every turn in the context ends alike.
            ids = [self.chat.end_of_turn, *ids]
        if self.room() - len(ids) < 1:
            return False
        if self.spans:
            self._append(Span(ids))
        else:  # still replaying: the turn belongs to the prompt
            self.tokens += ids
            self.prompt_length = len(self.tokens)
        return True

    def _append(self, span: Span) -> None:
        self.tokens += span.ids
        self.spans.append(span)
