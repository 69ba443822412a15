"""Chat turns as token spans that are only ever appended.

Rendering a conversation again after each turn is not append-only: Qwen3's template drops earlier <think> blocks, and
re-encoding sampled text can give other tokens than were sampled. So the template is asked once what stands around a
turn; afterwards a context grows by exactly these spans and by the ids that the engine sampled.

    prompt(system, user)    <|im_start|>system .. <|im_start|>user .. <|im_end|>\n<|im_start|>assistant\n[think block]
    assistant(text)         text<|im_end|>
    user(text)              \n<|im_start|>user\ntext<|im_end|>\n<|im_start|>assistant\n[think block]
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat_template import ChatTemplate, conversation, difference

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_chat(checkpoint: str, template_kwargs: dict[str, Any] | None = None) -> "ChatTokens":
    """The chat of a checkpoint: its tokenizer as slime loads it, its stop ids as SGLang knows them.

    Raises:
        OSError: the checkpoint has no tokenizer.
        ValueError: its tokenizer or chat template cannot be used, see ChatTokens.
    """
    from transformers import AutoTokenizer  # here: slime's plugin contracts import hooks without transformers

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    return ChatTokens(tokenizer, template_kwargs, engine_eos_ids(checkpoint))


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

    Attributes:
        end_of_turn: id of the token that ends every assistant turn (<|im_end|> for Qwen3).
        stop_ids: ids that end a sampled turn: end_of_turn, eos_ids, the tokenizer's eos, and its pad if it is special.
        warnings: sentences about what is allowed and may surprise.

    Raises:
        ValueError: with one sentence that says why the tokenizer or its template cannot be used, and what to do.
    """

    def __init__(
        self, tokenizer: Any, template_kwargs: dict[str, Any] | None = None, eos_ids: Iterable[int] = ()
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
        self._think = {token.content: i for i, token in added.items() if token.content in ("<think>", "</think>")}

        self._template = template = ChatTemplate(tokenizer, template_kwargs or {})
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
        template.check_rule()
        self._check_tokens()
        self.warnings = template.warnings()

    def prompt(self, system: str, user: str) -> list[int]:
        """The first context: system and user turn, up to where the assistant's first response begins."""
        turns = self._template.opening(system, user)
        return [i for role, text in turns for i in self._before[role] + self._turn_ids(role, text)] + self._after_user

    def assistant(self, text: str) -> list[int]:
        """A response that was not sampled here (a replayed demonstration), with its end-of-turn token.

        Where the vocabulary has <think> and </think>, they are these tokens, as they were when it was sampled.
        """
        names = "|".join(self._think) or "(?!)"
        parts = re.split(f"({names})", self._template.shown("assistant", text))
        ids = ([self._think[part]] if part in self._think else self._text_ids(part) for part in parts)
        return [*itertools.chain.from_iterable(ids), self.end_of_turn]

    def user(self, text: str) -> list[int]:
        """What stands between two responses: from behind the end-of-turn token to where the next response begins."""
        return self._before_next + self._turn_ids("user", text) + self._after_user

    def text(self, response_ids: list[int]) -> str:
        """The text of sampled ids without the stop token that ended them."""
        ended = bool(response_ids) and response_ids[-1] in self.stop_ids
        return self._decode(response_ids[:-1] if ended else response_ids)

    def _template_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

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
        ours = self._decode(self.prompt(system, user) + self.assistant(answer) + self.user(after))
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
