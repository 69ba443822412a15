"""Ray for the tools that play episodes: the cluster of RAY_ADDRESS, or one of this machine's own."""

import math
import os

from ..environment_pool import WORKER_CPUS


def start_ray(workers: int) -> None:
    """Connect to Ray, with room for this many environment workers. What starts here ends with this process."""
    import ray

    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level="error", log_to_driver=False)
    else:
        cpus = math.ceil(max(os.cpu_count() or 1, workers * WORKER_CPUS))
        ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="error", log_to_driver=False)
