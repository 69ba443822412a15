"""Chat turns as token spans that are only ever appended.

Rendering a conversation again after each turn is not append-only: Qwen3's template drops earlier <think> blocks, and
re-encoding sampled text can give other tokens than were sampled. So the template is asked once, with placeholders,
what stands around a turn; afterwards a context grows by exactly these spans and by the ids that the engine sampled.

    prompt(system, user)    <|im_start|>system .. <|im_start|>user .. <|im_end|>\n<|im_start|>assistant\n[think block]
    assistant(text)         text<|im_end|>
    user(text)              \n<|im_start|>user\ntext<|im_end|>\n<|im_start|>assistant\n[think block]
"""

from typing import Any

from jinja2 import TemplateError

_SYSTEM, _USER, _ASSISTANT, _NEXT = (
    "SYSTEMxPLACEHOLDER",
    "USERxPLACEHOLDER",
    "ASSISTANTxPLACEHOLDER",
    "NEXTxPLACEHOLDER",
)


class ChatTokens:
    """Token spans of one tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        template_kwargs: keyword arguments of its template, as in slime's --apply-chat-template-kwargs.

    Attributes:
        end_of_turn: id of the token that ends every assistant turn (<|im_end|> for Qwen3).
        stop_ids: ids that end a sampled turn: end_of_turn, the tokenizer's eos and pad (<|endoftext|> for Qwen3).

    Raises:
        ValueError: the template changes the text of a turn, does not end an assistant turn with one special token, or
            leaves the thinking mode open.
    """

    def __init__(self, tokenizer: Any, template_kwargs: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        first = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        later = [{"role": "assistant", "content": _ASSISTANT}, {"role": "user", "content": _NEXT}]

        def render(messages: list[dict[str, str]], **more: bool) -> str:
            kwargs = {**(template_kwargs or {}), **more}
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)

        try:
            opening, later_on = render(first), render(first + later)
            non_thinking = render(first, enable_thinking=False)
        except TemplateError as error:
            raise ValueError(f"the chat template does not render system, user and assistant turns: {error}") from error
        if opening != non_thinking:
            raise ValueError(
                "the chat template has a thinking mode, and thoughts would stay in the context of every later turn: "
                "set --apply-chat-template-kwargs '{\"enable_thinking\": false}'"
            )
        try:
            before_system, rest = opening.split(_SYSTEM)
            before_user, after_user = rest.split(_USER)
            before_next, after_next = later_on.split(_ASSISTANT)[1].split(_NEXT)
        except (ValueError, IndexError) as error:
            raise ValueError(
                "the chat template does not render system, user and assistant turns verbatim, "
                "so turns cannot be appended to a context: use a tokenizer whose template does"
            ) from error

        self._before_system, self._before_user, self._after_user = map(
            self._template_ids, (before_system, before_user, after_user)
        )
        self.end_of_turn, *self._before_next = self._template_ids(before_next)
        self._after_next = self._template_ids(after_next)
        if self.end_of_turn not in tokenizer.all_special_ids:
            raise ValueError(
                f"the chat template ends an assistant turn with {before_next[:20]!r}, which is not a special token: "
                "use a tokenizer whose template ends turns with one"
            )
        self.stop_ids = {self.end_of_turn, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}

    def prompt(self, system: str, user: str) -> list[int]:
        """The first context: system and user turn, up to where the assistant's first response begins."""
        return self._before_system + self._ids(system) + self._before_user + self._ids(user) + self._after_user

    def assistant(self, text: str) -> list[int]:
        """A response that was not sampled here (a replayed demonstration), with its end-of-turn token."""
        return self._ids(text) + [self.end_of_turn]

    def user(self, text: str) -> list[int]:
        """What stands between two responses: from behind the end-of-turn token to where the next response begins."""
        return self._before_next + self._ids(text) + self._after_next

    def text(self, response_ids: list[int]) -> str:
        """The text of sampled ids without the stop token that ended them."""
        ended = bool(response_ids) and response_ids[-1] in self.stop_ids
        return self.tokenizer.decode(response_ids[:-1] if ended else response_ids, skip_special_tokens=False)

    def _template_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _ids(self, text: str) -> list[int]:
        # Text from an environment or a demonstration is data: "<|im_end|>" in it must not become a control token.
        return self.tokenizer.encode(text.strip(), add_special_tokens=False, split_special_tokens=True)
