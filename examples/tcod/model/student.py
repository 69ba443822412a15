"""The student's responses, sampled by SGLang: the request, and what makes a reply fit to train on."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import Failure
from .client import SGLangClient, is_log_prob

ASKED = 8  # How often a turn is asked for when the engine aborts it; the pauses between sum up to 12.7 s.
FIRST_PAUSE_S = 0.1


@dataclass(frozen=True)
class Response:
    """What the engine sampled in one turn.

    Attributes:
        log_probs: one for each id, in nats.
        at_limit: the length limit ended it. The last token may be a stop token all the same.
        meta_info: SGLang's counts, times and weight version, for slime's statistics.
    """

    ids: list[int]
    log_probs: list[float]
    at_limit: bool
    meta_info: dict[str, Any]


class StudentClient:
    """Asks the student's engines; belongs to the event loop that first awaits it.

    Args:
        url: the router's or the engine's base URL.
        timeout_s: of a request, see SGLangClient.
        vocab_size: of the tokenizer.
        stop_ids: ids that end a turn, beside those in the sampling parameters.
    """

    def __init__(self, url: str, timeout_s: float, vocab_size: int, stop_ids: set[int]) -> None:
        self._vocab_size, self._stop_ids = vocab_size, stop_ids
        self._client = SGLangClient("engine", url, timeout_s)

    async def respond(
        self,
        tokens: list[int],
        sampling_params: dict[str, Any],
        max_new_tokens: int,
        session: str,
        check_wanted: Callable[[], None],
    ) -> Response:
        """Sample one response to the context `tokens`.

        An engine aborts all its requests when slime pushes new weights to it (in fully asynchronous training) and
        when a rollout has all the samples it needs. Only in the second case `check_wanted` raises; else the partial
        response is dropped and the turn asked for again, which SGLang holds until the new weights are in.

        Args:
            sampling_params: slime's; never changed, all samples of an evaluation share one dict.
            session: the same for all turns of an episode, see SGLangClient.post.

        Raises:
            Failure: engine_{aborted, invalid, refused, timeout, unavailable}, nothing_sampled, or what check_wanted
                raises.
        """
        stop_ids = set(sampling_params.get("stop_token_ids") or []) | self._stop_ids
        sampling_params = {**sampling_params, "no_stop_trim": True, "stop_token_ids": sorted(stop_ids)}
        payload = {
            "input_ids": tokens,
            "sampling_params": {**sampling_params, "max_new_tokens": max_new_tokens},
            "return_logprob": True,
        }
        for attempt in range(ASKED):
            if attempt:
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            reply = await self._client.post(payload, session, check_wanted)
            if not _is_aborted(reply):
                return checked_response(reply, self._vocab_size, stop_ids)
            check_wanted()
            said = reply["meta_info"]["finish_reason"].get("message") or "no reason given"
        raise Failure("engine_aborted", f"the engine aborted a turn {ASKED} times ({said})")


def _is_aborted(reply: Any) -> bool:
    try:
        return reply["meta_info"]["finish_reason"]["type"] == "abort"
    except (KeyError, TypeError):
        return False  # checked_response says what is wrong


def checked_response(reply: Any, vocab_size: int, stop_ids: set[int]) -> Response:
    """The response in SGLang's reply.

    Raises:
        Failure: nothing_sampled; or engine_invalid, where ids, log-probs and the engine's own count of completion
            tokens do not agree, a turn goes on after its end, or a value cannot be trained on.
    """
    try:
        meta_info, finish = reply["meta_info"], reply["meta_info"]["finish_reason"]["type"]
        log_probs = [entry[0] for entry in meta_info["output_token_logprobs"]]
        ids = [entry[1] for entry in meta_info["output_token_logprobs"]]
        counted, version = meta_info["completion_tokens"], meta_info.get("weight_version")
    except (KeyError, TypeError, IndexError) as error:
        raise Failure("engine_invalid", f"{error!r} in the reply {str(reply)[:200]}") from error
    if counted != len(ids):
        raise Failure("engine_invalid", f"{len(ids)} log-probs for {counted} sampled tokens")
    if not ids:
        raise Failure("nothing_sampled", "the engine returned an empty response")
    if "output_ids" in reply and reply["output_ids"] != ids:
        raise Failure("engine_invalid", "the log-probs belong to other ids than the sampled ones")
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise Failure("engine_invalid", "a sampled id is outside the tokenizer's vocabulary")
    if stop_ids.intersection(ids[:-1]):
        raise Failure("engine_invalid", "the turn goes on after a token that ends it")
    if not all(map(is_log_prob, log_probs)):
        raise Failure("engine_invalid", "a value is no log-probability")
    # Counts alone: lists of a list a token, kept for all turns of many episodes, make the garbage collector's work.
    kept = {name: value for name, value in meta_info.items() if type(value) in (int, float)}
    kept |= {"finish_reason": {"type": finish}, **({"weight_version": str(version)} if version is not None else {})}
    return Response(ids, log_probs, finish == "length", kept)


def is_untempered(sampling: dict[str, Any]) -> bool:
    """Whether sampling parameters leave the policy as it is, as the teacher's log-probs always assume."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "min_new_tokens": 0}
    given = {name: sampling.get(name) for name in neutral}
    return all(value is None or value == neutral[name] for name, value in given.items())
