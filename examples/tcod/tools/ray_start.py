"""Ray for the tools that play episodes: the cluster of RAY_ADDRESS, or one of this machine's own."""

import math
import os

from .. import ConfigError, words
from ..environments.pool import WORKER_CPUS


def start_ray(workers: int) -> None:
    """Connect to Ray, with room for this many environment workers. What starts here ends with this process.

    Raises:
        ConfigError: Ray does not start, or does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    options = {"logging_level": "error", "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        cpus = math.ceil(max(os.cpu_count() or 1, workers * WORKER_CPUS))
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(**options)
    except Exception as error:  # Ray gives itself 30 s to start
        raise ConfigError(f"Ray does not start ({words(error)}): see to RAY_ADDRESS, or try again") from error
