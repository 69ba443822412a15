"""Evaluations: the full horizon, no curriculum, and a KL only where it is defined."""

import copy
from collections import Counter

import pytest

from examples.tcod import tcod_rollout
from examples.tcod.episode.episode import Episode, EpisodeRecord
from examples.tcod.model.student import is_untempered
from examples.tcod.records.metrics import _repeats
from examples.tcod.tools.compare_evals import summarise
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.types import Sample
from tests.support.fake_sglang import generated, scored
from tests.support.rig import HEADER, LEFT, RIGHT, teacher_value


async def answer(args, sample, sampling_params):
    """Another recipe's generate function."""
    sample.tokens, sample.response, sample.response_length = [1, 2], "4", 1
    sample.status = Sample.Status.COMPLETED
    return sample


async def answers(args, sample, sampling_params):
    return [await answer(args, copy.copy(sample), sampling_params) for _ in range(2)]


async def grade(args, sample, **kwargs):
    """Another recipe's reward function."""
    return 0.25


def evaluation(rig, temperatures=(0.4,), rows=({"goal": 2}, {"goal": 9}), hooks=None, train=None, **changes):
    """One data set for each temperature; with `hooks` one more, named "other", that has them."""
    path = str(rig.rows(rows, "heldout"))
    names = {f"t{temperature:g}": (temperature, {}) for temperature in temperatures}
    names |= {"other": (0.4, hooks)} if hooks else {}
    datasets = [
        EvalDatasetConfig(
            name=name,
            path=path,
            input_key="prompt",
            label_key="label",
            metadata_key="metadata",
            n_samples_per_eval_prompt=changes.get("n_samples_per_eval_prompt", 1),
            temperature=temperature,
            top_p=1.0,
            top_k=-1,
            max_response_len=64,
            **own,
        )
        for name, (temperature, own) in names.items()
    ]
    args = rig.args(train or [{"goal": 2}, {"goal": 9}], eval_datasets=datasets, **changes)
    return tcod_rollout.generate_rollout(args, 0, RolloutDataSourceWithBuffer(args), evaluation=True)


def test_evaluation_plays_the_full_horizon_without_teacher_and_demonstrations(rig):
    output = evaluation(rig, rows=[{"goal": 2, "demo": "none"}, {"goal": 9}], tcod_variant="f2b")
    assert output.data["t0.4"]["rewards"] == [1.0, 0.0]
    assert output.metrics["eval/tcod/t0.4/success"] == 0.5 and output.metrics["eval/tcod/t0.4/episodes"] == 2
    assert output.metrics["eval/tcod/t0.4/turns/student"] == 3.0
    assert rig.scoring_requests() == []
    assert {payload["sampling_params"]["temperature"] for payload in rig.student.payloads()} == {0.4}


def test_repeats_in_training_have_the_numbers_of_evaluate(rig):
    """The second of three plays of a task goes astray at first: within three turns, goal 2 is then lost."""
    begun = Counter()

    def reply(payload):
        text = rig.tokenizer.decode(payload["input_ids"])
        begun[text] += text.count(HEADER) == 1
        return rig.answer(int(text.count(HEADER) == 1 and begun[text] == 2), payload)

    rig.script, rig.student.reply = [RIGHT, LEFT], reply
    more = {"n_samples_per_eval_prompt": 3, "tcod_environment": "tests.support.corridor.GradedCorridor"}
    output = evaluation(rig, rows=({"goal": 2}, {"goal": 1}), tcod_horizon=3, sglang_server_concurrency=1, **more)
    metrics = {name.removeprefix("eval/tcod/t0.4/"): value for name, value in output.metrics.items()}
    plays = [(goal, n, goal == 1 or n != 1) for goal in (2, 1) for n in range(3)]
    turns = {(2, True): 2, (2, False): 3, (1, True): 1}
    episodes = [
        {"task": {"goal": goal}, "attempt": n, "won": won, "task_type": "walk", "score": 1.0 if won else 0.5}
        | {"turns": 3 if (goal, n) == (1, 1) else turns[goal, won]}
        for goal, n, won in plays
    ]
    expected = summarise(episodes)["all"]
    for name in ("success", "success_sd", "pass_at_k", "repeats", "turns_won", "turns_lost", "score"):
        assert metrics[name] == metrics[f"{name}_by_type/walk"] == pytest.approx(expected[name]), name
    assert metrics["success_sd"] == pytest.approx(0.5 / 3**0.5) and metrics["pass_at_k"] == 1


def test_the_evaluation_kl_is_measured_where_it_is_defined(rig):
    output = evaluation(rig, temperatures=(0.4, 1.0), tcod_eval_kl=True)
    assert len(rig.scoring_requests()) == 2
    assert output.metrics["eval/tcod/t1/kl/episodes"] == 2
    assert "eval/tcod/t0.4/kl/episodes" not in output.metrics
    assert output.data["t1"]["rewards"] == [1.0, 0.0]
    others = {"temperature": 0.4, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "min_new_tokens": 2}
    assert not any(is_untempered({name: value}) for name, value in others.items())


def test_an_evaluation_without_a_teacher_goes_on(rig):
    rig.teacher_reply = lambda payload: {"error": "?"}
    output = evaluation(rig, temperatures=(1.0,), tcod_eval_kl=True)
    assert output.data["t1"]["rewards"] == [1.0, 0.0]
    assert output.metrics["eval/tcod/t1/unscored/teacher_invalid"] == 2


def test_the_evaluation_kl_is_that_of_the_scored_episodes(rig):
    rig.teacher_reply = lambda payload: {} if len(payload["input_ids"]) > 250 else scored(payload, teacher_value)
    metrics = evaluation(rig, temperatures=(1.0,), tcod_eval_kl=True).metrics
    sampled = 2 * len(rig.tokenizer.encode(RIGHT + "<|im_end|>"))  # of the episode with goal 2
    assert metrics["eval/tcod/t1/kl/trajectory"] == pytest.approx(sampled * metrics["eval/tcod/t1/kl/token"])


def test_a_failed_play_keeps_its_number():
    records = [EpisodeRecord(failure=failure) for failure in (None, "env_error", None)]
    samples = [Sample(index=i, metadata={"tcod": Episode(record)}) for i, record in enumerate(records)]
    assert [play["repeat"] for play in _repeats(samples)] == [0, 2]


def test_a_failed_evaluation_episode_is_counted_and_left_out_of_the_success_rate(rig):
    def reply(payload):
        failing = "Goal: door 9" in rig.tokenizer.decode(payload["input_ids"])
        return generated([], []) if failing else rig.student_reply(payload)

    rig.student.reply = reply
    output = evaluation(rig)
    assert output.metrics["eval/tcod/t0.4/failed/nothing_sampled"] == 1
    assert output.metrics["eval/tcod/t0.4/episodes"] == 1 and output.metrics["eval/tcod/t0.4/success"] == 1.0


@pytest.mark.parametrize("training, evaluated, limited", [(2000, 250, 0.5), (250, 2000, 0.0), (250, None, 0.5)])
def test_an_evaluation_has_a_context_of_its_own(rig, training, evaluated, limited):
    """Four turns take about 360 tokens, two about 190."""
    output = evaluation(rig, rollout_max_context_len=training, eval_max_context_len=evaluated)
    assert output.metrics["eval/tcod/t0.4/context_limited"] == limited
    _, metrics = rig.rollout([{"goal": 9}], rollout_max_context_len=training, eval_max_context_len=evaluated)
    assert metrics["rollout/tcod/context_limited"] == (training == 250)


@pytest.mark.parametrize("generate", [answer, answers])
def test_a_data_set_with_other_hooks_passes_through(rig, tmp_path, monkeypatch, generate):
    monkeypatch.setenv("TCOD_RUN_DIR", str(tmp_path / "run"))
    hooks = {"custom_generate_function_path": f"{__name__}.{generate.__name__}", "custom_rm_path": f"{__name__}.grade"}
    output = evaluation(rig, hooks=hooks)
    assert output.data["other"]["rewards"] == [0.25] * (2 if generate is answer else 4)
    assert output.metrics["eval/tcod/t0.4/episodes"] == 2
    ours = {name: value for name, value in output.metrics.items() if name.startswith("eval/tcod/other/")}
    assert ours == {"eval/tcod/other/unsaved_episodes": 0}


def test_a_data_set_with_a_reward_function_of_its_own_is_asked(rig):
    output = evaluation(rig, hooks={"custom_rm_path": f"{__name__}.grade"})
    assert output.data["other"]["rewards"] == [0.25, 0.25] and output.data["t0.4"]["rewards"] == [1.0, 0.0]
    assert output.metrics["eval/tcod/other/success"] == 0.5
    sample = output.data["other"]["samples"][0]
    assert sample.response_length == len(sample.loss_mask) > 0  # such a function may look at the tokens
