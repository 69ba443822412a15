"""The processes of the run script: they end together, and a run goes on where it was."""

import json
import shlex
import signal
import subprocess
import time

import pytest

from smoke.servers import free_port
from tests.support.fake_cluster import processes_of
from tests.support.run_script import SCRIPT, checkpoint, refused, run

NUM_GPUS = 0


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_while_the_teacher_starts_stops_it(script, number, status):
    running = script(FAKE_TEACHER="is slow")
    running.wait_for("teacher")
    assert len(processes_of(running.folder / "run")) >= 3  # the script, the teacher and its child
    assert running.end(number)[0] == status
    assert not (running.folder / "seen/train.json").exists()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_training_stops_training_and_teacher(script, number, status):
    running = script(FAKE_TRAIN="goes on")
    running.wait_for("train")
    assert running.end(number)[0] == status


def test_what_was_ignored_at_the_start_stays_ignored(script):
    """nohup: a run outlives the terminal."""
    running = script(FAKE_TRAIN="goes on", heed=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    running.wait_for("train")
    running.popen.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert running.popen.poll() is None
    assert running.end(signal.SIGTERM)[0] == 143


def test_a_second_signal_does_not_disturb_the_end(script):
    running = script(FAKE_TRAIN="goes on", FAKE_TEACHER="ends slowly")
    running.wait_for("train")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        running.popen.send_signal(number)
        time.sleep(0.3)
    assert running.end(signal.SIGTERM)[0] == 130


def test_what_is_killed_outright_leaves_neither_training_nor_teacher(script):
    running = script(FAKE_TRAIN="goes on")
    running.wait_for("train")
    running.popen.kill()
    running.popen.wait()
    for _ in range(50):
        left = [command for _, command in processes_of(running.folder / "run") if "fake_cluster" in command]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(left)


def test_a_process_of_somebody_else_lives_on(script):
    stranger = subprocess.Popen(["sleep", "600"])
    running = script(FAKE_TRAIN="goes on")
    running.wait_for("train")
    running.end(signal.SIGTERM)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_the_end_of_training_is_the_end_of_the_teacher(script):
    running = script()
    status, output = running.end()
    assert status == 0 and "train speaks" in output
    [logs] = (running.folder / "run/logs").iterdir()
    for role in ("teacher", "train"):
        assert (logs / f"{role}.log").read_text() == f"{role} speaks\n"
    seen = json.loads((running.folder / "seen/train.json").read_text())
    assert shlex.split((logs / "command.sh").read_text().splitlines()[-1])[1:] == seen["command"]


def test_training_that_fails_is_reported(script):
    status, output = script(FAKE_TRAIN="fails").end()
    assert status == 1 and "training ended with status 3: see " in output


def test_a_teacher_that_dies_shows_its_log(script):
    status, output = script(FAKE_TEACHER="dies").end()
    assert status == 1 and "CUDA out of memory" in output and "the teacher ended before it was ready" in output


def test_a_teacher_that_never_comes_up_is_given_up(script):
    status, output = script(FAKE_TEACHER="is slow", TEACHER_START_S="2").end()
    assert status == 1 and "the teacher was not ready within TEACHER_START_S=2 seconds" in output


def test_a_teacher_that_dies_later_ends_the_training(script):
    status, output = script(FAKE_TEACHER="ends", FAKE_TRAIN="goes on").end()
    assert status == 1 and "the teacher is gone" in output and "the teacher ended while it was needed" in output


def test_a_run_with_all_checks_and_its_resumption(place):
    folder, env = place
    env |= {"WANDB_PROJECT": "tcod", "NCCL_DEBUG": "WARN", "TCOD_TEACHER_API_KEY": "abc123"}
    first = run(env)
    assert first.returncode == 0, first.stderr + first.stdout
    assert first.stdout.startswith(f"{folder}/run starts\n")
    seen = json.loads((folder / "seen/train.json").read_text())
    to_workers = json.loads(seen["env"]["RAY_JOB_CONFIG_JSON_ENV_VAR"])["runtime_env"]["env_vars"]
    ours = [f"{folder}/slime", f"{folder}/megatron", str(SCRIPT.parents[1])]
    assert to_workers["PYTHONPATH"].split(":")[:3] == ours and str(SCRIPT.parent) not in to_workers[
        "PYTHONPATH"
    ].split(":")
    assert set(to_workers) == {
        *(
            "PYTHONPATH",
            "ALFWORLD_DATA",
            "TCOD_RUN_DIR",
            "TCOD_TEACHER_API_KEY",
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "PYTHONUNBUFFERED",
            "no_proxy",
        ),
        *("NCCL_DEBUG", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_RESUME"),
    }
    assert to_workers["ALFWORLD_DATA"] == f"{folder}/games" and to_workers["NCCL_DEBUG"] == "WARN"
    assert seen["env"]["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5" and seen["env"]["RAY_ADDRESS"] == "local"
    assert seen["env"]["WANDB_RESUME"] == "allow" and seen["env"]["TCOD_RUN_DIR"] == f"{folder}/run"
    checkpoint(folder, 24)
    time.sleep(1)  # log folders are named by the second
    second = run({**env, "SKIP_PREFLIGHT": "1"})
    assert second.returncode == 0 and "run continues from checkpoint 24\n" in second.stdout
    again = json.loads((folder / "seen/train.json").read_text())
    assert again["command"] == seen["command"]
    assert again["env"]["WANDB_RUN_ID"] == seen["env"]["WANDB_RUN_ID"]
    assert len(list((folder / "run/logs").iterdir())) == 2
    for file in (folder / "run").rglob("*.*"):
        assert file.is_dir() or "abc123" not in file.read_text(), file


def test_the_checks_are_told_what_runs(place):
    folder, env = place
    env |= {"SKIP_PREFLIGHT": "1", "RAY_ADDRESS": "10.0.0.1:6379", "ACTOR_NODES": "2", "ROLLOUT_GPUS": "4"}
    env |= {"ENGINE_GPUS": "2", "NODE_GPUS": "4", "TEACHER_GPUS": "4,5", "TEACHER_HOST": "127.0.0.1"}
    env |= {"MAX_TURN_LEN": "100", "MAX_CONTEXT_LEN": "900", "CHAT_TEMPLATE_KWARGS": '{"thinking": false}'}
    done = run(env)
    assert done.returncode == 0, done.stderr
    before, teacher = (
        (folder / f"seen/preflight_{name}.txt").read_text().splitlines()[1:] for name in ("run", "teacher")
    )
    both = {"--student": f"{folder}/student", "--config": f"{folder}/run/tcod.yaml", "--context-len": "900"}
    both |= {"--apply-chat-template-kwargs": '{"thinking": false}'}
    address = f"http://127.0.0.1:{env['TEACHER_PORT']}/generate"
    assert dict(zip(teacher[::2], teacher[1::2], strict=True)) == both | {"--url": address}
    at = before.index("--eval")
    data = f"{folder}/data"
    assert before[at + 1 : at + 3] == [f"{data}/valid_seen.jsonl", f"{data}/valid_unseen.jsonl"]
    del before[at : at + 3]
    assert dict(zip(before[::2], before[1::2], strict=True)) == both | {
        **{"--train": f"{data}/train.jsonl", "--turn-len": "100", "--ray-gpus": "12", "--actor-gpus": "8"},
        **{"--engine-gpus": "2", "--node-gpus": "4", "--teacher-gpus": "4,5"},
    }


def test_a_run_without_a_checkpoint_gets_a_new_tracking_run(place):
    folder, env = place
    env |= {"WANDB_PROJECT": "tcod", "SKIP_PREFLIGHT": "1"}
    failed = run({**env, "FAKE_TRAIN": "fails"})
    assert failed.returncode == 1
    first = (folder / "run/wandb_run_id").read_text()
    time.sleep(1)  # log folders are named by the second
    assert run({**env, "ETA": "2"}).returncode == 0
    assert (folder / "run/wandb_run_id").read_text() != first


def test_a_second_run_in_the_same_folder_is_refused(place, script):
    folder, env = place
    running = script(FAKE_TRAIN="goes on")
    running.wait_for("train")
    refused(run({**env, "TEACHER_PORT": str(free_port())}), f"{folder}/run has a run that goes on (process ")
    assert running.end(signal.SIGTERM)[0] == 143
    assert run({**env, "SKIP_PREFLIGHT": "1"}).returncode == 0


def test_a_teacher_with_another_tokenizer_is_refused(place):
    folder, env = place
    file = folder / "teacher/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    done = run(env)
    assert done.returncode == 1 and "use a teacher with the student's tokenizer" in done.stderr
    assert not (folder / "seen/train.json").exists() and processes_of(folder / "run") == []
