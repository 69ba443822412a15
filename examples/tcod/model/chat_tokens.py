"""Chat turns as tokens: as spans that are only ever appended, or a whole conversation as the template renders it.

Rendering a conversation again after each turn is not append-only: Qwen3's template drops earlier <think> blocks, and
re-encoding sampled text can give other tokens than were sampled. So for AppendHistory the template is asked once what
stands around a turn; afterwards a context grows by exactly these spans and by the ids that the engine sampled.

    context([system, user]) <|im_start|>system .. <|im_start|>user .. <|im_end|>\n<|im_start|>assistant\n[think block]
    assistant(text)         text<|im_end|>
    user(text)              \n<|im_start|>user\ntext<|im_end|>\n<|im_start|>assistant\n[think block]

The think block is empty, which closes the thought, or the beginning of one, where the template writes that.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat_template import PLAIN, ChatTemplate, Rules, Turn, conversation, difference

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Private-use characters stand for a control token's name while a template renders: "\ue0003\ue001" for the fourth.
_HIDDEN, _MARK = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")


def load_chat(checkpoint: str, template_kwargs: dict[str, Any] | None = None, **choices: Any) -> "ChatTokens":
    """The chat of a checkpoint: its tokenizer as slime loads it, its stop ids as SGLang knows them.

    Args:
        choices: `history`, `thoughts`, `horizon` and `tools` of ChatTokens.

    Raises:
        OSError: the checkpoint has no tokenizer.
        ValueError: its tokenizer or chat template cannot be used, see ChatTokens.
    """
    from transformers import AutoTokenizer  # here: slime's plugin contracts import hooks without transformers

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    return ChatTokens(tokenizer, template_kwargs, engine_eos_ids(checkpoint), **choices)


def engine_eos_ids(checkpoint: str) -> set[int]:
    """The ids that end a text for SGLang: eos_token_id of the checkpoint's generation_config.json and config.json."""
    from transformers.utils import cached_file

    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = None
        with contextlib.suppress(OSError):  # a checkpoint need not have both
            path = cached_file(checkpoint, name)
        eos = json.loads(Path(path).read_bytes()).get("eos_token_id") if path else None
        ids |= {eos} if isinstance(eos, int) else set(eos or ())
    return ids


class ChatTokens:
    """Token spans of one tokenizer's chat template.

    Text from an environment, a row or a file is data: what looks like a control token in it is encoded as characters.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        template_kwargs: keyword arguments of its template, as in slime's --apply-chat-template-kwargs.
        eos_ids: ids that end a text for the engine, see engine_eos_ids.
        history: tcod_history; the spans of "append" are for templates to which turns can be appended.
        thoughts: tcod_thoughts; under "none" the template must close or never open a thought.
        horizon: tcod_horizon; "append" is tried with as many turns.
        tools: whether answers may call tools, so that the template must write them.

    Attributes:
        after_user: ids between a user's text and the answer to it.
        end_of_turn: id of the token that ends every assistant turn (<|im_end|> for Qwen3).
        vocabulary: a digest that two tokenizers share where the same ids are the same tokens.
        stop_ids: ids that end a sampled turn: end_of_turn, eos_ids, the tokenizer's eos, and its pad if it is special.

    Raises:
        ValueError: with one sentence that says why the tokenizer or its template cannot be used, and what to do.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: dict[str, Any] | None = None,
        eos_ids: Iterable[int] = (),
        history: str = "append",
        thoughts: str = "none",
        horizon: int = 3,
        tools: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer is not a fast one: use a checkpoint that has a tokenizer.json")
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
        self.vocabulary = hashlib.sha256(vocabulary).hexdigest()[:16]
        self._template = template = ChatTemplate(tokenizer, template_kwargs or {})
        template.check_thoughts(thoughts == "keep")
        self._thinks = thoughts == "keep"
        self._data = _without_added_tokens(tokenizer.backend_tokenizer)
        eos_ids = {*eos_ids, tokenizer.eos_token_id} - {None}
        self._set_control_tokens(eos_ids)
        if tools:
            template.read_tools()
        self._set_turns(eos_ids)
        template.check_answers(history == "append")
        if history == "append":
            template.check_rule(horizon)
        self._check_tokens(history == "append", tools)

    def assistant(self, text: str) -> list[int]:
        """A response that was not sampled here (a replayed demonstration), with its end-of-turn token.

        The markers of thoughts and tool calls are tokens where the vocabulary has them, as they were when it was
        sampled. Where the template opens a thought, a response without one has an empty thought.
        """
        (opening, closing), opened = self._template.thought, self._template.opened
        if opened:
            text = text if closing in text else f"{opened}\n{closing}\n\n{text}"
            # The template has begun the thought. A text may begin it otherwise: "<think>hm" for "<think>\nhm".
            text = text.removeprefix(opened).removeprefix(opening)
        parts = self._marker.split(text) if self._marker_ids else [text]
        ids = ([self._marker_ids[part]] if part in self._marker_ids else self._text_ids(part) for part in parts)
        return [*_flat(ids), self.end_of_turn]

    def user(self, turn: Turn) -> list[int]:
        """What stands between two responses: from after the end-of-turn token to where the next response begins."""
        around = self._template.around(turn)
        ids = self._part_ids(around.before)[1:]
        for i, text in enumerate(self._template.shown(turn)):
            ids += [*(self._part_ids(around.between) if i else ()), *self._text_ids(text)]
        return ids + self._part_ids(around.after)

    def call(self, calls: list[dict[str, Any]]) -> str:
        """The answer that makes these calls and says nothing else. Raises ValueError, see ChatTemplate.call."""
        return self._template.call(calls)

    def context(self, turns: Sequence[Any]) -> list[int]:
        """[system, user, answer, user, ..., user] as the template renders it, up to where the next response begins.

        The first may be Rules, a later user's a Turn. Token for token what tokenizer.apply_chat_template gives, except
        that names of control tokens stay characters; in an answer those of thoughts and calls are the template's to
        treat.
        """
        hidden = [self._hide_names(turn, is_answer=i > 1 and i % 2 == 0) for i, turn in enumerate(turns)]
        pieces = _MARK.split(self._template.render(hidden))
        return _flat(
            self._text_ids(self._names[int(piece)]) if i % 2 else self._rendered_ids(piece)
            for i, piece in enumerate(pieces)
        )

    def decode(self, response_ids: list[int]) -> str:
        """The text of sampled ids without the stop token that ended them."""
        ended = bool(response_ids) and response_ids[-1] in self.stop_ids
        return self._decode(response_ids[:-1] if ended else response_ids)

    def turn_text(self, response_ids: list[int]) -> str:
        """A response as a turn of the conversation: with the thought that the template began, which is closed."""
        (opening, closing), text = self._template.thought, self._template.opened + self.decode(response_ids)
        cut = self._thinks and text.lstrip().startswith(opening) and closing not in text
        return f"{text}\n{closing}\n\n" if cut else text

    def after_thought(self, response_ids: list[int]) -> str:
        """What a response says after its thought, and not in another one: nothing, if the thought was cut."""
        (opening, closing), text = self._template.thought, self.turn_text(response_ids)
        return text.rpartition(closing)[2].partition(opening)[0] if self._thinks else text

    def spells(self, response_ids: list[int], turn_text: str) -> bool:
        """Whether ids from a file may stand for a recorded response: they say it, and name nothing but text.

        An added token may only mark a thought or a tool call, or end the turn.
        """
        if not response_ids or not all(0 <= i < self.vocab_size for i in response_ids):
            return False
        inner = response_ids[:-1] if response_ids[-1] in self.stop_ids else response_ids
        return not self._control_ids.intersection(inner) and self.turn_text(response_ids) == turn_text

    def _set_control_tokens(self, eos_ids: set[int]) -> None:
        added = self.tokenizer.added_tokens_decoder.items()
        # Special by its flag: many tokenizers name no end of turn. A token that text can spell ("!" as pad) is a word.
        self._special = {i for i, token in added if token.special and self._data_ids(token.content) != [i]}
        control = {token.content: i for i, token in added if token.content.strip()}
        markers = sorted({*self._template.thought, *self._template.call_markers} & {*control}, key=len, reverse=True)
        self._marker_ids = {name: control[name] for name in markers if control[name] not in eos_ids}
        self._marker = re.compile(f"({'|'.join(map(re.escape, self._marker_ids))})")
        self._control_ids = {*control.values()} - {*self._marker_ids.values()}
        self._names = [*sorted(control, key=len, reverse=True), _HIDDEN[0]]
        self._name = re.compile("|".join(map(re.escape, self._names)))

    def _set_turns(self, eos_ids: set[int]) -> None:
        user, tool = self._template.user, self._template.tool
        self.end_of_turn = (self._template_ids(user.before) or [-1])[0]
        self.after_user = self._template_ids(user.after)
        if self.end_of_turn not in self._special:
            raise ValueError(
                f"the chat template ends an assistant turn with {user.before[:20]!r}, which is not a special token: "
                "use a model or a chat template that ends turns with one"
            )
        if tool and self._template_ids(tool.before)[:1] != [self.end_of_turn]:
            raise ValueError(
                f"the chat template ends an answer with {tool.before[:20]!r} before a tool's result: "
                "use a model or a chat template that ends all answers alike"
            )
        self.stop_ids = {self.end_of_turn, *eos_ids, *self._special & {self.tokenizer.pad_token_id}}
        # A long conversation is encoded in parts, which are kept: as a whole it would hold up the event loop.
        self._part_ids = functools.lru_cache(4096)(self._template_ids)
        self._part = re.compile(f"(?={re.escape(self.tokenizer.convert_ids_to_tokens(self.end_of_turn))})")

    def _hide_names(self, turn: Any, is_answer: bool) -> Any:
        """A turn without names of control tokens, but in an answer with those of thoughts and calls of tools."""
        if isinstance(turn, Rules):
            tools = self._hide_names(json.dumps(list(turn.tools), ensure_ascii=False), False)
            return Rules(self._hide_names(turn.text, False), json.loads(tools))
        if isinstance(turn, tuple):
            return tuple(self._hide_names(text, False) for text in turn)

        def hide(match: re.Match[str]) -> str:
            stays = is_answer and match[0] in self._marker_ids
            return match[0] if stays else _HIDDEN.format(self._names.index(match[0]))

        return self._name.sub(hide, turn)

    def _rendered_ids(self, rendered: str) -> list[int]:
        ids = _flat(map(self._part_ids, self._part.split(rendered)))
        unknown = self.tokenizer.unk_token
        if unknown and unknown not in rendered:  # see _text_ids
            ids = [i for i in ids if i != self.tokenizer.unk_token_id]
        return ids

    def _text_ids(self, text: str) -> list[int]:
        # Some vocabularies lack a few bytes, which then are the unknown token: <|endoftext|> for SmolLM2.
        return [i for i in self._data_ids(text) if i not in self._special]

    def _data_ids(self, text: str) -> list[int]:
        return self._data.encode(text, add_special_tokens=False).ids

    def _template_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)

    def _check_tokens(self, appended: bool, calls: bool) -> None:
        """Raises ValueError where tokens of parts, names of control tokens among them, are not those of the text."""
        template, name = self._template, self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
        plain, texts = (conversation(3, f"{PLAIN}{end}", calls) for end in ("\n\n", f"{name}x"))
        expected, ours = template.render(texts), self._decode(self.context(texts))
        if appended:
            expected, ids = template.append(texts, is_past=False), self.context(texts[:2])
            for answer, turn in zip(texts[2::2], texts[3::2], strict=True):
                ids += [*self._text_ids(answer), self.end_of_turn, *self.user(turn)]
            ours = self._decode(ids)
        # A marker may swallow the white space beside it; then it does so in one piece, too.
        kept = ours in (expected, self._decode(self._template_ids(expected)))
        lossless = self._decode(self._text_ids(texts[1])) == texts[1]
        if not (kept and lossless and self.context(plain) == self._template_ids(template.render(plain))):
            lost = "" if ours == expected else f", it gives back {difference(ours, expected)}"
            raise ValueError(
                f"the tokenizer, as transformers loads it, changes text that is encoded in parts{lost}: "
                "use a model whose tokenizer keeps text"
            )


def _flat(lists: Iterable[list[int]]) -> list[int]:
    return [i for ids in lists for i in ids]


def _without_added_tokens(backend: "Tokenizer") -> "Tokenizer":
    """A tokenizer for text that is data: it does not know "<|im_end|>" or "<think>".

    Added tokens, special or not, are found before anything else happens to a text; a text that holds none is encoded
    as ever. What the model itself joins ("\\n\\n", which is an added token of Gemma, too) stays joined.
    """
    data = type(backend)(backend.model)
    data.normalizer, data.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    return data
