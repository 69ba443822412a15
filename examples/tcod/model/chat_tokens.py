"""Chat turns as tokens: as spans that are only ever appended, or a whole conversation as the template renders it.

Rendering a conversation again after each turn is not append-only: Qwen3's template drops earlier <think> blocks, and
re-encoding sampled text can give other tokens than were sampled. So for AppendHistory the template is asked once what
stands around a turn; afterwards a context grows by exactly these spans and by the ids that the engine sampled.

    prompt(system, user)    <|im_start|>system .. <|im_start|>user .. <|im_end|>\n<|im_start|>assistant\n[think block]
    assistant(text)         text<|im_end|>
    user(text)              \n<|im_start|>user\ntext<|im_end|>\n<|im_start|>assistant\n[think block]

The think block is an empty one, which closes the thought, or where the student thinks the beginning of one, if the
template writes that.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat_template import AWKWARD, ChatTemplate, conversation, difference

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MARK = "\ue000{}\ue001"  # private-use characters in the place of a control token's name, while a template renders


def load_chat(checkpoint: str, template_kwargs: dict[str, Any] | None = None, **choices: str) -> "ChatTokens":
    """The chat of a checkpoint: its tokenizer as slime loads it, its stop ids as SGLang knows them.

    Args:
        choices: `history` and `thoughts` of ChatTokens.

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
        eos = json.loads(Path(path).read_text()).get("eos_token_id") if path else None
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

    Attributes:
        end_of_turn: id of the token that ends every assistant turn (<|im_end|> for Qwen3).
        vocabulary: a digest that two tokenizers share where the same ids are the same tokens.
        stop_ids: ids that end a sampled turn: end_of_turn, eos_ids, the tokenizer's eos, and its pad if it is special.
        warnings: sentences about what is allowed and may surprise.

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
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer is not a fast one: use a checkpoint that has a tokenizer.json")
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self._data = _without_added_tokens(tokenizer.backend_tokenizer)
        added = tokenizer.added_tokens_decoder
        # Special by its flag: many tokenizers name no end of turn. A token that text can spell ("!" as pad) is a word.
        self._special: set[int] = set()
        self._special = {i for i, token in added.items() if token.special and self._text_ids(token.content) != [i]}

        self._thinks = thoughts == "keep"
        self._template = template = ChatTemplate(tokenizer, template_kwargs or {}, self._thinks)
        self._markers = template.markers(token.content for token in added.values())
        self._think = {token.content: i for i, token in added.items() if token.content in self._markers}
        self._before = {role: self._template_ids(text) for role, text in template.before.items()}
        self._before_next = self._template_ids(template.before_next)
        self._after_user = self._template_ids(template.after_user)
        if not self._special.intersection(self._before_next[:1]):
            raise ValueError(
                f"the chat template ends an assistant turn with {template.before_next[:20]!r}, which is not a special "
                "token: use a model or a chat template that ends turns with one"
            )
        self.end_of_turn = self._before_next.pop(0)
        self.stop_ids = {self.end_of_turn, *eos_ids, tokenizer.eos_token_id} - {None}
        self.stop_ids |= self._special & {tokenizer.pad_token_id}
        if history == "append":
            template.check_block()
            template.check_rule()
            self._check_tokens()
        else:
            template.check_header()
        control = {token.content: i for i, token in added.items() if token.content.strip()}
        names = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, [*names, _MARK[0]])))
        self._no_demonstration = set(control.values()) - set(self._think.values())
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
        self.vocabulary = hashlib.sha256(vocabulary).hexdigest()[:16]
        self._turn_start = self._find_turn_start()
        self._part_ids = functools.lru_cache(4096)(self._template_ids)
        self.warnings = template.warnings()

    def prompt(self, system: str, user: str) -> list[int]:
        """The first context: system and user turn, up to where the assistant's first response begins."""
        turns = self._template.opening(system, user)
        return [i for role, text in turns for i in self._before[role] + self._turn_ids(role, text)] + self._after_user

    def assistant(self, text: str) -> list[int]:
        """A response that was not sampled here (a replayed demonstration), with its end-of-turn token.

        Where the vocabulary has <think> and </think>, they are these tokens, as they were when it was sampled. Where
        the template opens a thought, a response without one has an empty thought.
        """
        text = self._template.shown("assistant", text)
        if self._thinks and self._template.opened:
            opening, closing = self._markers
            begun = text.removeprefix(opening).removeprefix(self._template.opened[len(opening) :])
            text = begun if closing in text else f"\n{closing}\n\n{text}"
        return [*self._answer_ids(text), self.end_of_turn]

    def user(self, text: str) -> list[int]:
        """What stands between two responses: from behind the end-of-turn token to where the next response begins."""
        return self._before_next + self._turn_ids("user", text) + self._after_user

    def context(self, texts: list[str]) -> list[int]:
        """[system, user, answer, user, ..., user] as the template renders it, up to where the next response begins.

        Token for token what tokenizer.apply_chat_template gives, but that names of control tokens stay characters; in
        an answer those that open and close a thought are the template's to treat.
        """
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            if match[0] in self._markers and is_answer:
                return match[0]
            hidden.append(match[0])
            return _MARK.format(len(hidden) - 1)

        marked = []
        for i, text in enumerate(texts):
            is_answer = i > 1 and i % 2 == 0
            marked.append(self._control.sub(hide, text))
        pieces = re.split(_MARK.format(r"(\d+)"), self._template.render(marked))
        ids = (
            self._text_ids(hidden[int(piece)]) if i % 2 else self._whole_ids(piece) for i, piece in enumerate(pieces)
        )
        return [*itertools.chain.from_iterable(ids)]

    def said(self, response_ids: list[int]) -> str:
        """A response as a turn of the conversation: with the thought that the template began, which is closed."""
        text = self.text(response_ids)
        if not self._thinks:
            return text
        opening, closing = self._markers
        text = self._template.opened + text
        return f"{text}\n{closing}\n\n" if text.lstrip().startswith(opening) and closing not in text else text

    def replays(self, response_ids: list[int], said: str) -> bool:
        """Whether ids from a file may stand for a recorded response: they say it, and name nothing but text.

        As in text, an added token may only open or close a thought, or end the turn.
        """
        if not response_ids or not all(0 <= i < self.vocab_size for i in response_ids):
            return False
        inner = response_ids[:-1] if response_ids[-1] in self.stop_ids else response_ids
        return not self._no_demonstration.intersection(inner) and self.said(response_ids) == said

    def answer(self, response_ids: list[int]) -> str:
        """What a response says after its thought, and not in another one: nothing, if the thought was cut."""
        said, (opening, closing) = self.said(response_ids), self._markers
        return said.rpartition(closing)[2].partition(opening)[0] if self._thinks else said

    def text(self, response_ids: list[int]) -> str:
        """The text of sampled ids without the stop token that ended them."""
        ended = bool(response_ids) and response_ids[-1] in self.stop_ids
        return self._decode(response_ids[:-1] if ended else response_ids)

    def _template_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _find_turn_start(self) -> re.Pattern[str]:
        """Where a rendered text may be cut into parts that are encoded once and kept: before an end of turn.

        Encoding a long conversation as a whole at each turn would hold up the event loop.
        """
        end = re.compile(f"(?={re.escape(self.tokenizer.convert_ids_to_tokens(self.end_of_turn))})")
        whole = self._template.render(conversation(3, AWKWARD))
        parts = [i for part in end.split(whole) for i in self._template_ids(part)]
        return end if parts == self._template_ids(whole) else re.compile("(?!)")

    def _whole_ids(self, rendered: str) -> list[int]:
        ids = [i for part in self._turn_start.split(rendered) for i in self._part_ids(part)]
        unknown = self.tokenizer.unk_token
        if unknown and unknown not in rendered:  # see _text_ids
            ids = [i for i in ids if i != self.tokenizer.unk_token_id]
        return ids

    def _answer_ids(self, text: str) -> list[int]:
        names = "|".join(map(re.escape, self._think)) or "(?!)"
        parts = re.split(f"({names})", text)
        ids = ([self._think[part]] if part in self._think else self._text_ids(part) for part in parts)
        return [*itertools.chain.from_iterable(ids)]

    def _turn_ids(self, role: str, text: str) -> list[int]:
        return self._text_ids(self._template.shown(role, text))

    def _text_ids(self, text: str) -> list[int]:
        ids = self._data.encode(text, add_special_tokens=False).ids
        # Some vocabularies lack a few bytes, which then are the unknown token: <|endoftext|> for SmolLM2.
        return [i for i in ids if i not in self._special]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _check_tokens(self) -> None:
        """Raises ValueError if turns that are encoded one by one are not the text of the conversation."""
        system, user, answer, after = texts = conversation(2)
        whole = self._template.write(texts, past=self._template.after_user)
        ours = self._decode(
            self.prompt(system, user)
            + [*self._answer_ids(self._template.shown("assistant", answer)), self.end_of_turn]
            + self.user(after)
        )
        lossless = self._decode(self._text_ids(user)) == user
        # A marker may swallow the white space beside it; then it does so in one piece, too.
        if not lossless or ours not in (whole, self._decode(self._template_ids(whole))):
            raise ValueError(
                f"the tokenizer, as transformers loads it, changes text that is encoded turn by turn, it gives back "
                f"{difference(ours, whole)}: use a model whose tokenizer keeps text"
            )


def _without_added_tokens(backend: "Tokenizer") -> "Tokenizer":
    """A tokenizer for text that is data: it does not know "<|im_end|>" or "<think>".

    Added tokens, special or not, are found before anything else happens to a text; a text that holds none is encoded
    as ever. What the model itself joins ("\\n\\n", which is an added token of Gemma, too) stays joined.
    """
    data = type(backend)(backend.model)
    data.normalizer, data.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    return data
