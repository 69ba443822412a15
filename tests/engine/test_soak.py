"""The soak test in its short form; `python -m tests.soak --episodes 2000` is the long one."""

import pytest

from tests.support import soak

NUM_GPUS = 0


@pytest.mark.slow
def test_no_episode_is_lost_or_counted_twice(tmp_path, real_ray):
    figures = soak.soak(100, tmp_path)  # asserts the accounting
    assert figures["episodes"] >= 100 and figures["outcomes"]["trained"] == figures["rollouts"] * soak.BATCH
    assert figures["worker processes at the end"] <= soak.WORKERS
    for name, spare in {"files": 20, "threads": 20, "memory_mb": 50}.items():
        warm, end = figures[f"{name}, warm and at the end"]
        assert end - warm < spare
