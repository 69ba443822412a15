"""What a chat template writes around the turns of a conversation, whether it thinks, and what can be appended to it.

The rule of appending: what stands around the turns, put together with their texts, is the template's own rendering of
the whole conversation, but for the think block (empty or open) that stands before every answer here and that some
templates leave out before past answers. A template that breaks it can only be rendered anew at every turn. One without
a system role gets the system text at the head of the first user turn.
"""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable
from operator import methodcaller
from typing import Any

from jinja2 import TemplateError

# The texts that the rule is tried with: plain ones, and some that a template might strip, escape or cut.
PLAIN, AWKWARD = "Text {}:\n\n- a  cup 12.", '\n <b>{}</b> & "it\'s" \\n {{{{ é\n\n'

# What templates do to the white space around a text, the least first.
_STRIPS = (str, methodcaller("lstrip", "\n"), methodcaller("strip", "\n"), str.lstrip, str.rstrip, str.strip)
_NAME = r"[^<>\[\]◁▷/]*(?:think|thought|reason)[^<>\[\]◁▷/]*"
_THOUGHT = rf"([<\[◁])({_NAME})([>\]▷])"
_EMPTY_THOUGHT = re.compile(rf"\s*{_THOUGHT}\s*\1/\2\3\s*", re.IGNORECASE)
_CLOSED_THOUGHT = re.compile(rf"[<\[◁]/{_NAME}[>\]▷]\s*$", re.IGNORECASE)
_MARKERS = re.compile(rf"[<\[◁]/?{_NAME}[>\]▷]|\s+", re.IGNORECASE)
_OPEN_THOUGHT = re.compile(rf"{_THOUGHT}\s*$", re.IGNORECASE)


def conversation(turns: int, form: str = PLAIN) -> list[str]:
    """Different texts [system, user, answer, user, ..., user] with `turns` user turns."""
    return [form.format(f"PLACEHOLDER{i}x") for i in range(2 * turns)]


def difference(text: str, expected: str) -> str:
    """Where two texts part, for an error message."""
    at = max(len(os.path.commonprefix([text, expected])) - 10, 0)
    return f"{text[at : at + 50]!r} where {expected[at : at + 50]!r} should stand"


class ChatTemplate:
    """The text around turns, for a tokenizer's template and its keyword arguments.

    before["system"] SYSTEM before["user"] USER past ANSWER before_next USER past ANSWER before_next USER after_user

    Attributes:
        before: empty where the template does not write the system text first; such turns cannot be appended.
        opened: the beginning of a thought at the end of after_user ("<think>\\n"), or "".

    Raises:
        ValueError: it has no such parts, or does not think as `thinks` says; with one sentence that says what to do.
    """

    def __init__(self, tokenizer: Any, kwargs: dict[str, Any], thinks: bool = False) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use a checkpoint that has one")
        self._tokenizer, self._kwargs = tokenizer, kwargs
        self._folded = not self._has_system_role()
        self._strip = self._find_strip()
        marks = conversation(2, "{}")
        opening, *later = [text for _, text in self._turns(marks)][not self._folded :]
        head, found, rest = self.render(marks).partition(opening)
        pieces = []
        for text in later:
            piece, also_found, rest = rest.partition(text)
            found = found and also_found
            pieces.append(piece)
        if not found:
            raise ValueError(
                "the chat template does not write every turn in its order: use a model or a chat template that does"
            )
        self.past, self.before_next = pieces
        self.after_user = rest
        before_system, found, before_user = head.partition(marks[0])
        self.before = {"system": before_system, "user": before_user} if found else {}
        if self._folded:
            self.before = {"user": head}
        thought = _OPEN_THOUGHT.search(self.after_user)
        self.opened = self.after_user[thought.start() :] if thought else ""
        self._check_thoughts(thinks)

    def markers(self, vocabulary: Iterable[str]) -> tuple[str, str]:
        """What opens and closes a thought: as the template writes it, else as the vocabulary has it."""
        words = set(vocabulary)
        found = [_OPEN_THOUGHT.fullmatch(word) for word in [self.opened, *sorted(words)]]
        pairs = [("".join(match.groups()), "{}/{}{}".format(*match.groups())) for match in found if match]
        known = (pair for pair in pairs if self.opened or words.issuperset(pair))
        return next(known, ("<think>", "</think>"))

    def opening(self, system: str, user: str) -> list[tuple[str, str]]:
        """The turns before the first answer, as (role, text)."""
        return [("user", f"{system}\n\n{user}")] if self._folded else [("system", system), ("user", user)]

    def shown(self, role: str, text: str) -> str:
        """The text of a turn as the template shows it: some strip it."""
        return self._strip[role](text)

    def write(self, texts: list[str], past: str) -> str:
        """[system, user, answer, user, ..., user] with what stands around them, and `past` before answers."""
        ahead = itertools.chain(self.before.values(), itertools.cycle((past, self.before_next)))
        turns = [before + self.shown(*turn) for turn, before in zip(self._turns(texts), ahead, strict=False)]
        return "".join(turns) + self.after_user

    def check_rule(self) -> None:
        """Raises ValueError where appended turns are not what the template writes."""
        if not self.before:
            raise ValueError(
                "the chat template does not write the system text first and then every turn in its order, so "
                "turns cannot be appended: use a model or a chat template that does, or tcod_history: turns"
            )
        for turns, form in itertools.product((1, 2, 3, 5), (PLAIN, AWKWARD)):
            texts = conversation(turns, form)
            theirs, ours = self.render(texts), self.write(texts, self.past)
            if theirs != ours:
                raise ValueError(
                    f"the chat template changes a text or a past turn, with {turns} user turns it writes "
                    f"{difference(theirs, ours)}: use a model or a chat template that writes every turn as it was, "
                    "or tcod_history: turns"
                )

    def warnings(self) -> list[str]:
        """Sentences about what is allowed and may surprise."""
        if not self._prints_date():
            return []
        names = re.findall(r"set\s+(\w+)\s*=[^%]*strftime_now", self._tokenizer.get_chat_template())
        fixed = [{name: "26 Jul 2024"} for name in names if not self._prints_date(**{name: "26 Jul 2024"})]
        remedy = self._flag(fixed[0]) if fixed else "use a chat template that takes the date as an argument"
        return [f"the chat template prints today's date, so the same turns are another context tomorrow: {remedy}"]

    def _turns(self, texts: list[str]) -> list[tuple[str, str]]:
        later = zip(itertools.cycle(("assistant", "user")), texts[2:], strict=False)
        return [*self.opening(*texts[:2]), *later]

    def render(self, texts: list[str], **more: Any) -> str:
        """The template's own rendering of [system, user, answer, user, ..., user], up to the next answer."""
        messages = [{"role": role, "content": text} for role, text in self._turns(texts)]
        kwargs = {**self._kwargs, **more}
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template does not render system, user and assistant turns ({error}): "
                "use a model or a chat template that does"
            ) from error

    def _has_system_role(self) -> bool:
        self._folded = False
        texts = conversation(1, "{}")
        with contextlib.suppress(ValueError):
            return texts[0] in self.render(texts)
        return False

    def _find_strip(self) -> dict[str, Callable[[str], str]]:
        """What the template does to the white space around a text, by role. The rule is checked with it."""
        texts = conversation(2, "\n\n\n\n  {}  \n\n\n\n")  # more than a template writes of its own
        shown = self.render(texts)
        system, _, answer, user = texts
        return {
            role: next((strip for strip in _STRIPS if strip(text) in shown), str)
            for role, text in (("system", system), ("assistant", answer), ("user", user))
        }

    def _check_thoughts(self, thinks: bool) -> None:
        if thinks:
            if _CLOSED_THOUGHT.search(self.after_user):
                raise ValueError(
                    f"the chat template closes the thought before every answer ({self.after_user!r}): switch thinking "
                    "on in --apply-chat-template-kwargs, or set tcod_thoughts: none"
                )
        elif switch := self._thinking_switch():
            raise ValueError(
                "the chat template has a thinking mode, and tcod_thoughts is none: "
                f"{self._flag({switch: False})}, or tcod_thoughts: keep"
            )
        elif self.opened:
            raise ValueError(
                f"the chat template opens a thought before every answer ({self.after_user!r}), and tcod_thoughts is "
                "none: set it to keep, or use a model or a chat template that answers without a thought"
            )

    def check_block(self) -> None:
        """Raises ValueError where more than a think block comes before the next answer, or before past ones."""
        block = self.after_user.removeprefix(self.past)
        expected = (
            not block or _EMPTY_THOUGHT.fullmatch(block) or (self.opened and _OPEN_THOUGHT.fullmatch(block.strip()))
        )
        if not self.after_user.startswith(self.past) or not expected:
            raise ValueError(
                f"the chat template writes {self.after_user!r} before the next answer but {self.past!r} before past "
                "ones, so an answer cannot stay as it was sampled: use a model or a chat template that writes the "
                "same, or tcod_history: turns"
            )

    def check_header(self) -> None:
        """Raises ValueError where answers begin otherwise than past ones do, thoughts aside: in a channel, say."""
        if _MARKERS.sub("", self.after_user) != _MARKERS.sub("", self.past):
            raise ValueError(
                f"the chat template writes {self.after_user!r} before the next answer but {self.past!r} before past "
                "ones, so what is sampled is more than an answer: use a model or a chat template that writes the same"
            )

    def _thinking_switch(self) -> str | None:
        """The argument of the template that is on and opens thoughts, or lets the model."""
        texts = conversation(1)
        names = sorted(set(re.findall(r"\b\w*think\w*\b", self._tokenizer.get_chat_template())))
        return next((name for name in names if self.render(texts, **{name: False}) != self.render(texts)), None)

    def _prints_date(self, **kwargs: str) -> bool:
        # An argument of this name takes the place of the clock that transformers gives to templates.
        texts, other_clock = conversation(1), {"strftime_now": lambda form: "some day"}
        return self.render(texts, **kwargs) != self.render(texts, **kwargs, **other_clock)

    def _flag(self, kwargs: dict[str, Any]) -> str:
        return f"set --apply-chat-template-kwargs '{json.dumps(self._kwargs | kwargs)}'"
