"""Evaluations: the full horizon, no curriculum, and a KL only where it is defined."""

import pytest

from examples.tcod import tcod_rollout
from examples.tcod.errors import ConfigError
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.http_utils import init_http_client
from slime.utils.misc import SingletonMeta
from tests.support.fake_sglang import generated

NUM_GPUS = 0


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
