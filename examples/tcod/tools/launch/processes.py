"""Processes that are ended with all that they started, and nobody else's. Linux only."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
KILL_AFTER_S = 3.0  # between SIGTERM and SIGKILL, for what a process leaves behind
SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
_prctl = ctypes.CDLL(None).prctl  # found here: nothing should be imported between fork and exec


def no_proxy(*hosts: str) -> dict[str, str]:
    """The variables that keep proxies out between our processes: for this machine, `hosts`, and what the user says.

    In both spellings, because programs differ in which one they read first: Python no_proxy, slime's router NO_PROXY.
    """
    users = f"{os.environ.get('no_proxy', '')},{os.environ.get('NO_PROXY', '')}".replace(" ", ",").split(",")
    merged = ",".join(dict.fromkeys(filter(None, ["localhost", "127.0.0.1", "::1", *hosts, *users])))
    return {"no_proxy": merged, "NO_PROXY": merged}


class Process(AbstractContextManager):
    """A child that leads a session of its own, so that stopping it reaches all that it started.

    Its output goes to the file `log`; without one it goes where this process's does. `env` adds to this process's
    variables.
    """

    patience_s = 15.0  # to end by itself after SIGTERM

    def __init__(
        self, name: str, command: list[str], log: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        self.name, self.log, self._stopped = name, log, False
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") if log else nullcontext() as output:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output and subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=_begin,
            )

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def running(self) -> bool:
        return self.popen.poll() is None

    def describe(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-25:] if self.log else []
        return "\n".join([f"{self.name} {what}; {self.log} ends:" if lines else f"{self.name} {what}", *lines])

    def stop(self) -> None:
        """End the process and all that it started.

        It is asked first, because train.py takes its Ray down and SGLang its workers. Then what is left in its session
        gets SIGTERM, and what is left of that SIGKILL. Once: its number may be another one's later.
        """
        if self._stopped:
            return
        self._stopped = True
        self.popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(self.patience_s)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in members(self.popen.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + KILL_AFTER_S
            while members(self.popen.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
        self.popen.poll()


def members(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(folder.name))
    return found


class Supervisor(ExitStack):
    """Processes that end when the block is left, the last one first; also on SIGHUP, SIGINT and SIGTERM.

    Until then signals are held back, and `wait` raises SystemExit(128 + signal): anywhere else one could lose a
    process that is just being started, and a second one would disturb the end. What is ignored, as under nohup, stays
    ignored.
    """

    def __init__(self) -> None:
        super().__init__()
        self._signals = {number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        self.callback(self._forget)

    def _forget(self) -> None:
        while signal.sigtimedwait(self._signals, 0):
            pass

    def start(self, *arguments: object, **options: object) -> Process:
        """Start a Process, with its arguments."""
        return self.enter_context(Process(*arguments, **options))

    def wait(self, process: Process, needed: Process | None = None, until: Callable[[], object] = bool) -> None:
        """Return when the process has ended, or `until` holds. RuntimeError if the one that it needs ends before."""
        while process.running() and not until():
            if needed and not needed.running():
                raise RuntimeError(needed.describe("ended while it was needed"))
            if taken := signal.sigtimedwait(self._signals, 0.1):
                raise SystemExit(128 + taken.si_signo)


def _begin() -> None:
    """In the child: SIGTERM when the parent is killed outright, and signals as ever."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
