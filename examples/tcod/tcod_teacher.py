"""The teacher's log-probs of a finished trajectory, from an SGLang server. The one place of retries and validation."""

import asyncio
import itertools
import logging
import random
from collections.abc import Callable

import aiohttp

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class TeacherFailure(Exception):
    """No usable score. `reason` is what is counted: teacher_unavailable, teacher_refused or teacher_invalid."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class _Healing(Exception):
    """A failure that another attempt may not see."""


class TeacherClient:
    """Scores token sequences; bound to the event loop that first awaits it.

    Args:
        url: the server's /generate.
        timeout_s: longest single request, in seconds.
        retries: further attempts after a connection error, a time-out, 429 or 5xx, with exponential back-off.
        concurrency: requests in flight at once.
        vocab_size: of the tokenizer.
    """

    def __init__(self, url: str, timeout_s: float, retries: int, concurrency: int, vocab_size: int) -> None:
        self.url, self.retries, self._vocab_size = url, retries, vocab_size
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._slots = asyncio.Semaphore(concurrency)

    async def score(
        self, tokens: list[int], prompt_length: int, unwanted: Callable[[], bool] = lambda: False
    ) -> list[float]:
        """log pi_teacher(tokens[i] | tokens[:i]) for i in prompt_length..len(tokens)-1, in nats.

        One request for the whole trajectory. logprob_start_len is prompt_length - 1, because the first entry of the
        reply never has a value; a smaller one would keep the server from reusing the cached prompt. `unwanted` is
        asked before each attempt, so that a score nobody needs any more is not waited for.

        Raises:
            TeacherFailure: the server cannot be reached, refuses the request, or its reply does not fit the tokens.
        """
        start = prompt_length - 1
        payload = scoring_request(start, input_ids=tokens)
        for attempt in itertools.count():
            try:
                async with self._slots:
                    if unwanted():
                        raise TeacherFailure("teacher_unwanted", "the rollout ended before the score was asked for")
                    return check_scores(await self._post(payload), tokens, start, self._vocab_size)
            except _Healing as error:
                if attempt == self.retries:
                    raise TeacherFailure("teacher_unavailable", str(error)) from error
                pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
                logger.warning("teacher %s: %s; again in %.1f s", self.url, error, pause_s)
                await asyncio.sleep(pause_s)

    async def _post(self, payload: dict) -> dict:
        # A request scores a whole trajectory: beside that, a connection of its own costs nothing and leaves nothing.
        try:
            async with (
                aiohttp.ClientSession(timeout=self._timeout) as session,
                session.post(self.url, json=payload) as response,
            ):
                if response.status == 429 or response.status >= 500:
                    raise _Healing(f"HTTP {response.status} {(await response.text())[:200]}")
                if response.status != 200:
                    detail = f"HTTP {response.status} {(await response.text())[:200]}"
                    raise TeacherFailure("teacher_refused", detail)
                return await response.json(content_type=None)
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:  # ValueError: cut-off JSON
            raise _Healing(f"{type(error).__name__} {error}") from error


def scoring_request(start: int, **prompt: object) -> dict:
    """SGLang's request for log-probs from position `start` on; `prompt` is input_ids=[..] or text=".."."""
    sampling_params = {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False}
    return {**prompt, "sampling_params": sampling_params, "return_logprob": True, "logprob_start_len": start}


def is_log_prob(value: object) -> bool:
    """Whether a value in a server's reply is a log-probability that float32, in which training computes, can hold.

    Rounding may lift one above 0.
    """
    return type(value) in (int, float) and -1e30 < value <= 1e-3  # not isinstance: False would pass for 0


def check_scores(reply: object, tokens: list[int], start: int, vocab_size: int) -> list[float]:
    """The log-probs of tokens[start + 1:] out of SGLang's reply to a request with logprob_start_len = start.

    Raises:
        TeacherFailure: teacher_invalid, when the reply is not about exactly these tokens or holds a number that is no
            log-probability. Such a sample must be dropped: a filled-in value would train on an invention.
    """
    try:
        entries = reply["meta_info"]["input_token_logprobs"]  # type: ignore[index]
        values, echoed = [entry[0] for entry in entries], [entry[1] for entry in entries]
    except (KeyError, TypeError, IndexError) as error:
        raise TeacherFailure("teacher_invalid", f"no input_token_logprobs in the reply ({error!r})") from error
    if len(entries) != len(tokens) - start:
        raise TeacherFailure("teacher_invalid", f"{len(entries)} entries for {len(tokens) - start} tokens")
    for position, (sent, got) in enumerate(zip(tokens[start:], echoed, strict=True), start):
        # SGLang echoes 0 for ids at the very end of the vocabulary, with the right log-prob.
        if got != sent and not (got == 0 and sent >= vocab_size - 1):
            raise TeacherFailure("teacher_invalid", f"token {got} echoed for token {sent} at position {position}")
    for position, value in enumerate(values[1:], start + 1):
        if not is_log_prob(value):
            raise TeacherFailure("teacher_invalid", f"{value!r} is no log-probability, at position {position}")
    return [float(value) for value in values[1:]]
