"""Which tokens a sample has, which of them are trained, and what the engine and the teacher are sent."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from examples.tcod.episode.episode import Episode
from examples.tcod.settings.config import TcodConfig
from slime.utils.types import Sample
from tests.support.fake_sglang import generated
from tests.support.rig import (
    LEFT,
    RIGHT,
    assert_failed,
    assert_tokens,
    check_invariants,
    opening,
    student_value,
    teacher_value,
    user,
)


def test_a_cut_response_gets_an_untrained_end_of_turn_token(rig, tokenizer):
    rig.cut = {0}
    [sample], metrics = rig.rollout([{"goal": 2}])
    assert_tokens(
        sample, tokenizer, opening(2), RIGHT, "<|im_end|>" + user("You are at door 1."), RIGHT + "<|im_end|>"
    )
    assert metrics["rollout/tcod/truncated_turns"] == 0.5
    assert sample.status == Sample.Status.COMPLETED


@pytest.mark.parametrize(
    "said, finish, between",
    [
        (RIGHT + "<|endoftext|>", "stop", "<|im_end|>"),  # in the context every turn ends alike
        (RIGHT + "<|im_end|>", "length", ""),  # a stop token in the last place that the limit leaves
        (RIGHT, "stop", "<|im_end|>"),  # a stop string
    ],
)
def test_a_turn_that_has_ended_is_not_cut(rig, tokenizer, said, finish, between):
    ids = tokenizer.encode(said, add_special_tokens=False)
    rig.answer = lambda turn, payload: generated(ids, [student_value(i) for i in range(len(ids))], finish=finish)
    [sample], metrics = rig.rollout([{"goal": 2}], rollout_stop_token_ids=[0])
    assert_tokens(sample, tokenizer, opening(2), said, between + user("You are at door 1."), said)
    assert metrics["rollout/tcod/truncated_turns"] == 0.0 and sample.status == Sample.Status.COMPLETED
    stops = rig.student.payloads()[0]["sampling_params"]["stop_token_ids"]
    assert stops == sorted([0, tokenizer.pad_token_id, tokenizer.eos_token_id])


def test_an_action_is_the_listed_one_but_for_case_and_outer_punctuation(rig):
    said = ["Right.", "`right`", "**[Right]**", "'RIGHT'", "Action: right", "right or left", "..."]
    rig.script = [f"<action>{text}</action>" for text in said]
    [sample], metrics = rig.rollout([{"goal": 9}], tcod_horizon=len(said))
    turns = sample.metadata["tcod"]["turns"]
    assert [turn["action"] for turn in turns] == ["right"] * 5 + said[5:]
    assert [turn["admissible"] for turn in turns] == [True] * 5 + [False] * 2
    assert metrics["rollout/tcod/inadmissible_actions"] == pytest.approx(2 / 7)
    assert metrics["rollout/tcod/invalid_actions"] == 0.0


def test_the_teacher_scores_a_trajectory_once_from_the_end_of_the_prompt(rig, tokenizer):
    [sample], metrics = rig.rollout([{"goal": 3}])
    [payload] = rig.scoring_requests()
    assert payload["input_ids"] == sample.tokens
    assert payload["logprob_start_len"] == len(sample.tokens) - sample.response_length - 1
    assert payload["sampling_params"]["max_new_tokens"] == 0
    assert metrics["rollout/tcod/tokens/scored"] == sample.response_length
    assert metrics["rollout/tcod/tokens/trained"] == sum(sample.loss_mask)
    kl = sum(
        (s - t) * m
        for s, t, m in zip(sample.rollout_log_probs, sample.teacher_log_probs, sample.loss_mask, strict=True)
    )
    assert metrics["rollout/tcod/kl/trajectory"] == pytest.approx(kl)
    assert sum(metrics[f"rollout/tcod/kl_by_turn/{i:02d}"] for i in range(3)) == pytest.approx(kl)


def test_each_request_holds_the_ids_of_all_before_it(rig):
    rig.rollout([{"goal": 9}])
    contexts = [payload["input_ids"] for payload in rig.student.payloads()]
    for before, after in zip(contexts, contexts[1:], strict=False):
        assert after[: len(before)] == before and len(after) > len(before)
    headers = {request.headers["x-smg-routing-key"] for request in rig.student.requests if request.path == "/generate"}
    assert len(headers) == 1


def reference_episode(tokenizer, goal, replayed, budget, script, max_turn, max_context):
    """An episode by the book: (prompt ids, response ids, mask, log-probs, won, truncated); None if nothing fits.

    `script` holds the ids that the engine would sample per turn, without their end-of-turn token.
    """

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    eot, prompt, at = tokenizer.eos_token_id, encode(opening(goal)), 0
    for _ in range(replayed):
        at += 1
        prompt += encode(RIGHT + "<|im_end|>" + user(f"You are at door {at}."))
    response, mask, log_probs, won, truncated = [], [], [], False, False
    for turn in range(budget):
        room = max_context - len(prompt) - len(response) - 1
        if room < 1:
            truncated = True
            break
        sampled = (script[turn] + [eot])[: min(max_turn, room)]
        response += sampled
        mask += [1] * len(sampled)
        log_probs += [student_value(i) for i in range(len(sampled))]
        cut = sampled[-1] != eot
        text = tokenizer.decode(sampled if cut else sampled[:-1], skip_special_tokens=False)
        move = {RIGHT: 1, LEFT: -1}.get(text, 0)
        at, won = at + move, move != 0 and at + move == goal
        if won or turn + 1 == budget:
            truncated = cut and not won
            break
        span = ([eot] if cut else []) + encode(user(f"You are at door {at}." if move else "Nothing happens."))
        if len(prompt) + len(response) + len(span) + 2 > max_context:
            truncated = True
            break
        response += span
        mask += [0] * len(span)
        log_probs += [0.0] * len(span)
    return (prompt, response, mask, log_probs, won, truncated) if response else None


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_episodes_equal_an_independent_bookkeeping(rig, tokenizer, data):
    goal = data.draw(st.integers(1, 4), "goal")
    variant = data.draw(st.sampled_from(["opd", "f2b", "b2f"]), "variant")
    k = 6 if variant == "opd" else data.draw(st.integers(1, 6), "k")
    # Ids of every kind but the two that end a turn: bytes, and the token that begins one.
    noise = st.lists(st.integers(0, 255) | st.just(tokenizer.convert_tokens_to_ids("<|im_start|>")), max_size=12)
    moves = st.sampled_from([tokenizer.encode(text, add_special_tokens=False) for text in (RIGHT, LEFT)])
    script = data.draw(st.lists(moves | noise, min_size=6, max_size=6), "script")
    max_turn = data.draw(st.integers(1, 40), "max_turn")
    max_context = data.draw(st.integers(300, 900), "max_context")
    assume(max_turn < max_context)
    changes = {"tcod_variant": variant, "tcod_horizon": 6, "rollout_max_context_len": max_context}
    changes["rollout_max_response_len"] = max_turn
    sample_metadata = {"goal": goal, "demo": {"actions": ["right"] * goal}}

    def reply(payload):
        turn = next(turns)
        ids = (script[turn] + [tokenizer.eos_token_id])[: payload["sampling_params"]["max_new_tokens"]]
        finish = "stop" if ids[-1] == tokenizer.eos_token_id else "length"
        return generated(ids, [student_value(i) for i in range(len(ids))], finish=finish)

    turns = iter(range(6))
    rig.student.reply = reply
    args = rig.args([sample_metadata], **changes)
    [sample] = rig.play(sample_metadata, k, max_new_tokens=max_turn, **changes)
    plan = TcodConfig.from_args(args).curriculum.plan(k, goal)
    expected = reference_episode(tokenizer, goal, plan.replayed, plan.budget, script, max_turn, max_context)
    if expected is None:
        assert Episode.of(sample).record.failure == "prompt_too_long"
        assert_failed(sample)
        return
    prompt, response, mask, log_probs, won, truncated = expected
    assert sample.tokens == prompt + response
    assert sample.response_length == len(response) and sample.loss_mask == mask
    assert sample.rollout_log_probs == pytest.approx(log_probs)
    assert sample.teacher_log_probs == [teacher_value(len(prompt) + i, 0) for i in range(len(response))]
    assert sample.reward == float(won)
    assert sample.status == (Sample.Status.TRUNCATED if truncated else Sample.Status.COMPLETED)
    check_invariants(args, [sample])
