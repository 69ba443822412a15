"""tcod_history turns: every turn is a sample, and slime's rollout, filter, metrics and records are per episode."""

import copy

import pytest

from slime.utils.types import Sample
from smoke import hooks
from tests.episode.test_evaluation import evaluation
from tests.episode.test_fully_async import fully_async  # noqa: F401  a fixture
from tests.episode.test_saved_episodes import folder, saved  # noqa: F401  a fixture
from tests.support.fake_sglang import scored
from tests.support.rig import LEFT, RIGHT, check_invariants, student_value, teacher_value

DEMO = {"actions": ["right"] * 3}
THOUGHT = "<think>\nwhere is it\n</think>\n\n"


def test_every_turn_is_a_sample_of_what_was_shown_and_said(rig):
    samples, metrics = rig.rollout([{"goal": 3}, {"goal": 1}], tcod_history="turns")
    assert [sample.rollout_id for sample in samples] == [0, 0, 0, 1] == [sample.index for sample in samples]
    assert [[len(episode) for episode in group] for group in rig.groups] == [[3], [1]]
    if hooks.find_slime().startswith("slime at"):
        from slime.observability.rollout_data_utils import validate_rollout_id_annotated

        validate_rollout_id_annotated(rig.groups)
    asked = sorted(payload["input_ids"] for payload in rig.student.payloads())
    assert sorted(sample.tokens[: -sample.response_length] for sample in samples) == asked
    for sample in samples:
        assert sample.tokens[-sample.response_length :] == rig.tokenizer.encode(RIGHT + "<|im_end|>")
        assert sample.response == RIGHT + "<|im_end|>" and set(sample.loss_mask) == {1}
        assert sample.teacher_log_probs[0] == teacher_value(len(sample.tokens) - sample.response_length, 0)
        assert sample.reward == 1.0 and sample.status == Sample.Status.COMPLETED
    assert [sample.metadata["tcod"]["turns"][0]["turn"] for sample in samples] == [0, 1, 2, 0]
    assert metrics["rollout/tcod/samples"] == 4
    assert metrics["rollout/tcod/tokens/total"] == sum(len(sample.tokens) for sample in samples)
    assert metrics["rollout/tcod/tokens/scored"] == metrics["rollout/tcod/tokens/trained"]
    assert metrics["rollout/tcod/tokens/trained"] == sum(sample.response_length for sample in samples)


def test_metrics_and_records_are_those_of_whole_episodes(rig, folder):  # noqa: F811
    rows = [{"goal": 3, "demo": DEMO}, {"goal": 2, "demo": {"actions": ["right"] * 2}}]
    changes = {"tcod_variant": "b2f", "tcod_k_start": 2}
    rig.script = [RIGHT, "hm", RIGHT, RIGHT]
    rig.teacher_reply = lambda payload: scored(payload, lambda position, token: -0.5)  # wherever the token stands
    _, append = rig.rollout(rows, **changes)
    [appended] = [one for one in saved(folder, "train_000000") if one.replayed]
    samples, turns = rig.rollout(rows, **changes, tcod_history="turns")
    [line] = [one for one in saved(folder, "train_000000") if one.replayed]
    different = ("tokens/scored", "tokens/total", "rollout/tcod/samples", "_s", "_share")
    same = {name for name in append if not name.endswith(different)}
    assert {name: turns[name] for name in same} == {name: pytest.approx(append[name]) for name in same}
    assert turns["rollout/tcod/turns/replayed"] == 0.5 and len(samples) > 4
    given = {"context", "context_tokens"}
    played = [turn for turn in line.turns if turn.role == "student"]
    for turn, other in zip(played, appended.turns[-len(played) :], strict=True):
        assert {**vars(turn), **dict.fromkeys(given)} == {**vars(other), **dict.fromkeys(given)}
    assert line.kl == appended.kl and line.turns[0].response == RIGHT and not hasattr(line.turns[0], "context")
    assert all(turn.context[0].startswith("<|im_start|>system") for turn in line.turns[1:])
    assert samples[0].metadata["tcod"]["replayed"] == 1


def test_an_action_within_a_thought_that_was_cut_is_none(rig):
    rig.script, rig.cut = ["<think>\nI could " + RIGHT, THOUGHT + RIGHT, RIGHT], {0}
    for history in ("append", "turns"):
        samples, metrics = rig.rollout(
            [{"goal": 2}], tcod_history=history, tcod_thoughts="keep", apply_chat_template_kwargs={}
        )
        assert metrics["rollout/tcod/invalid_actions"] == pytest.approx(1 / 3)
        assert metrics["rollout/tcod/truncated_turns"] == pytest.approx(1 / 3)
        assert metrics["rollout/tcod/success"] == 1.0


def test_a_cut_turn_is_a_truncated_sample_and_statistics_count_once(rig):
    rig.script, rig.cut = ["hm", RIGHT, RIGHT], {0}
    samples, _ = rig.rollout([{"goal": 2}], tcod_history="turns")
    truncated, completed = Sample.Status.TRUNCATED, Sample.Status.COMPLETED
    assert [sample.status for sample in samples] == [truncated, completed, completed]
    asked = [len(payload["input_ids"]) for payload in rig.student.payloads()]
    assert [sample.prefix_cache_info.total_prompt_tokens for sample in samples] == asked
    # The teacher scores turn after turn, on one server.
    assert [payload["input_ids"] for payload in rig.scoring_requests()] == [sample.tokens for sample in samples]
    assert len({r.headers["x-smg-routing-key"] for r in rig.teacher.requests if "input_ids" in r.payload}) == 1
    assert [bool(sample.non_generation_time) for sample in samples][1:] == [False, False]
    samples, _ = rig.rollout([{"goal": 9}], tcod_history="turns", rollout_max_context_len=225)
    assert [sample.status for sample in samples][1:] == [completed, truncated]  # the context ended the episode


def test_an_evaluation_has_one_sample_an_episode(rig):
    output = evaluation(rig, temperatures=(1.0,), tcod_eval_kl=True, tcod_history="turns")
    assert output.data["t1"]["rewards"] == [1.0, 0.0] and len(output.data["t1"]["samples"]) == 2
    assert output.metrics["eval/tcod/t1/kl/episodes"] == 2
    assert len(rig.scoring_requests()) == 2 + 4


def test_a_turn_that_cannot_be_scored_fails_its_episode_and_drops_its_group(rig):
    def reply(payload):
        door = f"You are at door {failing[0]}." in rig.tokenizer.decode(payload["input_ids"])
        if door and "Goal: door 3" in rig.tokenizer.decode(payload["input_ids"]) and failing.pop():
            return {"error": "?"}
        return scored(payload, teacher_value)

    failing = [2]  # the third turn of the first episode of goal 3
    rig.teacher_reply = lambda payload: reply(payload) if failing else scored(payload, teacher_value)
    samples, metrics = rig.rollout([{"goal": 3}, {"goal": 2}], n_samples_per_prompt=2, tcod_history="turns")
    assert metrics["rollout/tcod/failed/teacher_invalid"] == 1
    assert len({sample.rollout_id for sample in samples}) == 4
    by_episode = {i: [s for s in samples if s.rollout_id == i] for i in {s.rollout_id for s in samples}}
    for episode in by_episode.values():
        assert [s.metadata["tcod"]["turns"][0]["turn"] for s in episode] == list(range(len(episode)))
        assert len({s.group_index for s in episode}) == 1


def test_slime_weighs_an_episode_once(rig):
    rig.script = [LEFT, "a longer way of saying nothing", RIGHT, RIGHT]
    rows = [{"goal": 1}, {"goal": 2}, {"goal": 9}]
    samples, _ = rig.rollout(rows, tcod_history="turns")
    args = rig.args(rows, tcod_history="turns")
    batch = hooks.convert_samples_to_train_data(args, copy.deepcopy(samples))
    for rollout_id in set(batch["rollout_ids"]):
        rows = [i for i, other in enumerate(batch["rollout_ids"]) if other == rollout_id]
        trained = sum(sum(batch["loss_masks"][i]) for i in rows)
        assert {batch["rollout_mask_sums"][i] for i in rows} == {trained}
        assert sum(sum(batch["loss_masks"][i]) / batch["rollout_mask_sums"][i] for i in rows) == pytest.approx(1)
    check_invariants(args, samples)
    assert [student_value(0)] * len(samples) == [sample.rollout_log_probs[0] for sample in samples]
