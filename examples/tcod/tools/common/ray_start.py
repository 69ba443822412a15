"""Ray for the tools that play episodes: the cluster of RAY_ADDRESS, or one of this machine's own."""

import math
import os
import socket

from ... import ConfigError, words
from ...environments.pool import WORKER_CPUS

ANSWER_S = 10.0  # Ray itself would ask for minutes


def start_ray(workers: int) -> None:
    """Connect to Ray, with room for this many environment workers. What starts here ends with this process.

    Raises:
        ConfigError: Ray does not start, or does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    options = {"logging_level": "error", "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        cpus = math.ceil(max(os.cpu_count() or 1, workers * WORKER_CPUS))
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    try:
        if ":" in address:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
        ray.init(**options)
    except Exception as error:  # Ray gives itself 30 s to start
        own = "see ray/session_latest/logs in TMPDIR, a folder of a short name that can be written"
        remedy = f"start it, or unset RAY_ADDRESS {address}" if address else own
        raise ConfigError(f"Ray does not start or answer ({words(error)}): {remedy}") from error
