"""Ray for the tools that play episodes: the cluster of RAY_ADDRESS, or one of this machine's own."""

import math
import os
import socket

from ... import ConfigError, words
from ...environments.pool import WORKER_CPUS

ANSWER_S = 10.0  # Ray itself would ask for minutes
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # gRPC answers with its settings


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
    remedy = f"start it, or unset RAY_ADDRESS {address}" if address else "see ray/session_latest/logs in TMPDIR"
    try:
        if ":" in address:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as connection:
                connection.sendall(HELLO)
                connection.recv(1)  # a tunnel, or a head that hangs, takes connections too
        ray.init(**options)
    except Exception as error:  # Ray gives itself 30 s to start
        if "AF_UNIX" in str(error):
            remedy = "set TMPDIR to a folder with a short name, as /tmp, for Ray's sockets"
        elif isinstance(error, OSError) and error.filename:
            remedy = f"set TMPDIR, or HOME, so that {error.filename} can be written"
        raise ConfigError(f"Ray does not start or answer ({words(error)}): {remedy}") from error
