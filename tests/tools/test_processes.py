"""Processes that end with all that they started. What the run script does with them is in test_run_processes.py."""

import signal
import sys
import time

import pytest

from examples.tcod.tools.launch import processes
from examples.tcod.tools.launch.processes import Process, members, no_proxy
from smoke import servers

NUM_GPUS = 0
# A process that ignores SIGTERM, as does its child in a process group of its own.
STUBBORN = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"], process_group=0)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("gone", [False, True])
def test_what_does_not_end_is_killed_with_its_children_and_nobody_else(tmp_path, monkeypatch, gone):
    monkeypatch.setattr(Process, "patience_s", 0.3)
    monkeypatch.setattr(processes, "KILL_AFTER_S", 0.3)
    with Process("other", ["sleep", "600"]) as other:
        with Process("stubborn", [sys.executable, "-c", STUBBORN], tmp_path / "log") as stubborn:
            while not stubborn.log.read_text():
                time.sleep(0.05)
            assert len(members(stubborn.popen.pid)) == 2
            if gone:  # the process itself has ended already
                stubborn.popen.kill()
                stubborn.popen.wait()
        assert members(stubborn.popen.pid) == [] and stubborn.popen.returncode == -signal.SIGKILL
        stubborn.popen.pid = other.popen.pid  # another process may get its number
        stubborn.stop()
        assert other.running()


def test_the_end_of_the_log_is_shown(tmp_path):
    process = servers.Process("talker", ["sh", "-c", "seq 100; exit 3"], tmp_path / "log")
    process.popen.wait()
    for check in (process.check, process.check_running):
        with pytest.raises(RuntimeError, match="talker ended with 3; .*log ends:\n76\n(.|\n)*\n100$"):
            check()


def test_proxies_are_kept_out_in_both_spellings(monkeypatch):
    monkeypatch.setenv("no_proxy", "a.org, b.org")
    monkeypatch.setenv("NO_PROXY", "c.org,a.org")
    both = no_proxy("10.0.0.7", "fd00::7")
    assert both["no_proxy"] == both["NO_PROXY"] == "localhost,127.0.0.1,::1,10.0.0.7,fd00::7,a.org,b.org,c.org"
