"""Which tokens a sample has, which of them are trained, and what the engine and the teacher are sent."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from examples.tcod.episode.record import Episode
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
    spans,
    student_value,
    teacher_value,
    user,
)

NUM_GPUS = 0


def test_a_cut_response_gets_an_untrained_end_of_turn_token(rig, tokenizer):
    rig.cut = {0}
    [sample], metrics = rig.rollout([{"goal": 2}])
    assert_tokens(
        sample, tokenizer, opening(2), RIGHT, "<|im_end|>" + user("You are at door 1."), RIGHT + "<|im_end|>"
    )
    assert metrics["rollout/tcod/truncated_turns"] == 0.5
    assert sample.status == Sample.Status.COMPLETED


def test_an_episode_that_ends_in_a_cut_response_is_truncated(rig, tokenizer):
    rig.cut, rig.script = {0}, ["I think that"]
    [sample], metrics = rig.rollout([{"goal": 2}], 0, tcod_variant="f2b")
    assert_tokens(sample, tokenizer, opening(2), "I think that")
    assert sample.status == Sample.Status.TRUNCATED
    assert metrics["rollout/tcod/invalid_actions"] == 1.0


def test_both_stop_tokens_end_a_turn_and_are_not_part_of_the_action(rig, tokenizer):
    end, eot = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = tokenizer.encode(RIGHT, add_special_tokens=False) + [end]
    rig.answer = lambda turn, payload: generated(ids, [student_value(i) for i in range(len(ids))])
    [sample], _ = rig.rollout([{"goal": 2}])
    # The context has the end-of-turn token after every turn, whatever ended it.
    between = "<|im_end|>" + user("You are at door 1.")
    assert_tokens(sample, tokenizer, opening(2), RIGHT + "<|endoftext|>", between, RIGHT + "<|endoftext|>")
    assert sorted([end, eot]) == rig.student.payloads()[0]["sampling_params"]["stop_token_ids"]


def test_a_stop_token_in_the_last_place_that_the_limit_leaves_completes_the_turn(rig, tokenizer):
    ids = tokenizer.encode(RIGHT + "<|im_end|>", add_special_tokens=False)
    rig.answer = lambda turn, payload: generated(ids, [student_value(i) for i in range(len(ids))], finish="length")
    [sample], metrics = rig.rollout([{"goal": 2}], rollout_max_response_len=len(ids))
    assert_tokens(
        sample, tokenizer, opening(2), RIGHT + "<|im_end|>", user("You are at door 1."), RIGHT + "<|im_end|>"
    )
    assert metrics["rollout/tcod/truncated_turns"] == 0.0 and sample.status == Sample.Status.COMPLETED


def test_a_response_ended_by_a_stop_string_is_not_cut(rig, tokenizer):
    ids = tokenizer.encode(RIGHT, add_special_tokens=False)
    rig.answer = lambda turn, payload: generated(ids, [student_value(i) for i in range(len(ids))], finish="stop")
    [sample], metrics = rig.rollout([{"goal": 2}], rollout_stop=["</action>"])
    assert_tokens(sample, tokenizer, opening(2), RIGHT, "<|im_end|>" + user("You are at door 1."), RIGHT)
    assert metrics["rollout/tcod/truncated_turns"] == 0.0 and sample.status == Sample.Status.COMPLETED


def test_the_context_limit_ends_an_episode(rig, tokenizer):
    turn = len(spans(tokenizer, RIGHT + "<|im_end|>", user("You are at door 1."))[0])
    prompt = len(tokenizer.encode(opening(9), add_special_tokens=False))
    # Room for two turns and a few tokens of a third response.
    [sample], metrics = rig.rollout(
        [{"goal": 9}], rollout_max_context_len=prompt + 2 * turn + 6, rollout_max_response_len=40
    )
    assert sample.status == Sample.Status.TRUNCATED
    assert [t["cut"] for t in sample.metadata["tcod"]["turns"]] == [False, False, True]
    assert len(sample.tokens) == prompt + 2 * turn + 5
    # No room for the observation after the first turn.
    [sample], metrics = rig.rollout([{"goal": 9}], rollout_max_context_len=prompt + turn, rollout_max_response_len=40)
    assert len(sample.metadata["tcod"]["turns"]) == 1 and metrics["rollout/tcod/context_limited"] == 1.0
    assert sample.status == Sample.Status.TRUNCATED


def test_an_invalid_action_is_sent_and_counted(rig, tokenizer):
    rig.script = ["let me see", RIGHT]
    [sample], metrics = rig.rollout([{"goal": 1}])
    assert_tokens(
        sample, tokenizer, opening(1), "let me see<|im_end|>", user("Nothing happens."), RIGHT + "<|im_end|>"
    )
    assert metrics["rollout/tcod/invalid_actions"] == 0.5


@pytest.mark.parametrize(
    "said, sent, possible",
    [
        ("Right.", "right", True),
        ("`right`", "right", True),
        ("**[Right]**", "right", True),
        ("'RIGHT'", "right", True),
        ("Action: right", "right", True),
        ("right or left", "right or left", False),
        ("...", "...", False),
    ],
)
def test_an_action_is_the_listed_one_but_for_case_and_outer_punctuation(rig, said, sent, possible):
    rig.script = [f"<action>{said}</action>"]
    [sample], metrics = rig.rollout([{"goal": 1}], tcod_horizon=1)
    [turn] = sample.metadata["tcod"]["turns"]
    assert (turn["action"], turn["valid"], turn["admissible"]) == (sent, True, possible)
    assert sample.reward == float(possible)
    assert metrics["rollout/tcod/inadmissible_actions"] == float(not possible)
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
