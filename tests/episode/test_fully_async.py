"""slime's fully asynchronous mode: its worker draws ahead, and has no filter and no evaluation of its own."""

import pytest

from examples.tcod import tcod_rollout
from examples.tcod.config import ConfigError
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.http_utils import init_http_client
from slime.utils.misc import SingletonMeta
from smoke import hooks
from tests.support.fake_sglang import generated
from tests.support.rig import HEADER, check_invariants

NUM_GPUS = 0


@pytest.fixture
def fully_async(rig, monkeypatch):
    """rollouts(rows, count, **changes) -> the outputs of rollouts 0, 1, .. by slime's fully asynchronous worker."""
    if not hooks.find_slime().startswith("slime at"):
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
