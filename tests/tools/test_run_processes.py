"""The processes of the run script: they end together, and a run goes on where it was."""

import json
import os
import shlex
import signal
import time

import pytest

from tests.support.fake_cluster import processes_of
from tests.support.run_script import SCRIPT, checkpoint, run

NUM_GPUS = 0


@pytest.mark.parametrize("waits, number, status", [("teacher", signal.SIGHUP, 129), ("train", signal.SIGINT, 130)])
def test_a_signal_stops_everything(script, waits, number, status):
    running = script(**{f"FAKE_{waits.upper()}": "wait"})
    running.wait_for(waits)
    assert len(processes_of(running.folder / "run")) >= 3  # the script, what it started, and that one's child
    assert running.end(number)[0] == status
    assert (running.folder / "seen/train.json").exists() == (waits == "train")


def test_what_is_killed_outright_leaves_neither_training_nor_teacher(script):
    running = script(FAKE_TRAIN="wait")
    running.wait_for("train")
    running.popen.kill()
    running.popen.wait()
    while any("fake_cluster" in command for _, command in processes_of(running.folder / "run")):
        time.sleep(0.1)


def test_the_end_of_training_is_the_end_of_the_teacher(script):
    running = script()
    status, output = running.end()
    assert status == 0 and "train speaks" in output
    [logs] = (running.folder / "run/logs").iterdir()
    for role in ("teacher", "train"):
        assert (logs / f"{role}.log").read_text().startswith(f"{role} speaks")
    seen = running.wait_for("train")
    assert shlex.split((logs / "command.sh").read_text().splitlines()[-1])[1:] == seen["command"]
    assert seen["folder"] == f"{running.folder}/slime"


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


def test_a_teacher_that_dies_later_ends_the_training(script):
    running = script(FAKE_TRAIN="wait")
    running.wait_for("train")
    os.kill(running.wait_for("teacher")["pid"], signal.SIGKILL)
    status, output = running.end()
    assert status == 1 and "the teacher ended while it was needed" in output


def test_a_run_and_its_resumption(place):
    folder, env = place
    env |= {"WANDB_PROJECT": "tcod", "NCCL_DEBUG": "WARN", "TCOD_TEACHER_API_KEY": "abc123"}
    env |= {"http_proxy": "http://127.0.0.1:9", "NO_PROXY": "a.org", "FAKE_CHECKS": "ask the teacher"}
    first = run(env)
    assert first.returncode == 0, first.stderr + first.stdout
    assert first.stdout.startswith(f"{folder}/run starts\n")
    seen = json.loads((folder / "seen/train.json").read_text())
    to_workers = json.loads(seen["env"]["RAY_JOB_CONFIG_JSON_ENV_VAR"])["runtime_env"]["env_vars"]
    ours = [f"{folder}/slime", f"{folder}/megatron", str(SCRIPT.parents[1])]
    assert to_workers["PYTHONPATH"].split(":")[:3] == ours
    assert str(SCRIPT.parent) not in to_workers["PYTHONPATH"].split(":")
    assert set(to_workers) == {
        *("PYTHONPATH", "ALFWORLD_DATA", "TCOD_RUN_DIR", "TCOD_TEACHER_API_KEY", "CUDA_DEVICE_MAX_CONNECTIONS"),
        *("PYTHONUNBUFFERED", "no_proxy", "NO_PROXY", "NCCL_DEBUG", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_RESUME"),
    }
    assert to_workers["ALFWORLD_DATA"] == f"{folder}/games" and to_workers["NCCL_DEBUG"] == "WARN"
    assert to_workers["no_proxy"] == to_workers["NO_PROXY"] == seen["env"]["NO_PROXY"]
    assert {"127.0.0.1", "a.org", "10.0.0.7", "10.0.0.8"} <= {*to_workers["NO_PROXY"].split(",")}  # the nodes, too
    assert seen["env"]["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5" and seen["env"]["RAY_ADDRESS"] == "local"
    assert seen["env"]["WANDB_RESUME"] == "allow" and seen["env"]["TCOD_RUN_DIR"] == f"{folder}/run"
    checkpoint(folder / "run", 24)
    time.sleep(1)  # log folders are named by the second
    second = run(env)
    assert second.returncode == 0 and "run continues from checkpoint 24\n" in second.stdout
    again = json.loads((folder / "seen/train.json").read_text())
    assert again["command"] == seen["command"]
    assert again["env"]["WANDB_RUN_ID"] == seen["env"]["WANDB_RUN_ID"]
    assert len(list((folder / "run/logs").iterdir())) == 2
    for file in (folder / "run").rglob("*.*"):
        assert file.is_dir() or "abc123" not in file.read_text(), file


def test_a_start_without_a_checkpoint_is_no_run_yet(place):
    folder, env = place
    env |= {"WANDB_PROJECT": "tcod", "FAKE_CHECKS": "ask the teacher"}
    assert run({**env, "FAKE_TRAIN": "fail"}).returncode == 1
    first = json.loads((folder / "seen/train.json").read_text())["env"]["WANDB_RUN_ID"]
    (folder / "run/metrics.jsonl").write_text("{}\n")
    [logs] = (folder / "run/logs").iterdir()
    time.sleep(1)  # log folders are named by the second
    assert run({**env, "ETA": "2"}).returncode == 0
    assert json.loads((folder / "seen/train.json").read_text())["env"]["WANDB_RUN_ID"] != first
    assert not (folder / "run/metrics.jsonl").exists() and list((folder / "run/logs").glob("*/before-metrics.jsonl"))


def test_a_second_run_in_the_same_folder_is_refused(place, script):
    folder, env = place
    running = script(FAKE_TRAIN="wait")
    running.wait_for("train")
    done = run({**env, "TEACHER_URL": "http://127.0.0.1:1"})
    assert done.returncode == 1 and f"{folder}/run has a run that goes on (process " in done.stderr
    assert running.end(signal.SIGTERM)[0] == 143


def test_the_log_is_shown_without_secrets(script):
    running = script(WANDB_API_KEY="abc123", FAKE_LINE="the key is abc123, http://me:abc123@a")
    status, output = running.end()
    assert status == 0 and "the key is SECRET, http://me:SECRET@a" in output and "abc123" not in output
