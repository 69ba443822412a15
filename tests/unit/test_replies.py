"""What in a server's reply can be trained on; what a reply that cannot comes to in a rollout is in test_faults.py."""

import asyncio
import math
from types import SimpleNamespace

import pytest

from examples.tcod import Failure
from examples.tcod.model import student
from examples.tcod.model.client import SGLangClient
from examples.tcod.model.student import StudentClient, checked_response
from examples.tcod.model.teacher import checked_scores
from tests.support.fake_sglang import generated

NUM_GPUS = 0
VOCABULARY = 10
NO_LOG_PROB = [None, False, math.nan, math.inf, -math.inf, 0.25, -1e300]


def sampled(ids=(5, 6), log_probs=(-0.5, -0.25), output_ids=None, counted=None) -> dict:
    reply = generated(ids, log_probs)
    reply["output_ids"] = output_ids or reply["output_ids"]
    reply["meta_info"]["completion_tokens"] = counted or len(ids)
    return reply


def test_sampled_ids_and_their_log_probs_are_taken_as_they_are():
    response = checked_response(sampled(), VOCABULARY, {6})
    assert (response.ids, response.log_probs, response.at_limit) == ([5, 6], [-0.5, -0.25], False)


@pytest.mark.parametrize(
    "reply, said",
    [
        *[(sampled(output_ids=other), "the log-probs belong to other ids") for other in ([5, 7], [5], [6, 5])],
        (sampled(counted=3), "2 log-probs for 3 sampled tokens"),  # as with speculative decoding
        (sampled(ids=(6, 5)), "goes on after a token that ends it"),  # the same
        (sampled(ids=(5, VOCABULARY)), "outside the tokenizer's vocabulary"),
        *[(sampled(log_probs=(-0.5, value)), "a value is no log-prob") for value in NO_LOG_PROB],
    ],
)
def test_what_cannot_be_trained_on_is_refused(reply, said):
    with pytest.raises(Failure, match=said) as caught:
        checked_response(reply, VOCABULARY, {6})
    assert caught.value.reason == "engine_invalid"


def test_nobody_waits_behind_the_last_abort(monkeypatch):
    happened = []

    async def aborted(*_):
        happened.append("asked")
        return {"meta_info": {"finish_reason": {"type": "abort"}}}

    async def sleep(seconds):
        happened.append(seconds)

    monkeypatch.setattr(SGLangClient, "post", aborted)
    monkeypatch.setattr(student, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(Failure, match="aborted a turn 8 times"):
        asyncio.run(StudentClient("http://engine", 1.0, VOCABULARY, set()).respond([1], {}, 8, "", lambda: None))
    assert happened[::2] == ["asked"] * 8
    assert happened[1::2] == pytest.approx([0.1 * 2**i for i in range(7)])


def scored(*entries) -> dict:
    return {"meta_info": {"input_token_logprobs": [[log_prob, token, None] for log_prob, token in entries]}}


def test_the_teachers_scores_are_those_behind_the_prompt():
    """SGLang echoes the vocabulary's last id as 0, with the right log-prob."""
    reply = scored((None, 4), (-0.5, 5), (1e-4, 0))
    assert checked_scores(reply, [3, 4, 5, VOCABULARY - 1], 1, VOCABULARY) == [-0.5, 1e-4]


@pytest.mark.parametrize(
    "reply, said",
    [
        (scored((None, 4), (-0.5, 5)), "2 entries for 3 tokens"),
        (scored((None, 4), (-0.5, 5), (-0.5, 6), (-0.5, 7)), "4 entries for 3 tokens"),
        (scored((None, 4), (-0.5, 6), (-0.5, 6)), "token 6 echoed for token 5 at position 2"),
        (scored((None, 4), (-0.5, 0), (-0.5, 6)), "token 0 echoed for token 5 at position 2"),
        *[(scored((None, 4), (-0.5, 5), (value, 6)), f"{value} is no log-prob.* 3$") for value in NO_LOG_PROB],
    ],
)
def test_scores_of_other_tokens_and_no_log_probs_are_refused(reply, said):
    with pytest.raises(Failure, match=said.replace("+", r"\+")) as caught:
        checked_scores(reply, [3, 4, 5, 6], 1, VOCABULARY)
    assert caught.value.reason == "teacher_invalid"
