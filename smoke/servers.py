"""Processes of the smoke run: started together, stopped together, with their logs in files."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import requests

from smoke import hooks

HERE = Path(__file__).resolve().parent


def free_port() -> int:
    """A free loopback port, below the ones that the system lends to connections; SGLang adds 10,000 to it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def tail(path: Path, lines: int = 25) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


class Process:
    """A child in a process group of its own, so that stopping it reaches all that it started."""

    patience_s = 20.0  # between SIGTERM and SIGKILL

    def __init__(self, name: str, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raise RuntimeError with the end of the log if the process has ended with an error."""
        if self.popen.poll() not in (None, 0):
            raise RuntimeError(self.describe(f"ended with {self.popen.returncode}"))

    def check_running(self) -> None:
        """Raise RuntimeError with the end of the log if the process has ended at all."""
        if self.popen.poll() is not None:
            raise RuntimeError(self.describe(f"ended with {self.popen.returncode}"))

    def describe(self, what: str) -> str:
        return f"{self.name} {what}; {self.log} ends:\n{tail(self.log)}"

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(self.patience_s)
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


class SGLangServer(Process):
    """A real SGLang server on the CPU, on a free loopback port."""

    patience_s = 2.0  # it has nothing to save and would drain for 20 s

    def __init__(self, name: str, model: Path, log: Path, max_running_requests: int = 64) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "smoke.serve", "--model-path", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--dtype", "float32"]
        command += ["--attention-backend", "torch_native", "--max-total-tokens", "65536", "--log-level", "warning"]
        command += ["--max-running-requests", str(max_running_requests)]
        command += ["--sleep-on-idle"]  # an idle scheduler otherwise spins on a whole core
        # One thread each: two engines, the trainer and the environments share the cores.
        env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env["PYTHONPATH"] = hooks.python_path()
        super().__init__(name, command, log, env)

    def wait_ready(self, limit_s: float = 300.0) -> None:
        """Return once the server generates. Raises RuntimeError with the end of its log if it does not."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            self.check_running()
            with suppress(requests.RequestException):
                if requests.get(f"{self.url}/health_generate", timeout=30).status_code == 200:
                    return
            time.sleep(0.5)
        raise RuntimeError(self.describe(f"was not ready after {limit_s:.0f} s"))
