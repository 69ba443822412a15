"""slime's fully asynchronous mode: its worker draws ahead, and has no filter and no evaluation of its own."""

import asyncio
from collections import Counter

import pytest

from examples.tcod import ConfigError, tcod_rollout
from examples.tcod.settings import build
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.http_utils import init_http_client
from slime.utils.misc import SingletonMeta
from smoke import hooks
from tests.support.fake_sglang import generated
from tests.support.rig import HEADER, LEFT, RIGHT, check_invariants

NUM_GPUS = 0


@pytest.fixture
def fully_async(rig, monkeypatch):
    """rollouts(rows, count, **changes) -> the outputs of rollouts 0, 1, .. by slime's fully asynchronous worker."""
    if not hooks.find_slime().startswith("slime at"):
        pytest.skip("slime's own code: run with SLIME_DIR=/path/to/slime")
    from slime.rollout.fully_async_rollout import _stop_global_worker
    from slime.utils import http_utils

    monkeypatch.setattr(build, "_drawing", None)
    monkeypatch.setattr(http_utils, "_http_client", None)  # its connections belong to the event loop of another test

    def rollouts(rows, count, **changes):
        args = rig.args(rows, **changes)
        SingletonMeta._instances.clear()
        init_http_client(args)
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


def test_fully_async_groups_of_equals_never_train_without_a_teacher(rig, fully_async):
    alone = {"use_opd": False, "opd_type": None, "rm_url": None, "tcod_reward_coef": 1.0, "n_samples_per_prompt": 2}
    begun = Counter()

    def reply(payload):
        text = rig.tokenizer.decode(payload["input_ids"])
        if text.count(HEADER) == 1:
            begun[text] += 1
            return rig.answer(begun[text] % 2, payload)
        return rig.answer(0 if RIGHT in text else 1, payload)

    rig.script, rig.student.reply = [RIGHT, LEFT], reply
    outputs = fully_async([{"goal": 1}, {"goal": 9}], 3, sglang_server_concurrency=2, **alone)
    samples = [sample for output in outputs for group in output.samples for sample in group]
    assert {sample.metadata["goal"] for sample in samples} == {1} and len(samples) == 12
    assert sum(output.metrics.get("rollout/tcod/no_signal", 0) for output in outputs) >= 4
    assert sum(output.metrics["rollout/tcod/failed"] for output in outputs) == 0


def test_fully_async_a_weight_push_costs_no_episode(rig, fully_async):
    """Every request of every second turn is aborted once: all episodes are trained, whatever their length."""
    aborted = set()

    def reply(payload):
        seen = tuple(payload["input_ids"])
        if rig.tokenizer.decode(seen).count(HEADER) % 2 == 0 and seen not in aborted:
            aborted.add(seen)
            return generated([1], [-0.5], finish="abort")
        return rig.student_reply(payload)

    rig.student.reply = reply
    rows = [{"goal": goal} for goal in (1, 2, 3, 4)]
    [output, _] = fully_async(rows, 2, sglang_server_concurrency=4)
    played = {sample.metadata["goal"]: sample.metadata["tcod"]["turns"] for [sample] in output.samples}
    assert aborted and {goal: len(turns) for goal, turns in played.items()} == {1: 1, 2: 2, 3: 3, 4: 4}
    assert all(turn["weight_version"] == "default" for turns in played.values() for turn in turns)
    assert output.metrics["rollout/tcod/aborted"] == output.metrics["rollout/tcod/failed"] == 0


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


def test_fully_async_waits_for_the_oldest_episodes(rig, fully_async):
    """One task in four takes seconds and the others a moment: batches of these alone would leave it behind."""

    async def reply(payload):
        if "Goal: door 8" in rig.tokenizer.decode(payload["input_ids"]):
            await asyncio.sleep(0.25)
        return rig.student_reply(payload)

    rig.student.reply = reply
    rows = [{"goal": goal} for goal in (1, 1, 1, 8)]
    changes = {"tcod_horizon": 8, "sglang_server_concurrency": 8, "rollout_max_context_len": 4000}
    outputs = fully_async(rows, 5, tcod_max_staleness=1, **changes)
    ages = [n - sample.metadata["tcod"]["n"] for n, output in enumerate(outputs) for [sample] in output.samples]
    assert max(ages) == 1
    assert all(output.metrics["rollout/tcod/stale"] == 0 for output in outputs)


def test_fully_async_trains_long_episodes_as_often_as_they_are_drawn(rig, fully_async):
    """One task in four takes four times as long as the others, and nothing is dropped for its age."""

    async def reply(payload):
        await asyncio.sleep(0.05)
        return rig.student_reply(payload)

    rig.student.reply = reply
    rows = [{"goal": goal} for goal in (1, 1, 1, 8)]
    changes = {"tcod_horizon": 8, "sglang_server_concurrency": 8, "rollout_max_context_len": 4000}
    outputs = fully_async(rows, 6, **changes)
    goals = [sample.metadata["goal"] for output in outputs for [sample] in output.samples]
    assert 5 <= goals.count(8) <= 6 + 2  # of 24; a few long ones may still be played
    assert all(output.metrics["rollout/tcod/failed"] == 0 for output in outputs)


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
