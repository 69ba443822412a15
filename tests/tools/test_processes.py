"""Processes that end together. What the run script does with them is in test_run_script.py."""

import os
import signal
import subprocess
import sys
import time

import pytest

from examples.tcod.tools import processes
from examples.tcod.tools.processes import Process, Supervisor, members

NUM_GPUS = 0
# A process that ignores SIGTERM, as does its child in a process group of its own.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"], process_group=0)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def stubborn(tmp_path, monkeypatch):
    """A process that must be killed, and does so soon."""
    monkeypatch.setattr(Process, "patience_s", 0.3)
    monkeypatch.setattr(processes, "KILL_AFTER_S", 0.3)
    with Process("stubborn", [sys.executable, "-c", STUBBORN], tmp_path / "log") as process:
        wait_for(lambda: process.log.read_text())
        yield process


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_does_not_end_is_killed_with_its_children(stubborn):
    session = {stubborn.popen.pid}
    assert len(members(session)) == 2
    stubborn.stop()
    assert members(session) == [] and stubborn.popen.returncode == -signal.SIGKILL


def test_children_end_with_a_process_that_is_gone_already(stubborn):
    session = {stubborn.popen.pid}
    stubborn.popen.kill()
    stubborn.popen.wait()
    assert len(members(session)) == 1
    stubborn.stop()
    assert members(session) == []


def test_the_end_of_the_log_is_shown(tmp_path):
    process = Process("talker", ["sh", "-c", "seq 100; exit 3"], tmp_path / "log")
    process.popen.wait()
    for check in (process.check, process.check_running):
        with pytest.raises(RuntimeError, match="talker ended with 3; .*log ends:\n76\n") as error:
            check()
        assert str(error.value).endswith("\n100")


def test_an_error_ends_all_processes(tmp_path):
    with pytest.raises(KeyError), Supervisor() as supervisor:
        started = [supervisor.start(name, ["sleep", "600"], tmp_path / name) for name in "ab"]
        raise KeyError
    assert not any(process.running() for process in started)


def test_a_command_that_has_ended_is_forgotten_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "KILL_AFTER_S", 0.3)
    file = tmp_path / "pid"
    with Supervisor() as supervisor:
        assert supervisor.run("parent", ["sh", "-c", f"sleep 600 & echo $$ >{file}; exit 4"]) == 4
        assert members({int(file.read_text())}) == [] == supervisor._processes


def test_signals_mean_what_they_meant_before_when_all_has_ended():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, Supervisor() as supervisor:
        os.kill(os.getpid(), signal.SIGTERM)
        supervisor.pause()
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == before


def test_a_child_ends_with_a_parent_that_was_killed_outright(tmp_path):
    parent = f"""
import time
from pathlib import Path
from examples.tcod.tools.processes import Process
print(Process("child", ["sleep", "600"], Path({str(tmp_path / "log")!r})).popen.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        assert members({child}) == [child]
        process.kill()
    wait_for(lambda: members({child}) == [])
