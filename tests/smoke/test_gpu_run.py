"""The run on one GPU (tests/gpu), as far as it goes without one: what it reads of slime's log."""

from tests.gpu import engines, steps

LOG = """\
(Actor pid=1) timer.py:32 - Timer sleep end (elapsed: 0.5s)
(Actor pid=1) timer.py:32 - Timer update_weights end (elapsed: 2.9s)
(Actor pid=1) [Rank 0] Memory-Usage before wake_up model: {'gpu': '0', 'used_GB': 9.5, 'allocated_GB': 1.25}
(Actor pid=1) Memory-Usage before wake_up model (cleared before print): {'used_GB': 8.5, 'allocated_GB': 1.0}
(Actor pid=1) timer.py:32 - Timer sleep end (elapsed: 0.7s)
"""


def test_seconds_and_memory_of_slimes_log():
    assert steps.timers(LOG) == {"sleep": [0.5, 0.7], "update_weights": [2.9]}
    assert steps.memory(LOG) == {"before wake_up model": [1.0, 8.5]}  # the last one


def test_two_lists_of_log_probs():
    assert engines.differences([-1.0, -2.0], [-1.5, -1.0]) == {"mean": -0.25, "mean_abs": 0.75, "max_abs": 1.0}
