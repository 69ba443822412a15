"""What a chat template writes around the turns of a conversation, whether it thinks, and what can be appended to it.

The rule of appending: the first prompt, and behind it the turns with what stands around them, are the template's own
rendering of the whole conversation; except for the think block (empty or open) that stands before every answer here
and that some templates leave out before past answers. Where a template breaks it, every turn is rendered anew.
"""

import contextlib
import itertools
import json
import os
import re
from typing import Any

from jinja2 import TemplateError

# The texts that the rule is tried with: plain ones, and some that a template might strip, escape or cut.
PLAIN, AWKWARD = "Text {}:\n\n- a  cup 12.", '\n <b>{}</b> & "it\'s" \\n {{{{ é\n\n'
# Qwen3, DeepSeek-R1 and most others; Magistral; Seed-OSS; Kimi.
THOUGHTS = tuple(
    (f"{a}{b}", f"{a}/{b}") for a, b in (("<", "think>"), ("[", "THINK]"), ("<", "seed:think>"), ("◁", "think▷"))
)
SWITCHES = ("enable_thinking", "thinking")  # Qwen3 and GLM; DeepSeek-V3.1
# What a template may want beside a call, content and arguments: Qwen3 wants a text, DeepSeek-V3 none and JSON.
CALL_FORMS = tuple(itertools.product(("", None), (dict, json.dumps)))


def conversation(turns: int, form: str = PLAIN) -> list[str]:
    """Different texts [system, user, answer, user, ..., user] with `turns` user turns.

    Answers have no white space around them: templates may strip it from past ones, and sampled ones stay as they were.
    """
    texts = [form.format(f"PLACEHOLDER{i}x") for i in range(2 * turns)]
    return [text.strip() if i in range(2, 2 * turns, 2) else text for i, text in enumerate(texts)]


def difference(text: str, expected: str) -> str:
    """Where two texts part, for an error message."""
    at = max(len(os.path.commonprefix([text, expected])) - 10, 0)
    return f"{text[at : at + 50]!r} where {expected[at : at + 50]!r} should stand"


class ChatTemplate:
    """The text around turns, for a tokenizer's template and its keyword arguments.

    .. SYSTEM .. USER past ANSWER before_next USER past ANSWER before_next USER after_user

    A template without a system role gets the system text at the head of the first user turn.

    Attributes:
        thought: what opens and what closes a thought.
        call_markers: the added tokens that it writes for a tool call.
        opened: the beginning of a thought at the end of after_user ("<think>\\n"), or "".

    Raises:
        ValueError: it has no such parts; with one sentence that says what to do.
    """

    def __init__(self, tokenizer: Any, kwargs: dict[str, Any]) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use a checkpoint that has one")
        self._tokenizer, self._kwargs = tokenizer, kwargs
        self._has_system_role = True
        self._has_system_role = self._shows_system()
        _, user, answer, after = marks = conversation(2, "{}")
        parts = re.fullmatch(f"(?s).*{user}(.*){answer}(.*){after}(.*)", self.render(marks))
        if not parts:
            raise ValueError(
                "the chat template does not write every turn in its order: use a model or a chat template that does"
            )
        self.past, self.before_next, self.after_user = parts.groups()
        spaced = conversation(1, "\n\n\n\n  {}  \n\n\n\n")  # more white space than a template writes of its own
        self._strips = spaced[1] not in self.render(spaced)  # Llama, Gemma: `content | trim`
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        written_first = sorted(THOUGHTS, key=lambda pair: (pair[0] not in self.after_user, not known.issuperset(pair)))
        self.thought = opening, closing = written_first[0]
        _, begun, rest = self.after_user.rpartition(opening)
        self.opened = begun + rest if begun and closing not in rest else ""
        self.call_markers = self._call_markers(known)

    def render(self, turns: list[Any], **more: Any) -> str:
        """The template's own rendering of [system, user, answer, user, ..., user], up to the next answer.

        An answer is a text, or what a template wants of one that calls tools: the message's other keys.
        """
        system, user, *later = turns
        first = [("system", system), ("user", user)] if self._has_system_role else [("user", f"{system}\n\n{user}")]
        told = itertools.chain(first, zip(itertools.cycle(("assistant", "user")), later, strict=False))
        messages = [{"role": role, **({"content": said} if isinstance(said, str) else said)} for role, said in told]
        kwargs = {**self._kwargs, **more}
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template does not render system, user and assistant turns ({error}): "
                "use a model or a chat template that does"
            ) from error

    def shown(self, text: str) -> str:
        """A user's text as the template shows it."""
        return text.strip() if self._strips else text

    def append(self, texts: list[str], before_answers: str) -> str:
        """[system, user, answer, user, ..., user] as turns that are appended to the first prompt."""
        turns = [
            before_answers + answer + self.before_next + self.shown(user)
            for answer, user in zip(texts[2::2], texts[3::2], strict=True)
        ]
        return self.render(texts[:2]).removesuffix(self.after_user) + "".join(turns) + self.after_user

    def check_rule(self, horizon: int) -> None:
        """Raises ValueError where appended turns are not what the template writes, in up to `horizon` turns."""
        for turns, form in itertools.product((1, 2, 3, horizon), (PLAIN, AWKWARD)):
            texts = conversation(turns, form)
            theirs, ours = self.render(texts), self.append(texts, self.past)
            if theirs != ours:
                raise ValueError(
                    f"the chat template changes a text or a past turn, with {turns} user turns it writes "
                    f"{difference(theirs, ours)}: use a model or a chat template that writes every turn as it was, "
                    "or tcod_history: turns"
                )

    def check_answers(self, appended: bool) -> None:
        """Raises ValueError where answers begin otherwise than past ones do, except with a thought.

        Appended ones stay as they were sampled: before them stands what stands before past ones, then a think block.
        """
        alike = self._without_thought(self.after_user) == self._without_thought(self.past)
        block = self.after_user.removeprefix(self.past)
        stays = self.after_user.startswith(self.past) and (not block or self.thought[0] in block)
        if not alike or (appended and not stays):
            raise ValueError(
                f"the chat template writes {self.after_user!r} before the next answer but {self.past!r} before past "
                "ones, so an answer cannot stay what was sampled: use a model or a chat template that writes the same"
                + (", or tcod_history: turns" if alike else "")
            )

    def check_thoughts(self, thinks: bool) -> None:
        """Raises ValueError where the template does not think as `thinks` says."""
        texts = conversation(1)
        switches = [name for name in SWITCHES if self.render(texts, **{name: False}) != self.render(texts)]
        if thinks and self.after_user.rstrip().endswith(self.thought[1]):
            raise ValueError(
                f"the chat template closes the thought before every answer ({self.after_user!r}): switch thinking on "
                "in --apply-chat-template-kwargs, or set tcod_thoughts: none"
            )
        if switches and not thinks:
            kwargs = json.dumps({**self._kwargs, switches[0]: False})
            raise ValueError(
                "the chat template has a thinking mode, and tcod_thoughts is none: "
                f"set --apply-chat-template-kwargs '{kwargs}', or tcod_thoughts: keep"
            )
        if self.opened and not thinks:
            raise ValueError(
                f"the chat template opens a thought before every answer ({self.after_user!r}), and tcod_thoughts is "
                "none: set it to keep, or use a model or a chat template that answers without a thought"
            )

    def prints_date(self) -> bool:
        """Whether today's date stands in it."""
        texts = conversation(1)
        # An argument of this name takes the place of the clock that transformers gives to templates.
        return self.render(texts) != self.render(texts, strftime_now=lambda form: "some day")

    def _shows_system(self) -> bool:
        texts = conversation(1, "{}")
        with contextlib.suppress(ValueError):
            return texts[0] in self.render(texts)
        return False

    def _call_markers(self, added: set[str]) -> frozenset[str]:
        """Of the added tokens those that stand in an answer with two calls, or one, and in no other."""
        tokens = self._tokenizer.tokenize
        system, user, _, after = marks = conversation(2, "{}")
        plain = set(tokens(self.render(marks)))
        for count, (content, arguments) in itertools.product((2, 1), CALL_FORMS):
            function = {"name": "PLACEHOLDERf", "arguments": arguments({"text": "x"})}
            calls = [{"type": "function", "id": f"call{i:05}", "function": function} for i in range(count)]
            with contextlib.suppress(ValueError):
                written = self.render([system, user, {"content": content, "tool_calls": calls}, after])
                if written.count(function["name"]) == count:
                    return frozenset(added & (set(tokens(written)) - plain))
        return frozenset()

    def _without_thought(self, text: str) -> str:
        opening, closing = self.thought
        return "".join(text.replace(opening, "").replace(closing, "").split())
