"""The teacher's log-probs of a finished trajectory, from SGLang: the request, and what makes a reply valid."""

import os
from collections.abc import Callable

from .. import Failure
from .client import SGLangClient, is_log_prob


class TeacherClient:
    """Scores token sequences; belongs to the event loop that first awaits it.

    Args:
        url: the server's base URL.
        timeout_s, concurrency: of the requests, see SGLangClient.
        vocab_size: of the tokenizer.
    """

    def __init__(self, url: str, timeout_s: float, concurrency: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._client = SGLangClient("teacher", url, timeout_s, concurrency, teacher_headers())

    async def score(
        self,
        tokens: list[int],
        prompt_length: int,
        session: str = "",
        check_wanted: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """log pi_teacher(tokens[i] | tokens[:i]) for i in prompt_length..len(tokens)-1, in nats.

        One request. logprob_start_len is prompt_length - 1, because the first entry of the reply never has a value; a
        smaller one would keep the server from reusing the cached prompt. `session` is the same for all sequences of an
        episode. For it and `check_wanted` see SGLangClient.post.

        Raises:
            Failure: what check_wanted raises, or teacher_{invalid, refused, timeout, unavailable}.
        """
        start = prompt_length - 1
        request = scoring_request(start, input_ids=tokens)
        reply = await self._client.post(request, session, check_wanted)
        return checked_scores(reply, tokens, start, self._vocab_size)


def teacher_headers() -> dict[str, str]:
    """The teacher's API key, where it needs one. It comes from the environment, so that no log or script holds it."""
    key = os.environ.get("TCOD_TEACHER_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def scoring_request(start: int, **prompt: object) -> dict:
    """SGLang's request for log-probs from position `start` on; `prompt` is input_ids=[..] or text=".."."""
    sampling_params = {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False}
    return {**prompt, "sampling_params": sampling_params, "return_logprob": True, "logprob_start_len": start}


def checked_scores(reply: object, tokens: list[int], start: int, vocab_size: int) -> list[float]:
    """The log-probs of tokens[start + 1:] out of SGLang's reply to a request with logprob_start_len = start.

    Raises:
        Failure: teacher_invalid, when the reply is not about exactly these tokens or holds a number that is no
            log-probability. Such a sample must be dropped: a filled-in value would train on an invention.
    """
    try:
        entries = reply["meta_info"]["input_token_logprobs"]  # type: ignore[index]
        values, echoed = [entry[0] for entry in entries], [entry[1] for entry in entries]
    except (KeyError, TypeError, IndexError) as error:
        raise Failure("teacher_invalid", f"no input_token_logprobs in the reply ({error!r})") from error
    if len(entries) != len(tokens) - start:
        raise Failure("teacher_invalid", f"{len(entries)} entries for {len(tokens) - start} tokens")
    for position, (sent, got) in enumerate(zip(tokens[start:], echoed, strict=True), start):
        # SGLang echoes 0 for ids at the very end of the vocabulary, with the right log-prob.
        if got != sent and not (got == 0 and sent >= vocab_size - 1):
            raise Failure("teacher_invalid", f"token {got} echoed for token {sent} at position {position}")
    for position, value in enumerate(values[1:], start + 1):
        if not is_log_prob(value):
            raise Failure("teacher_invalid", f"{value!r} is no log-probability, at position {position}")
    return [float(value) for value in values[1:]]
