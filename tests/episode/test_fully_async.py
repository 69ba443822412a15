"""slime's fully asynchronous mode: its worker draws ahead, and has no filter and no evaluation of its own."""

import asyncio
from collections import Counter

import pytest

from examples.tcod import ConfigError, tcod_rollout
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from smoke import hooks
from tests.support.rig import check_invariants


@pytest.fixture
def fully_async(rig, monkeypatch):
    """rollouts(rows, count, **changes) -> the outputs of rollouts 0, 1, .. by slime's fully asynchronous worker."""
    if not hooks.find_slime().startswith("slime at"):
        pytest.skip("slime's own code: run with SLIME_DIR=/path/to/slime")
    from slime.rollout.fully_async_rollout import _stop_global_worker
    from slime.utils import http_utils

    monkeypatch.setattr(http_utils, "_http_client", None)  # its connections belong to the event loop of another test

    def rollouts(rows, count, **changes):
        args = rig.args(rows, **changes)
        source = RolloutDataSourceWithBuffer(args)
        outputs = [tcod_rollout.generate_rollout_fully_async(args, n, source) for n in range(count)]
        for output in outputs:
            assert len(output.samples) == args.rollout_batch_size
            check_invariants(args, hooks.flat(output.samples))
        return outputs

    yield rollouts
    _stop_global_worker()


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


def test_fully_async_depth_is_that_of_each_rows_environment(fully_async):
    rows = [{"goal": 9, "environment": name} for name in ("long", "short")]
    entries = {"long": {"tcod_horizon": 4}, "short": {"tcod_horizon": 2}}
    changes = {"tcod_variant": "f2b", "tcod_eta": 1, "tcod_environments": entries, "sglang_server_concurrency": 2}
    for output in fully_async(rows, 5, **changes):
        for [sample] in output.samples:
            record = sample.metadata["tcod"]
            assert record["environment"] == sample.metadata["environment"]
            assert record["k"] == min(1 + record["n"], entries[record["environment"]]["tcod_horizon"])
            assert record["k"] == len(record["turns"])


def test_fully_async_failed_groups_never_train(fully_async):
    rows = [{"goal": 2}, {"goal": 2, "explode": 1}, {"goal": 3}]
    outputs = fully_async(rows, 2, n_samples_per_prompt=2, sglang_server_concurrency=3)
    goals = [sample.metadata.get("explode") for output in outputs for group in output.samples for sample in group]
    assert goals == [None] * 12
    assert sum(output.metrics["rollout/tcod/failed/env_error"] for output in outputs) >= 2


def test_fully_async_trains_every_episode_that_is_played(rig, fully_async):
    """With about a batch at once, long episodes are trained later than short ones, and as often."""

    async def reply(payload):
        await asyncio.sleep(0.4)
        return rig.student_reply(payload)

    rig.student.reply = reply
    outputs = fully_async([{"goal": goal} for goal in (1, 2, 3, 4)], 8, sglang_server_concurrency=4)
    samples = [sample for output in outputs for [sample] in output.samples]
    assert sum(output.metrics[f"rollout/tcod/{lost}"] for output in outputs for lost in ("stale", "failed")) == 0
    trained = {sample.index for sample in samples}
    assert len(trained) == len(samples) == 32
    # What was drawn and not trained is still played, or waits for the next rollout.
    missing = set(range(max(trained))) - trained
    assert len(missing) <= 4 and min(missing, default=max(trained)) > max(trained) - 8
    turns = Counter(len(sample.metadata["tcod"]["turns"]) for sample in samples)
    assert all(abs(turns[goal] - 8) <= 2 for goal in (1, 2, 3, 4)), turns


@pytest.mark.parametrize("most", [0, 1])
def test_fully_async_draws_no_further_ahead_than_the_staleness_allows(fully_async, most):
    """slime would draw six groups ahead of a batch of two."""
    outputs = fully_async([{"goal": 2}] * 2, 4, sglang_server_concurrency=6, tcod_max_staleness=most)
    ages = [n - sample.metadata["tcod"]["n"] for n, output in enumerate(outputs) for [sample] in output.samples]
    assert min(ages) == 0 and max(ages) == most
    assert all(output.metrics["rollout/tcod/stale"] == 0 for output in outputs)


def test_fully_async_stops_when_everything_fails(rig, fully_async):
    rig.teacher_reply = lambda payload: {"error": "?"}
    with pytest.raises(RuntimeError, match="groups were replaced.*teacher_invalid"):
        fully_async([{"goal": 2}] * 2, 1)


async def broken(args, sample, **kwargs):
    raise RuntimeError("a hook of the user's")


async def cancelled(args, sample, **kwargs):
    raise asyncio.CancelledError


@pytest.mark.parametrize("hook, says", [(broken, "a hook of the user's"), (cancelled, "its thread has ended")])
def test_fully_async_notices_a_group_that_slimes_worker_lost(fully_async, hook, says):
    with pytest.raises(RuntimeError, match=f"has lost episodes.*{says}"):
        fully_async([{"goal": 2}] * 2, 1, rollout_sample_hook_path=[f"{__name__}.{hook.__name__}"])


def test_fully_async_notices_a_source_that_fails(fully_async, monkeypatch):
    def fail(self, num_samples):
        raise OSError("the disk of the data is gone")

    monkeypatch.setattr(RolloutDataSourceWithBuffer, "get_samples", fail)
    with pytest.raises(RuntimeError, match="has lost episodes.*the disk of the data is gone"):
        fully_async([{"goal": 2}] * 2, 1)


def test_fully_async_has_no_evaluation(rig):
    with pytest.raises(ConfigError, match="--eval-interval"):
        tcod_rollout.generate_rollout_fully_async(rig.args([{"goal": 2}]), 0, None, evaluation=True)
