"""Processes that are ended with all that they started, and nobody else's. Linux only."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
KILL_AFTER_S = 3.0  # between SIGTERM and SIGKILL, for what a process leaves behind
_prctl = ctypes.CDLL(None).prctl  # found here: nothing should be imported between fork and exec


def tail(path: Path, lines: int = 25) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


class Process:
    """A child that leads a session of its own, so that stopping it reaches all that it started.

    Its output goes to `log`; without one it goes where this process's does. `env` adds to this process's variables.
    """

    patience_s = 15.0  # to end by itself after SIGTERM

    def __init__(
        self, name: str, command: list[str], log: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        self.name, self.log = name, log
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") if log else nullcontext() as output:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if log else None,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def running(self) -> bool:
        return self.popen.poll() is None

    def check(self) -> None:
        """Raise RuntimeError with the end of the log if the process has ended with an error."""
        if self.popen.poll() not in (None, 0):
            raise RuntimeError(self.describe(f"ended with {self.popen.returncode}"))

    def check_running(self) -> None:
        """Raise RuntimeError with the end of the log if the process has ended at all."""
        if not self.running():
            raise RuntimeError(self.describe(f"ended with {self.popen.returncode}"))

    def describe(self, what: str) -> str:
        return f"{self.name} {what}; {self.log} ends:\n{tail(self.log)}" if self.log else f"{self.name} {what}"

    def stop(self) -> None:
        stop([self])


def stop(processes: Iterable[Process]) -> None:
    """End processes and all that they started.

    They are asked first, because train.py takes its Ray down and SGLang its workers. Then what is left in their
    sessions gets SIGTERM, and what is left of that SIGKILL.
    """
    processes = list(processes)
    asked = [process for process in processes if process.running()]
    for process in asked:
        process.popen.terminate()
    patience_s = max((process.patience_s for process in asked), default=0.0)
    _wait_until(lambda: not any(process.running() for process in asked), patience_s)
    sessions = {process.popen.pid for process in processes}
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in members(sessions):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        _wait_until(lambda: not members(sessions), KILL_AFTER_S)
    for process in processes:
        process.popen.poll()


def members(sessions: set[int]) -> list[int]:
    """The processes of these sessions that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append(int(folder.name))
    return found


class Supervisor:
    """Processes that end together: when the block is left, and on SIGHUP, SIGINT and SIGTERM.

    A signal only leaves a note, and `pause` raises SystemExit(128 + signal): raised anywhere else, it could lose the
    process that is just being started. What was ignored at the start, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self._processes: list[Process] = []
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}  # of before

    def __enter__(self) -> "Supervisor":
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        stop(self._processes)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._signal = number

    def start(
        self, name: str, command: list[str], log: Path | None = None, env: dict[str, str] | None = None
    ) -> Process:
        process = Process(name, command, log, env)
        self._processes.append(process)
        return process

    def run(self, name: str, command: list[str], env: dict[str, str] | None = None) -> int:
        """The exit status of a command that runs to its end."""
        process = self.start(name, command, env=env)
        while process.running():
            self.pause()
        process.stop()  # what it left behind
        self._processes.remove(process)
        return process.popen.returncode

    def pause(self, seconds: float = 0.1) -> None:
        time.sleep(seconds)
        if self._signal is not None:
            raise SystemExit(128 + self._signal)


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent is killed outright."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until(condition: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
