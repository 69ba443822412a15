"""SGLang's servers. They and the other processes of the smoke run are started and stopped as the recipe's are.

They run on the CPU, or with SMOKE_DEVICE=cuda on the one GPU that all of them share; see serve.py for what that needs.
"""

import os
import random
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import requests

from examples.tcod.tools.launch import processes
from smoke import hooks

__all__ = ["DEVICE", "HERE", "Process", "SGLangServer", "free_port", "wait_ready"]

HERE = Path(__file__).resolve().parent
DEVICE = os.environ.get("SMOKE_DEVICE", "cpu")
ENGINE_FLAGS = {
    "cpu": ["--attention-backend", "torch_native"],
    "cuda": [
        *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--mem-fraction-static", "0.6"),
        *("--cuda-graph-backend-prefill", "disabled", "--cuda-graph-max-bs-decode", "32"),
    ],
}
if DEVICE not in ENGINE_FLAGS:
    sys.exit(f"SMOKE_DEVICE must be {' or '.join(ENGINE_FLAGS)}, not {DEVICE}")


def free_port() -> int:
    """A free loopback port. SGLang also takes the one 10,000 above; the system lends those from 32,768 on.

    Below 20,000 are those of Ray's workers. Not from the global generator: two runs that have seeded it alike would
    choose alike, and one would talk to the other's server.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 22_700)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Process(processes.Process):
    """One that can be asked whether all is well."""

    def check(self) -> None:
        """Raise RuntimeError with the end of the log if the process has ended with an error."""
        if self.popen.poll():
            self.check_running()

    def check_running(self) -> None:
        """Raise RuntimeError with the end of the log if the process has ended at all."""
        if not self.running():
            raise RuntimeError(self.describe(f"ended with {self.popen.returncode}"))


class SGLangServer(Process):
    """A real SGLang server, on a free loopback port."""

    patience_s = 2.0  # it has nothing to save and would drain for 20 s

    def __init__(self, name: str, model: Path, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "smoke.serve", "--model-path", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", DEVICE, "--dtype", "float32"]
        command += [*ENGINE_FLAGS[DEVICE], "--max-total-tokens", "65536", "--log-level", "warning"]
        command += ["--max-running-requests", "64"]
        command += ["--sleep-on-idle"]  # an idle scheduler otherwise spins on a whole core
        # One thread each: two engines, the trainer and the environments share the cores.
        env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env["PYTHONPATH"] = hooks.python_path()
        super().__init__(name, command, log, env)

    def wait_ready(self, limit_s: float = 300.0) -> None:
        wait_ready(self, self.url, limit_s)


def wait_ready(server: Process, url: str, limit_s: float = 300.0) -> None:
    """Return once the server generates. Raises RuntimeError with the end of its log if it does not."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        server.check_running()
        with suppress(requests.RequestException):
            if requests.get(f"{url}/health_generate", timeout=30).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(server.describe(f"was not ready after {limit_s:.0f} s"))
