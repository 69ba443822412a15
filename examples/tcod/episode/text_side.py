"""The text side of an episode: what its environment shows, and what an answer says it to do.

An environment without tools renders and parses by its own methods. Tools, their calls and their results are written by
the chat template, and the calls are read by SGLang's parser.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import Failure
from ..environments.protocol import Environment, Observation, Tool, action_of, ask, calls_of
from ..model.chat_template import Rules, Turn
from ..model.chat_tokens import ChatTokens
from ..model.tool_calls import find_calls


def as_text(turn: Turn) -> str:
    """A turn of the chat as one text, as it is recorded."""
    return turn if isinstance(turn, str) else "\n".join(turn)


@dataclass(frozen=True)
class TextSide:
    """The text side of an environment, for one task.

    Attributes:
        task: a row's metadata, see task_of.
        admissible: whether user turns list the admissible actions.
        parser: of calls of tools, by its name in SGLang.
        chat: writes them; without one, an action stands for the answer that makes it.
    """

    environment: type[Environment]
    task: dict[str, Any]
    admissible: bool
    parser: str | None
    chat: ChatTokens | None = None

    @functools.cached_property
    def tools(self) -> Sequence[Tool]:
        """The tools of this task. Raises Failure."""
        return ask(self.environment, "tools", self.task)

    def rules(self) -> Rules:
        """The system turn. Raises Failure."""
        return Rules(ask(self.environment, "system_prompt", self.task), self.tools)

    def show(self, observation: Observation, first: bool) -> Turn:
        """An observation as a turn of the chat. Raises Failure."""
        name = self.environment.__name__
        if observation.role == "user" and observation.results:
            raise Failure("env_error", f'{name} has results in an Observation without role="tool"')
        if observation.role == "user":
            return ask(self.environment, "render", observation, first, self.admissible)
        if first or not self.tools:
            raise Failure("env_error", f"{name} has the role tool in an Observation where no tool can be called")
        return observation.results or (observation.text,)

    def parse(self, answer: str) -> tuple[str, bool]:
        """The action to send for an answer, and whether the answer has the valid format. Raises Failure."""
        if not self.tools:
            return ask(self.environment, "parse_action", answer)
        calls = (self.chat is None and calls_of(answer)) or find_calls(self.parser, answer, self.tools)
        action = action_of(calls)
        return (action, True) if calls_of(action) else (answer, False)

    def format(self, action: str) -> str:
        """The shortest answer with this action.

        Raises:
            Failure: demo_mismatch, where it is no call that the chat template can write.
        """
        if not self.tools:
            return ask(self.environment, "format_action", action)
        calls = calls_of(action)
        try:
            return self.chat.call(calls) if self.chat and calls else action_of(calls)
        except ValueError as error:
            raise Failure("demo_mismatch", f"{action!r:.80}: {error}") from error
