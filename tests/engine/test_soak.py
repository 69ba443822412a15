"""The soak test in its short form; `python -m tests.soak --episodes 2000` is the long one."""

import pytest
import ray

from tests.support import soak

NUM_GPUS = 0


@pytest.fixture(scope="module", autouse=True)
def ray_session():
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def test_no_episode_is_lost_or_counted_twice(tmp_path):
    figures = soak.soak(100, tmp_path)  # asserts the accounting
    assert figures["episodes"] >= 100 and figures["outcomes"]["trained"] == figures["rollouts"] * soak.BATCH
    assert figures["worker processes at the end"] <= soak.WORKERS
    for name in ("file descriptors", "threads"):
        warm, end = figures[f"{name}, warm and at the end"]
        assert end - warm < 20
    warm, end = figures["memory in MB, warm and at the end"]
    assert end - warm < 50
