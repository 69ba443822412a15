"""A depth that follows the KL: through slime's rollout loop, its data source and its checkpoints."""

import pytest

from examples.tcod import ConfigError, tcod_rollout
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.http_utils import init_http_client
from slime.utils.misc import SingletonMeta
from tests.support.fake_sglang import scored
from tests.support.rig import LEFT

NUM_GPUS = 0
pytestmark = pytest.mark.usefixtures("local_pool")

SETTINGS = {"tcod_variant": "f2b", "tcod_schedule": "kl", "tcod_kl_weight": 1.0, "tcod_kl_max_rollouts": 3}
KEY = "rollout/tcod/depth"


def rollouts(rig, args, source, kls, first=0):
    """Metrics of a rollout for each of these KLs per token, in nats (below the student's own log-probs)."""
    metrics = []
    for n, kl in enumerate(kls, first):
        # A student's token of value -0.01 (i + 1); the teacher's is the mean of a reply's less the KL.
        rig.teacher_reply = lambda payload, kl=kl: scored(payload, lambda position, token: -0.12 - kl)
        metrics.append(tcod_rollout.generate_rollout(args, n, source).metrics)
    return metrics


@pytest.fixture
def run(rig, tmp_path):
    """(slime's arguments, its data source) of a run whose student never wins."""
    rig.script = [LEFT] * 20
    args = rig.args([{"goal": 9}] * 2, save=str(tmp_path), load=str(tmp_path), **SETTINGS)
    SingletonMeta._instances.clear()
    init_http_client(args)
    return args, RolloutDataSourceWithBuffer(args)


def test_depth_grows_when_the_kl_of_the_deepest_turns_has_halved(rig, run):
    args, source = run
    metrics = rollouts(rig, args, source, [1.0, 0.9, 0.9, 1.0, 0.3, 1.0, 0.8])
    assert [one["rollout/tcod/k"] for one in metrics] == [1, 1, 1, 2, 2, 3, 3]
    assert [one[f"{KEY}/next_k"] for one in metrics] == [1, 1, 2, 2, 3, 3, 3]
    assert [one[f"{KEY}/rollouts"] for one in metrics] == [1, 2, 0, 1, 0, 1, 2]
    assert metrics[1][f"{KEY}/kl_reached"] == pytest.approx(metrics[0][f"{KEY}/kl"])
    assert metrics[1][f"{KEY}/kl_average"] == pytest.approx(metrics[1][f"{KEY}/kl"])
    gaps = [metrics[0][f"{KEY}/kl"] - one[f"{KEY}/kl"] for one in metrics[:5]]
    assert gaps == pytest.approx([0, 0.1, 0.1, 0, 0.7])
    assert f"{KEY}/kl_average" not in metrics[2]  # the next depth has not been played yet


def test_the_state_is_saved_and_loaded_with_slimes_data_source(rig, run):
    args, source = run
    rollouts(rig, args, source, [1.0, 0.9])
    source.save(1)
    expected = rollouts(rig, args, source, [1.0, 1.0, 0.3], first=2)
    resumed = RolloutDataSourceWithBuffer(args)
    resumed.load(1)
    again = rollouts(rig, args, resumed, [1.0, 1.0, 0.3], first=2)
    for one, other in zip(expected, again, strict=True):
        assert {k: v for k, v in one.items() if k.startswith(KEY)} == {k: v for k, v in other.items() if KEY in k}
    assert resumed.get_metadata() == source.get_metadata()


def test_a_rollout_that_is_played_again_is_as_if_it_had_not_been(rig, run):
    """slime's train_async.py saves the data source after it has played the next rollout."""
    args, source = run
    [first, one] = rollouts(rig, args, source, [1.0, 0.1])
    [again] = rollouts(rig, args, source, [0.9], first=1)
    assert one["rollout/tcod/k"] == again["rollout/tcod/k"] == 1
    assert one[f"{KEY}/next_k"] == 2 and again[f"{KEY}/next_k"] == 1 and again[f"{KEY}/rollouts"] == 2
    assert again[f"{KEY}/kl_reached"] == pytest.approx(first[f"{KEY}/kl"])


def test_a_lost_state_stops_the_run(rig, run):
    args, source = run
    with pytest.raises(ConfigError, match="restore rollout/global_dataset_state_dict_4.pt"):
        tcod_rollout.generate_rollout(args, 5, source)


def test_another_data_source_is_refused(run):
    class Bare:
        def get_samples(self, num_samples):
            raise AssertionError("drawn")

    args, _ = run
    with pytest.raises(ConfigError, match="--data-source-path"):
        tcod_rollout.generate_rollout(args, 0, Bare())
