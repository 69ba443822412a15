"""Processes that end together. What the run script does with them is in test_run_processes.py."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from examples.tcod.tools.launch import processes
from examples.tcod.tools.launch.processes import Process, members, no_proxy
from smoke import servers
from tests.support.run_script import heed

NUM_GPUS = 0
# A process that ignores SIGTERM, as does its child in a process group of its own.
STUBBORN = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"], process_group=0)
print("ready", flush=True)
time.sleep(600)
"""
# Supervises a process that ends slowly, and says its session.
SUPERVISOR = """
import sys
from pathlib import Path
from examples.tcod.tools.launch.processes import Supervisor
command = "trap 'echo asked; sleep 2; exit' TERM; echo up; sleep 600 & wait"
with Supervisor() as supervisor:
    process = supervisor.start("child", ["sh", "-c", command], Path(sys.argv[1]))
    supervisor.wait(process, until=process.log.read_text)
    print(process.popen.pid, flush=True)
    supervisor.wait(process)
"""


@pytest.fixture
def stubborn(tmp_path, monkeypatch):
    """A process that must be killed, and does so soon."""
    monkeypatch.setattr(Process, "patience_s", 0.3)
    monkeypatch.setattr(processes, "KILL_AFTER_S", 0.3)
    with Process("stubborn", [sys.executable, "-c", STUBBORN], tmp_path / "log") as process:
        wait_for(lambda: process.log.read_text())
        yield process


@pytest.fixture
def supervised(tmp_path):
    """supervised() -> (the supervisor's process, the session of what it supervises)"""
    started = []

    def begin(hangup=signal.SIG_DFL):
        command = [sys.executable, "-c", SUPERVISOR, tmp_path / "log"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=partial(heed, hangup))
        started.append((process, int(process.stdout.readline())))
        return started[-1]

    yield begin
    for process, session in started:
        process.kill()
        process.communicate()
        for pid in members(session):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition):
    while not condition():
        time.sleep(0.05)


@pytest.mark.parametrize("gone", [False, True])
def test_what_does_not_end_is_killed_with_its_children(stubborn, gone):
    assert len(members(stubborn.popen.pid)) == 2
    if gone:  # the process itself has ended already
        stubborn.popen.kill()
        stubborn.popen.wait()
    stubborn.stop()
    assert members(stubborn.popen.pid) == [] and stubborn.popen.returncode == -signal.SIGKILL


def test_the_end_of_the_log_is_shown(tmp_path):
    process = servers.Process("talker", ["sh", "-c", "seq 100; exit 3"], tmp_path / "log")
    process.popen.wait()
    for check in (process.check, process.check_running):
        with pytest.raises(RuntimeError, match="talker ended with 3; .*log ends:\n76\n(.|\n)*\n100$"):
            check()


def test_a_signal_ends_what_is_supervised_and_a_second_one_changes_nothing(supervised, tmp_path):
    stranger = subprocess.Popen(["sleep", "600"])
    supervisor, session = supervised()
    supervisor.send_signal(signal.SIGTERM)
    wait_for(lambda: "asked" in (tmp_path / "log").read_text())
    for second in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        supervisor.send_signal(second)
    assert supervisor.wait() == 128 + signal.SIGTERM and members(session) == []
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_what_was_ignored_at_the_start_stays_ignored(supervised):
    """nohup: a run outlives the terminal."""
    supervisor, session = supervised(hangup=signal.SIG_IGN)
    supervisor.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert supervisor.poll() is None and members(session)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait() == 143


def test_a_child_ends_with_a_parent_that_was_killed_outright(supervised):
    supervisor, session = supervised()
    supervisor.kill()
    wait_for(lambda: session not in members(session))


def test_proxies_are_kept_out_in_both_spellings(monkeypatch):
    monkeypatch.setenv("no_proxy", "a.org, b.org")
    monkeypatch.setenv("NO_PROXY", "c.org,a.org")
    both = no_proxy("10.0.0.7", "fd00::7")
    assert both["no_proxy"] == both["NO_PROXY"] == "localhost,127.0.0.1,::1,10.0.0.7,fd00::7,a.org,b.org,c.org"
