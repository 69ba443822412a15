"""The processes of the run script: they end together, and a run goes on where it was."""

import json
import os
import shlex
import signal
import time

import pytest

from tests.support.fake_cluster import processes_of
from tests.support.run_script import SCRIPT, checkpoint

NUM_GPUS = 0


@pytest.mark.parametrize("waits, number, status", [("teacher", signal.SIGHUP, 129), ("train", signal.SIGINT, 130)])
def test_a_signal_stops_everything_and_a_second_one_changes_nothing(script, waits, number, status):
    running = script(**{f"FAKE_{waits.upper()}": "wait"})
    running.wait_for(waits)
    assert len(processes_of(running.folder / "run")) >= 3  # the script, what it started, and that one's child
    running.popen.send_signal(number)
    running.wait_for("asked")  # to end, which takes it a second
    for second in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        running.popen.send_signal(second)
    assert running.end()[0] == status
    assert (running.folder / "seen/train.json").exists() == (waits == "train")


def test_what_was_ignored_at_the_start_stays_ignored(script):
    """nohup: a run outlives the terminal."""
    running = script(FAKE_TRAIN="wait", hangup=signal.SIG_IGN)
    running.wait_for("train")
    running.popen.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert running.popen.poll() is None and not (running.folder / "seen/asked.json").exists()
    assert running.end(signal.SIGTERM)[0] == 143


def test_a_launcher_that_is_killed_outright_ends_what_it_started(script):
    running = script(FAKE_TRAIN="wait")
    running.wait_for("train")
    running.popen.kill()
    running.wait_for("asked")


@pytest.mark.parametrize(
    "fails, sentence",
    [
        ({"FAKE_CHECKS": "fail"}, "CUDA out of memory"),
        ({"FAKE_TEACHER": "fail"}, "launch: the teacher ended while it was needed; "),
        ({"FAKE_TRAIN": "fail"}, "launch: training ended with status 1: see "),
    ],
)
def test_a_failure_is_reported(script, fails, sentence):
    running = script(**fails)
    status, output = running.end()
    assert status == 1 and sentence in output and "CUDA out of memory" in output and "Traceback" not in output
    assert (running.folder / "seen/train.json").exists() == ("FAKE_TRAIN" in fails)


def test_a_teacher_that_dies_ends_the_training_and_a_second_start_does_not(script):
    running = script(FAKE_TRAIN="wait")
    running.wait_for("train")
    second = script(TEACHER_URL="http://127.0.0.1:1", RUN_DIR=f"{running.folder}/run")
    assert second.popen.wait() == 1 and "/run has a run that goes on (process " in second.output.read_text()
    os.kill(running.wait_for("teacher")["pid"], signal.SIGKILL)
    status, output = running.end()
    assert status == 1 and "the teacher ended while it was needed" in output


def test_a_run_and_its_resumption(script):
    secret = {"TCOD_TEACHER_API_KEY": "abc123", "FAKE_LINE": "http://me:abc123@a"}
    given = {"WANDB_PROJECT": "tcod", "NCCL_DEBUG": "WARN", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "a.org"}
    running = script(**given, **secret)
    run_dir, (status, output) = running.folder / "run", running.end()
    assert status == 0 and output.startswith(f"{run_dir} starts\n") and "train speaks http://SECRET@a\n" in output
    [logs] = (run_dir / "logs").iterdir()
    seen = running.wait_for("train")
    words = shlex.split((logs / "command.sh").read_text().splitlines()[-1])
    assert words[words.index("python3") + 1 :] == seen["command"] and seen["folder"] == f"{running.folder}/slime"
    to_workers = json.loads(seen["env"]["RAY_JOB_CONFIG_JSON_ENV_VAR"])["runtime_env"]["env_vars"]
    ours = [f"{running.folder}/slime", f"{running.folder}/megatron", str(SCRIPT.parents[1])]
    assert to_workers["PYTHONPATH"].split(":")[:3] == ours
    assert set(to_workers) == {
        *("PYTHONPATH", "ALFWORLD_DATA", "TCOD_RUN_DIR", "TCOD_TEACHER_API_KEY", "CUDA_DEVICE_MAX_CONNECTIONS"),
        *("PYTHONUNBUFFERED", "no_proxy", "NO_PROXY", "NCCL_DEBUG", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_RESUME"),
    }
    assert to_workers["no_proxy"] == to_workers["NO_PROXY"] == seen["env"]["NO_PROXY"]
    assert {"127.0.0.1", "a.org", "10.0.0.7", "10.0.0.8"} <= {*to_workers["NO_PROXY"].split(",")}  # the nodes, too
    assert (to_workers["ALFWORLD_DATA"], to_workers["NCCL_DEBUG"]) == (f"{running.folder}/games", "WARN")
    assert (seen["env"]["CUDA_VISIBLE_DEVICES"], seen["env"]["RAY_ADDRESS"]) == ("0,1,2,3,4,5", "local")
    checkpoint(run_dir, 24)
    time.sleep(1)  # log folders are named by the second
    status, output = script(**given).end()
    assert status == 0 and f"{run_dir} continues from checkpoint 24\n" in output
    again = running.wait_for("train")
    assert again["command"] == seen["command"] and again["pid"] != seen["pid"]
    assert again["env"]["WANDB_RUN_ID"] == seen["env"]["WANDB_RUN_ID"]
    for file in run_dir.rglob("*.*"):
        assert file.is_dir() or file.suffix == ".log" or "abc123" not in file.read_text(), file


def test_a_start_without_a_checkpoint_is_no_run_yet(script):
    first = script(WANDB_PROJECT="tcod", FAKE_TRAIN="fail")
    assert first.end()[0] == 1
    (first.folder / "run/metrics.jsonl").write_text("{}\n")
    before = first.wait_for("train")["env"]["WANDB_RUN_ID"]
    time.sleep(1)  # log folders are named by the second
    assert script(WANDB_PROJECT="tcod", ETA="2").end()[0] == 0
    assert first.wait_for("train")["env"]["WANDB_RUN_ID"] != before
    assert not (first.folder / "run/metrics.jsonl").exists()
    assert list((first.folder / "run/logs").glob("*/before-metrics.jsonl"))
