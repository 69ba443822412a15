"""What a chat template writes around the turns of a conversation, whether it thinks, and what can be appended to it.

The rule of appending: the first prompt, and after it the turns with what stands around them, are the template's own
rendering of the whole conversation; except for the think block (empty or open) that stands before every answer here
and that some templates leave out before past answers. Where a template breaks it, every turn is rendered anew.
"""

import contextlib
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

# The texts that the rule is tried with: plain ones, and some that a template might strip, escape or cut.
PLAIN, AWKWARD = "Text {}:\n\n- a  cup 12.", '\n <b>{}</b> & "it\'s" \\n {{{{ é\n\n'
# Qwen3, DeepSeek-R1 and most others; Magistral; Seed-OSS; Kimi.
THOUGHTS = tuple(
    (f"{a}{b}", f"{a}/{b}") for a, b in (("<", "think>"), ("[", "THINK]"), ("<", "seed:think>"), ("◁", "think▷"))
)
SWITCHES = ("enable_thinking", "thinking")  # Qwen3 and GLM; DeepSeek-V3.1
# What a template may want beside a call, content and arguments: Qwen3 wants a text, DeepSeek-V3 none and JSON.
_as_json = functools.partial(json.dumps, ensure_ascii=False)  # as transformers' tojson
CALL_FORMS = tuple(itertools.product(("", None), (dict, _as_json)))
PROBE_CALL = {"name": "PLACEHOLDERf", "arguments": {"text": "x"}}
PROBE_TEXT = {"type": "object", "properties": {"text": {"type": "string", "description": "-"}}, "required": ["text"]}
PROBE = {"type": "function", "function": {"name": "PLACEHOLDERf", "description": "-", "parameters": PROBE_TEXT}}


class Rules(NamedTuple):
    """The system turn of a conversation, and the tools that the template lists with it."""

    text: str
    tools: Sequence[Any] = ()


Turn = str | tuple[str, ...]  # what an answer follows: a user's text, or what each of the called tools returns


class Around(NamedTuple):
    """What a template writes around a turn that follows an answer: answer before TURN after answer."""

    before: str  # after the answer, the end of its turn included
    between: str  # what several tools return
    past: str  # a past answer and the turn
    after: str  # the turn and the next answer


def conversation(turns: int, form: str = PLAIN, calls: bool = False) -> list[Any]:
    """Different texts [system, user, answer, user, ..., user] with `turns` user turns.

    Answers have no white space around them: templates may strip it from past ones, and sampled ones stay as they were.
    With `calls`, tools are listed, and most answers are followed by their results.
    """
    texts: list[Any] = [form.format(f"PLACEHOLDER{i}x") for i in range(2 * turns)]
    texts[2::2] = map(str.strip, texts[2::2])
    if calls:
        texts[0] = Rules(texts[0], [PROBE])
        texts[3::2] = [((text,), (text, text), text)[i % 3] for i, text in enumerate(texts[3::2])]
    return texts


def difference(text: str, expected: str) -> str:
    """Where two texts part, for an error message."""
    at = max(len(os.path.commonprefix([text, expected])) - 10, 0)
    return f"{text[at : at + 50]!r} where {expected[at : at + 50]!r} should stand"


class ChatTemplate:
    """The text around turns, for a tokenizer's template and its keyword arguments.

    A template without a system role gets the system text at the head of the first user turn.

    Attributes:
        thought: what opens and what closes a thought.
        call_markers: the added tokens that it writes for a call of a tool.
        user: what stands around a user's turn.
        tool: what stands around results of tools; None before read_tools.
        opened: the beginning of a thought before the next answer ("<think>\\n"), or "".

    Raises:
        ValueError: it has no such parts; with one sentence that says what to do.
    """

    def __init__(self, tokenizer: Any, kwargs: dict[str, Any]) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use a checkpoint that has one")
        self._tokenizer, self._kwargs = tokenizer, kwargs
        system, user, answer, last = marks = conversation(2, "{}")
        self._has_system_role = True
        try:
            self._has_system_role = system in self.render([system, user])
        except ValueError:
            self._has_system_role = False
        parts = re.fullmatch(f"(?s).*{user}(.*){answer}(.*){last}(.*)", self.render(marks))
        if not parts:
            raise ValueError("the chat template does not write every turn in its order: use a template that does")
        past, before, after = parts.groups()
        self.user = Around(before, "", past, after)
        self.tool: Around | None = None
        self._show_user = _way(AWKWARD, self.render([system, AWKWARD]))
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self.thought = opening, closing = min(
            THOUGHTS, key=lambda pair: (pair[0] not in after, not known.issuperset(pair))
        )
        _, begun, rest = after.rpartition(opening)
        self.opened = begun + rest if begun and closing not in rest else ""
        self.call_markers: set[str] = set()
        with contextlib.suppress(ValueError):
            calls = self.call([PROBE_CALL] * 2)  # DeepSeek-V3 marks the end of several only
            self.call_markers = known.intersection(tokenizer.tokenize(calls))

    def render(self, turns: Sequence[Any], **more: Any) -> str:
        """The template's own rendering of [system, user, answer, user, ..., user], up to the next answer.

        The first may be Rules, a later user's a Turn. An answer is a text, or the keys of one that calls tools.
        """
        system, user, *later = turns
        rules = system if isinstance(system, Rules) else Rules(system)
        messages = [{"role": "system", "content": rules.text}, {"role": "user", "content": user}]
        if not self._has_system_role:
            messages = [{"role": "user", "content": f"{rules.text}\n\n{user}"}]
        for role, said in zip(itertools.cycle(("assistant", "user")), later, strict=False):
            if isinstance(said, tuple):
                messages += [{"role": "tool", "tool_call_id": _id(i), "content": text} for i, text in enumerate(said)]
            else:
                messages.append({"role": role, **({"content": said} if isinstance(said, str) else said)})
        kwargs = {**self._kwargs, **more, **({"tools": list(rules.tools)} if rules.tools else {})}
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template does not render system, user and assistant turns ({error}): "
                "use a model or a chat template that does"
            ) from error

    def around(self, turn: Turn) -> Around:
        """What stands around a turn that follows an answer."""
        return self.user if isinstance(turn, str) else self.tool

    def shown(self, turn: Turn) -> list[str]:
        """A user's text, or what each tool returns, as the template shows it."""
        return [self._show_user(turn)] if isinstance(turn, str) else list(map(self._show_result, turn))

    def append(self, turns: Sequence[Any], is_past: bool) -> str:
        """[system, user, answer, user, ..., user] as turns that are appended to the first prompt.

        With `is_past`, before each answer stands what the template writes before past ones, else before the next one.
        """
        text, around = self.render(turns[:2]).removesuffix(self.user.after), self.user
        for answer, turn in zip(turns[2::2], turns[3::2], strict=True):
            text += (around.past if is_past else around.after) + answer
            around = self.around(turn)
            text += around.before + around.between.join(self.shown(turn))
        return text + around.after

    def call(self, calls: Sequence[dict[str, Any]]) -> str:
        """The answer that makes these calls [{"name": .., "arguments": {..}}, ..] and says nothing else.

        Raises:
            ValueError: the template does not write them.
        """
        system, user, answer, after = marks = conversation(2, "{}")
        before, behind = self.render(marks).split(answer)
        for content, arguments in CALL_FORMS:
            made = [{**call, "arguments": arguments(call["arguments"])} for call in calls]
            made = [{"type": "function", "id": _id(i), "function": function} for i, function in enumerate(made)]
            with contextlib.suppress(ValueError):
                text = self.render([system, user, {"content": content, "tool_calls": made}, after])
                said = text[len(before) : len(text) - len(behind)]
                if text == before + said + behind and all(call["name"] in said for call in calls):
                    return said
        raise ValueError(f"the chat template does not write {'these calls' if calls[1:] else 'this call'} of tools")

    def read_tools(self) -> None:
        """Learn what stands around results of tools. Raises ValueError where the template does not write tools."""
        remedy = "use a model or a chat template that does, or an environment without tools"
        system, user, answer, first, other, last, second = [*conversation(3, "{}"), "PLACEHOLDER9x"]
        rules = Rules(system, [PROBE])
        try:
            self._show_result = _way(AWKWARD, self.render([rules, user, answer, (AWKWARD,)]))
            text = self.render([rules, user, answer, (first, second), other, (last,)])
            self.call([PROBE_CALL])
            marks = map(self._show_result, (first, second, last))
            parts = re.fullmatch("(?s).*{3}(.*){0}(.*){1}(.*){4}(.*){2}(.*)".format(*marks, answer, other), text)
            if PROBE_CALL["name"] not in text or not parts or parts[1] != parts[4]:
                raise ValueError("not all of them, or not in their order")
        except ValueError as error:
            reason = error.__cause__ or error
            raise ValueError(
                f"the chat template does not write tools, calls and results ({reason}): {remedy}"
            ) from error
        self.tool = Around(parts[1], parts[2], parts[3], parts[5])

    def check_rule(self, horizon: int) -> None:
        """Raises ValueError where appended turns are not what the template writes, in up to `horizon` turns."""
        calls = bool(self.tool)
        for turns, form in itertools.product((1, 2, 3, *[5] * calls, horizon), (PLAIN, AWKWARD)):
            texts = conversation(turns, form, calls)
            theirs, ours = self.render(texts), self.append(texts, is_past=True)
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
        for _, _, past, after in filter(None, (self.user, self.tool)):
            alike = self._without_thought(after) == self._without_thought(past) and after.endswith(self.opened)
            block = after.removeprefix(past)
            stays = after.startswith(past) and (not block or self.thought[0] in block)
            if not alike or (appended and not stays):
                raise ValueError(
                    f"the chat template writes {after!r} before the next answer but {past!r} before past ones, so an "
                    "answer cannot stay what was sampled: use a model or a chat template that writes the same"
                    + (", or tcod_history: turns" if alike else "")
                )

    def check_thoughts(self, thinks: bool) -> None:
        """Raises ValueError where the template does not think as `thinks` says."""
        texts = conversation(1)
        switches = [name for name in SWITCHES if self.render(texts, **{name: False}) != self.render(texts)]
        if thinks and self.user.after.rstrip().endswith(self.thought[1]):
            raise ValueError(
                f"the chat template closes the thought before every answer ({self.user.after!r}): switch thinking on "
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
                f"the chat template opens a thought before every answer ({self.user.after!r}), and tcod_thoughts is "
                "none: set it to keep, or use a model or a chat template that answers without a thought"
            )

    def _without_thought(self, text: str) -> str:
        opening, closing = self.thought
        return "".join(text.replace(opening, "").replace(closing, "").split())


def _way(text: str, rendered: str) -> Callable[[str], str]:
    """How a template shows a text: as JSON, as it is, or without the white space around it (Llama, Gemma)."""
    return next((way for way in (_as_json, str, str.strip) if way(text) in rendered), str)


def _id(number: int) -> str:
    return f"call{number:05}"  # nine letters and digits, as Mistral wants them
