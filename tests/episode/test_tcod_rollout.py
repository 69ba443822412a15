"""Whole episodes of every arm on a scripted engine and a scripted teacher, token by token.

The hooks run through slime's own rollout loop: the real slime where SLIME_DIR points to a checkout, else the stand-in.
"""

import asyncio
import json
import math
import time

from smoke import hooks
import pytest
import ray
from tests.support.fake_sglang import generated, hold, scored
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.support.toys import Corridor

SLIME = hooks.find_slime()

from examples.tcod import tcod_rollout
from examples.tcod.environment import EnvironmentPool
from tests.support.rig import (  # noqa: F401  fixtures among them
    HEADER,
    LEFT,
    RIGHT,
    UNTEMPERED,
    check_invariants,
    checkpoint,
    local_pool,
    opening,
    rig,
    student_value,
    teacher_value,
    tokenizer,
    user,
)
from examples.tcod.config import ConfigError, TcodConfig
from examples.tcod.metrics import turn_kl

from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.async_utils import run
from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.http_utils import init_http_client
from slime.utils.misc import SingletonMeta
from slime.utils.types import Sample

NUM_GPUS = 0


@pytest.fixture(scope="module")
def ray_session():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def spans(tokenizer, *parts):
    """(ids, mask) of alternating sampled and context texts, the first one sampled."""
    ids, mask = [], []
    for i, text in enumerate(parts):
        new = tokenizer.encode(text, add_special_tokens=False)
        ids, mask = ids + new, mask + [1 - i % 2] * len(new)
    return ids, mask


def assert_tokens(sample, tokenizer, prompt, *parts):
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    ids, mask = spans(tokenizer, *parts)
    assert tokenizer.decode(sample.tokens) == prompt + "".join(parts)
    assert sample.tokens == prompt_ids + ids
    assert sample.loss_mask == mask
    assert sample.response == "".join(parts)
    assert sample.teacher_log_probs == [teacher_value(len(prompt_ids) + i, 0) for i in range(len(ids))]
    count, expected = 0, []
    for i, trained in enumerate(mask):
        count = 0 if i and mask[i - 1] == 0 else count
        expected.append(student_value(count) if trained else 0.0)
        count += trained
    assert sample.rollout_log_probs == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------- the three arms


def test_opd_plays_until_it_wins(rig, tokenizer):
    [sample], metrics = rig.rollout([{"goal": 2}])
    assert_tokens(
        sample, tokenizer, opening(2), RIGHT + "<|im_end|>", user("You are at door 1."), RIGHT + "<|im_end|>"
    )
    assert sample.reward == 1.0 and sample.status == Sample.Status.COMPLETED
    assert metrics["rollout/tcod/k"] == 4 and metrics["rollout/tcod/success"] == 1.0
    assert metrics["rollout/tcod/turns/student"] == 2


def test_opd_stops_at_the_horizon(rig, tokenizer):
    [sample], metrics = rig.rollout([{"goal": 9}])
    doors = [user(f"You are at door {i}.") for i in (1, 2, 3)]
    parts = [RIGHT + "<|im_end|>"] * 4
    assert_tokens(
        sample, tokenizer, opening(9), *[x for pair in zip(parts, doors, strict=False) for x in pair], parts[3]
    )
    assert sample.reward == 0.0 and sample.status == Sample.Status.COMPLETED
    assert metrics["rollout/tcod/success"] == 0.0


def test_f2b_plays_the_first_k_turns(rig, tokenizer):
    for n, turns in ((0, 1), (1, 1), (2, 2), (50, 4)):
        [sample], metrics = rig.rollout([{"goal": 9}], n, tcod_variant="f2b", tcod_eta=2)
        assert metrics["rollout/tcod/k"] == len(sample.metadata["tcod"]["turns"]) == turns
        assert sample.status == Sample.Status.COMPLETED
    [sample], _ = rig.rollout([{"goal": 9}], 0, tcod_variant="f2b", tcod_eta=2)
    assert_tokens(sample, tokenizer, opening(9), RIGHT + "<|im_end|>")


def test_b2f_replays_the_demonstration_as_chat_turns_in_the_prompt(rig, tokenizer):
    row = {"goal": 3, "demo": {"actions": ["right"] * 3}}
    [sample], metrics = rig.rollout([row], 0, tcod_variant="b2f", tcod_eta=2)
    prompt = opening(3) + "".join(RIGHT + "<|im_end|>" + user(f"You are at door {i}.") for i in (1, 2))
    assert_tokens(sample, tokenizer, prompt, RIGHT + "<|im_end|>")
    assert sample.reward == 1.0
    assert metrics["rollout/tcod/turns/replayed"] == 2
    assert metrics["rollout/tcod/success_by_start/02"] == 1.0
    assert list(turn_kl(sample)) == [2]


def test_b2f_replays_recorded_responses_word_for_word(rig, tokenizer):
    responses = ["Door 2 is to the right. " + RIGHT, RIGHT]
    row = {"goal": 2, "demo": {"actions": ["right", "right"], "responses": responses}}
    [sample], _ = rig.rollout([row], 0, tcod_variant="b2f")
    assert_tokens(
        sample,
        tokenizer,
        opening(2) + responses[0] + "<|im_end|>" + user("You are at door 1."),
        RIGHT + "<|im_end|>",
    )


def test_b2f_budget_is_k_plus_slack_or_what_the_horizon_leaves(rig):
    rig.script = [LEFT] * 20
    row = {"goal": 3, "demo": {"actions": ["right"] * 3}}
    changes = {"tcod_variant": "b2f", "tcod_horizon": 12}
    for more, turns in (({}, 3), ({"tcod_b2f_slack": 0}, 1), ({"tcod_b2f_budget": "horizon"}, 10)):
        [sample], _ = rig.rollout([row], 0, **changes, **more)
        assert len(sample.metadata["tcod"]["turns"]) == turns


def test_the_arms_end_in_the_same_episode(rig):
    """F2B at k = T and B2F at k >= L are the OPD episode, byte for byte."""
    rig.script = [LEFT, RIGHT, "no tag", RIGHT, RIGHT, RIGHT]
    row = {"goal": 2, "demo": {"actions": ["right", "right"]}}
    episodes = []
    for variant, n in (("opd", 0), ("f2b", 10**6), ("b2f", 10**6), ("b2f", 1)):
        [sample], _ = rig.rollout([row], n, tcod_variant=variant, tcod_horizon=6, tcod_eta=1)
        fields = sample.to_dict()
        for name in ("metadata", "trace", "session_id", "non_generation_time"):
            fields.pop(name, None)
        record = {k: v for k, v in sample.metadata["tcod"].items() if k not in ("n", "k") and not k.endswith("_s")}
        episodes.append(json.dumps([fields, record], sort_keys=True))
    assert len(set(episodes)) == 1
    assert '"won": true' in episodes[0]


def test_admissible_actions_can_be_listed_in_every_turn(rig, tokenizer):
    [sample], _ = rig.rollout([{"goal": 2}], tcod_admissible="turn")
    assert tokenizer.decode(sample.tokens).count(" Actions: left, right<|im_end|>") == 2


# ------------------------------------------------------------------------------------------- bookkeeping of tokens


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
    assert_tokens(
        sample, tokenizer, opening(2), RIGHT + "<|endoftext|>", user("You are at door 1."), RIGHT + "<|endoftext|>"
    )
    assert sorted([end, eot]) == rig.student.payloads()[0]["sampling_params"]["stop_token_ids"]


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
    sample = rig.play(sample_metadata, k, max_new_tokens=max_turn, **changes)
    plan = TcodConfig.from_args(args).curriculum.plan(k, goal)
    expected = reference_episode(tokenizer, goal, plan.replayed, plan.budget, script, max_turn, max_context)
    if expected is None:
        assert sample.metadata["tcod"]["failure"] == "prompt_too_long"
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


# ---------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "demo, reason",
    [
        ({}, "demo_missing"),
        ({"actions": ["right"] * 5}, "demo_too_long"),
    ],
)
def test_a_demonstration_that_no_launch_check_saw_fails_the_sample(rig, demo, reason):
    sample = rig.play({"goal": 3, "demo": demo}, k=1, tcod_variant="b2f")
    assert sample.metadata["tcod"]["failure"] == reason
    assert_failed(sample)


def assert_failed(sample):
    assert sample.status == Sample.Status.FAILED and sample.reward == 0.0
    assert sample.tokens == [] and sample.response_length == 0
    assert sample.loss_mask is sample.rollout_log_probs is sample.teacher_log_probs is None


def test_one_failed_sample_drops_its_whole_group(rig):
    calls = iter(range(100))
    rig.teacher_reply = lambda p: {"error": "?"} if next(calls) == 0 else scored(p, teacher_value)
    samples, metrics = rig.rollout([{"goal": 2}, {"goal": 3}], n_samples_per_prompt=2)
    assert len(samples) == 4 and metrics["rollout/tcod/failed/teacher_invalid"] == 1
    assert len(rig.scoring_requests()) == 6


def test_an_unforeseen_error_of_the_teacher_client_fails_the_sample(rig, monkeypatch):
    async def broken(self, tokens, prompt_length, unwanted):
        raise RuntimeError("out of threads")

    monkeypatch.setattr(tcod_rollout.TeacherClient, "score", broken)
    sample = rig.play({"goal": 3}, k=4)
    assert sample.metadata["tcod"]["failure"] == "internal"
    assert_failed(sample)


def test_an_aborted_episode_is_undone(rig):
    """Over-sampling: the surplus is aborted in the middle of its second turn, and leaves nothing behind."""
    rig.script = [RIGHT] * 3

    async def reply(payload):
        text = rig.tokenizer.decode(payload["input_ids"])
        if "Goal: door 9" in text and text.count(HEADER) == 2:
            await hold()
        return rig.answer(text.count(HEADER) - 1, payload)

    rig.student.reply = reply
    args = rig.args([{"goal": 9}, {"goal": 2}], rollout_batch_size=1, over_sampling_batch_size=2)
    SingletonMeta._instances.clear()
    init_http_client(args)
    drawn = []

    class Source(RolloutDataSourceWithBuffer):
        def get_samples(self, num_samples):
            groups = super().get_samples(num_samples)
            drawn.extend(group[0] for group in groups)
            return groups

    output = tcod_rollout.generate_rollout(args, 0, Source(args))
    assert [sample.metadata["goal"] for [sample] in output.samples] == [2]
    aborted = drawn[0]
    assert aborted.status == Sample.Status.ABORTED
    assert aborted.tokens == [] and aborted.response == "" and aborted.loss_mask is None and aborted.reward is None
    assert output.metrics["rollout/tcod/aborted"] == 1 and output.metrics["rollout/tcod/failed"] == 0


def test_a_whole_group_is_aborted(rig):
    """Two samples a group: the surplus group's finished sample is undone like the one that still plays."""
    first = iter(range(100))

    async def reply(payload):
        text = rig.tokenizer.decode(payload["input_ids"])
        if "Goal: door 1." in text and next(first) == 0:
            await hold()
        return rig.answer(text.count(HEADER) - 1, payload)

    rig.student.reply = reply
    rows = [{"goal": 1}, {"goal": 2}]
    samples, metrics = rig.rollout(rows, rollout_batch_size=1, over_sampling_batch_size=2, n_samples_per_prompt=2)
    assert [sample.metadata["goal"] for sample in samples] == [2, 2]
    assert metrics["rollout/tcod/aborted"] >= 1


def test_an_engine_that_aborts_everything_stops_the_run(rig):
    rig.student.reply = lambda payload: generated([], [], finish="abort")
    with pytest.raises(RuntimeError, match="failed groups were replaced.*aborted"):
        rig.rollout([{"goal": 2}])


@pytest.mark.parametrize("when", ["before the reset", "while replaying"])
def test_an_ended_rollout_is_seen_before_the_engine_is_asked(rig, monkeypatch, when):
    asked = iter(range(100))
    limit = {"before the reset": 0, "while replaying": 2}[when]
    state = type("State", (), {"aborted": property(lambda self: next(asked) >= limit), "tokenizer": rig.tokenizer})()
    monkeypatch.setattr(tcod_rollout, "GenerateState", lambda args: state)
    sample = rig.play({"goal": 3, "demo": {"actions": ["right"] * 3}}, k=1, tcod_variant="b2f")
    assert sample.status == Sample.Status.ABORTED
    assert sample.tokens == [] and rig.student.requests == []


def test_a_surplus_episode_is_not_scored(rig, monkeypatch):
    played = rig.play({"goal": 2}, k=4)
    before = len(rig.scoring_requests())
    tcod_rollout.GenerateState(None).aborted = True
    assert run(tcod_rollout.reward_func(rig.args([{"goal": 2}]), played)) == 0.0
    assert played.status == Sample.Status.ABORTED and played.tokens == []
    assert len(rig.scoring_requests()) == before


def test_incomplete_samples_never_reach_training(rig):
    [sample], _ = rig.rollout([{"goal": 2}])
    args = rig.args([{"goal": 2}])
    for name, values in (
        ("teacher_log_probs", None),
        ("teacher_log_probs", sample.teacher_log_probs[1:]),
        ("rollout_log_probs", [math.nan] * sample.response_length),
    ):
        broken = Sample.from_dict({**sample.to_dict(), name: values})
        with pytest.raises(ValueError, match=name):
            tcod_rollout.post_process_rewards(args, [sample, broken])


# --------------------------------------------------------------------------------------------------- evaluation


def evaluation(rig, temperatures=(0.4,), rows=({"goal": 2}, {"goal": 9}), **changes):
    path = str(rig.rows(rows, "heldout"))
    datasets = [
        EvalDatasetConfig(
            name=f"t{temperature:g}",
            path=path,
            input_key="prompt",
            label_key="label",
            metadata_key="metadata",
            n_samples_per_eval_prompt=1,
            temperature=temperature,
            top_p=1.0,
            top_k=-1,
            max_response_len=64,
        )
        for temperature in temperatures
    ]
    args = rig.args([{"goal": 2}, {"goal": 9}], eval_datasets=datasets, **changes)
    SingletonMeta._instances.clear()
    init_http_client(args)
    return tcod_rollout.generate_rollout(args, 0, RolloutDataSourceWithBuffer(args), evaluation=True)


def test_evaluation_plays_the_full_horizon_without_the_teacher(rig):
    output = evaluation(rig, tcod_variant="f2b")
    assert output.data["t0.4"]["rewards"] == [1.0, 0.0]
    assert output.metrics["eval/tcod/t0.4/success"] == 0.5 and output.metrics["eval/tcod/t0.4/episodes"] == 2
    assert output.metrics["eval/tcod/t0.4/turns/student"] == 3.0
    assert rig.scoring_requests() == []
    assert {payload["sampling_params"]["temperature"] for payload in rig.student.payloads()} == {0.4}


def test_an_evaluation_does_not_look_at_demonstrations(rig):
    output = evaluation(rig, rows=[{"goal": 2, "demo": "none"}])
    assert output.metrics["eval/tcod/t0.4/success"] == 1.0 and output.metrics["eval/tcod/t0.4/failed"] == 0


def test_the_evaluation_kl_is_measured_where_it_is_defined(rig):
    output = evaluation(rig, temperatures=(0.4, 1.0), tcod_eval_kl=True)
    assert len(rig.scoring_requests()) == 2
    assert output.metrics["eval/tcod/t1/kl/episodes"] == 2
    assert "eval/tcod/t0.4/kl/episodes" not in output.metrics
    assert output.data["t1"]["rewards"] == [1.0, 0.0]


def test_an_evaluation_request_that_the_engine_aborts_is_a_failure(rig):
    rig.student.reply = lambda payload: generated([], [], finish="abort")
    output = evaluation(rig)
    assert output.metrics["eval/tcod/t0.4/failed/engine_aborted"] == 2
    assert output.metrics["eval/tcod/t0.4/episodes"] == 0


def test_an_evaluation_without_a_teacher_goes_on(rig):
    rig.teacher_reply = lambda payload: {"error": "?"}
    output = evaluation(rig, temperatures=(1.0,), tcod_eval_kl=True)
    assert output.data["t1"]["rewards"] == [1.0, 0.0]
    assert output.metrics["eval/tcod/t1/unscored/teacher_invalid"] == 2


def test_a_failed_evaluation_episode_is_counted_and_left_out_of_the_success_rate(rig):
    def reply(payload):
        failing = "Goal: door 9" in rig.tokenizer.decode(payload["input_ids"])
        return generated([], []) if failing else rig.student_reply(payload)

    rig.student.reply = reply
    output = evaluation(rig)
    assert output.metrics["eval/tcod/t0.4/failed/nothing_sampled"] == 1
    assert output.metrics["eval/tcod/t0.4/episodes"] == 1 and output.metrics["eval/tcod/t0.4/success"] == 1.0


def test_an_evaluation_kl_that_nothing_would_measure_stops_the_run(rig):
    with pytest.raises(ConfigError, match="tcod_eval_kl"):
        evaluation(rig, temperatures=(0.4,), tcod_eval_kl=True)


class SlowCorridor(Corridor):
    def step(self, action):
        time.sleep(0.3)
        return super().step(action)


def test_worker_processes_play_and_the_event_loop_goes_on_meanwhile(rig, ray_session, monkeypatch):
    monkeypatch.setattr(tcod_rollout, "EnvironmentPool", EnvironmentPool)
    args = rig.args([{"goal": 9}], tcod_environment="test_tcod_rollout.SlowCorridor")
    SingletonMeta._instances.clear()
    init_http_client(args)
    sample = Sample(index=0, metadata={"goal": 9, "tcod": {"n": 0, "k": 4}})

    async def play():
        episode = asyncio.ensure_future(tcod_rollout.generate(args, sample, {**UNTEMPERED, "max_new_tokens": 64}))
        ticks = 0
        while not episode.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    # Four steps of 0.3 s: a loop that waited for them would tick about once per request.
    assert run(play()) > 40
    assert sample.status == Sample.Status.COMPLETED and sample.metadata["tcod"]["env_s"] > 1.2


# ------------------------------------------------------------------------------------------- fully asynchronous


@pytest.fixture
def fully_async(rig, monkeypatch):
    """rollouts(rows, count, **changes) -> the outputs of rollouts 0, 1, .. by slime's fully asynchronous worker."""
    if not SLIME.startswith("slime at"):
        pytest.skip("slime's own code: run with SLIME_DIR=/path/to/slime")
    from slime.rollout import fully_async_rollout
    from slime.utils import http_utils

    monkeypatch.setattr(tcod_rollout, "_continuous_source", None)
    monkeypatch.setattr(http_utils, "_http_client", None)  # its connections belong to the event loop of another test

    def rollouts(rows, count, **changes):
        args = rig.args(rows, **changes)
        SingletonMeta._instances.clear()
        init_http_client(args)
        source = RolloutDataSourceWithBuffer(args)
        outputs = [tcod_rollout.generate_rollout_fully_async(args, n, source) for n in range(count)]
        for output in outputs:
            assert len(output.samples) == args.rollout_batch_size
            check_invariants(args, [sample for group in output.samples for sample in group])
        return outputs

    yield rollouts
    fully_async_rollout._stop_global_worker()


def test_fully_async_depth_is_that_of_the_draw(fully_async):
    rows = [{"goal": 9}] * 2
    outputs = fully_async(rows, 5, tcod_variant="f2b", tcod_eta=1, sglang_server_concurrency=2)
    stamps = []
    for n, output in enumerate(outputs):
        for [sample] in output.samples:
            record = sample.metadata["tcod"]
            assert record["n"] <= n and record["k"] == min(1 + record["n"], 4) == len(record["turns"])
            stamps.append(record["n"])
        assert output.metrics["rollout/tcod/k"] <= min(1 + n, 4)
    assert stamps[0] == 0 and max(stamps) >= 3


def test_fully_async_failed_groups_never_train(fully_async):
    rows = [{"goal": 2}, {"goal": 2, "explode": 1}, {"goal": 3}]
    outputs = fully_async(rows, 2, n_samples_per_prompt=2, sglang_server_concurrency=3)
    goals = [sample.metadata.get("explode") for output in outputs for group in output.samples for sample in group]
    assert goals == [None] * 12
    assert sum(output.metrics["rollout/tcod/failed/env_error"] for output in outputs) >= 2


def test_fully_async_aborted_groups_are_played_again_from_a_clean_sample(rig, fully_async):
    """The engine aborts one of two samples in its second turn; its finished sibling is undone as well."""
    aborted = []

    def reply(payload):
        text = rig.tokenizer.decode(payload["input_ids"])
        if text.count(HEADER) == 2 and not aborted:
            aborted.append(payload)
            return generated([], [], finish="abort")
        return rig.student_reply(payload)

    rig.student.reply = reply
    [output, _] = fully_async([{"goal": 2}], 2, n_samples_per_prompt=2, sglang_server_concurrency=1)
    [group] = output.samples
    assert aborted and [sample.index for sample in group] == [0, 1]
    assert all(len(sample.metadata["tcod"]["turns"]) == 2 and sample.reward == 1.0 for sample in group)


def test_fully_async_stale_groups_are_dropped_and_counted(fully_async):
    """slime draws six groups ahead for a batch of two."""
    outputs = fully_async([{"goal": 2}] * 2, 3, sglang_server_concurrency=6, tcod_max_staleness=0)
    drawn_at = [[sample.metadata["tcod"]["n"] for [sample] in output.samples] for output in outputs]
    assert drawn_at == [[0, 0], [1, 1], [2, 2]]
    stale = [output.metrics["rollout/tcod/stale"] for output in outputs]
    assert stale[0] == 0 and stale[1] >= 4 and stale[2] >= 4


def test_fully_async_stops_when_everything_fails(rig, fully_async):
    rig.teacher_reply = lambda payload: {"error": "?"}
    with pytest.raises(RuntimeError, match="failed groups were replaced.*teacher_invalid"):
        fully_async([{"goal": 2}] * 2, 1)


def test_fully_async_has_no_evaluation(rig):
    with pytest.raises(ConfigError, match="--eval-interval"):
        tcod_rollout.generate_rollout_fully_async(rig.args([{"goal": 2}]), 0, None, evaluation=True)
