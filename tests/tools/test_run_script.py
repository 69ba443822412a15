"""The cluster's run script, as far as a machine without GPUs goes: dry runs, refusals, and its processes.

fake_cluster.py stands for the GPUs, SGLang and slime's train.py. slime's own argument parser reads the dry runs'
commands where there are checkouts of slime and Megatron-LM.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from smoke.servers import free_port
from tests.support import fake_cluster
from tests.support.fake_cluster import processes_of
from tests.support.toys import LocalPool, save_tokenizer

NUM_GPUS = 0
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/tcod/run_qwen3_8b_tcod.sh"
OWN = {"RAY_ADDRESS", "CUDA_VISIBLE_DEVICES", "SLIME_DIR", "MEGATRON_DIR"}  # of whoever runs the tests


@pytest.fixture
def place(tmp_path):
    """(folder, the script's environment)"""
    env = {key: value for key, value in os.environ.items() if key not in OWN}
    env |= fake_cluster.build(tmp_path, save_tokenizer)
    return tmp_path, {**env, "TEACHER_PORT": str(free_port())}


def run(env, *arguments, script=SCRIPT):
    return subprocess.run(["bash", script, *arguments], env=env, capture_output=True, text=True, timeout=300)


def dry_run(env, *arguments, script=SCRIPT):
    """(all lines, flags of train.py)"""
    done = run({**env, "DRY_RUN": "1"}, *arguments, script=script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    python, train, *flags = shlex.split(lines[-1])
    assert python == "python3" and train == f"{env['SLIME_DIR']}/train.py"
    return lines, flags


def value(flags, name):
    return flags[flags.index(name) + 1]


def own_settings(env, lines):
    """The run's own YAML in a dry run."""
    first = lines.index(f"cat >{env['RUN_DIR']}/tcod.yaml <<'END'") + 1
    return yaml.safe_load("\n".join(lines[first : lines.index("END")]))


# ---------------------------------------------------------------------------------------------------------- dry runs


@pytest.mark.parametrize("variant", ["opd", "f2b", "b2f"])
@pytest.mark.parametrize("teacher", ["sglang", "megatron"])
def test_a_dry_run_prints_everything_and_starts_nothing(place, variant, teacher):
    folder, env = place
    env |= {"VARIANT": variant, "TEACHER": teacher, "CONFIG": "", "HORIZON": "20"}
    lines, flags = dry_run(env, "--seed", "7")
    assert flags[:4] == ["--num-layers", "2", "--normalization", "RMSNorm"] and flags[-2:] == ["--seed", "7"]
    assert value(flags, "--opd-type") == teacher and f"tcod_variant: {variant}" in lines
    assert [line for line in lines if line.startswith("tcod_horizon")] == ["tcod_horizon: 20"]
    assert value(flags, "--load") == value(flags, "--save") == f"{folder}/run/checkpoints"
    servers = [line for line in lines if "sglang.launch_server" in line]
    if teacher == "sglang":
        [server] = servers
        assert server.startswith("CUDA_VISIBLE_DEVICES=6") and server.endswith(" &")
        assert value(flags, "--rm-url") == f"http://127.0.0.1:{env['TEACHER_PORT']}/generate"
        assert "--opd-teacher-load" not in flags and "--offload-train" not in flags
    else:
        assert not servers and "--rm-url" not in flags and "--offload-train" in flags
        assert value(flags, "--opd-teacher-load") == f"{folder}/teacher"
    assert not (folder / "run").exists() and not list((folder / "seen").iterdir())


def test_a_dry_run_needs_neither_gpus_nor_checkpoints(place, tmp_path):
    _, env = place
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    dry_run({**env, "PATH": path, "STUDENT": "/nowhere", "DATA_DIR": "/nowhere"})


def test_the_curriculum_is_set_in_the_runs_own_yaml(place):
    _, env = place
    lines, flags = dry_run({**env, "ETA": "2", "EVAL_TEMPERATURE": "1"})
    assert own_settings(env, lines) == {
        **yaml.safe_load(Path(env["CONFIG"]).read_text()),
        "tcod_eta": 2,
        "tcod_eval_kl": True,
    }
    assert value(flags, "--custom-config-path") == f"{env['RUN_DIR']}/tcod.yaml"
    assert value(flags, "--eval-temperature") == "1"


def test_gpu_numbers_count_within_the_visible_ones(place):
    _, env = place
    env |= {"CUDA_VISIBLE_DEVICES": "8,9,10,11", "ACTOR_GPUS": "2", "ROLLOUT_GPUS": "1", "TEACHER_GPUS": "3"}
    lines, _ = dry_run(env)
    assert "export CUDA_VISIBLE_DEVICES=8,9,10" in lines and "export RAY_ADDRESS=local" in lines
    assert any(line.startswith("CUDA_VISIBLE_DEVICES=11 python3 -m sglang") for line in lines)


def test_in_a_cluster_other_nodes_reach_the_teacher(place):
    _, env = place
    lines, flags = dry_run({**env, "RAY_ADDRESS": "10.0.0.1:6379", "ACTOR_NODES": "2", "TEACHER_GPUS": "0"})
    assert "export RAY_ADDRESS=10.0.0.1:6379" in lines and value(flags, "--actor-num-nodes") == "2"
    assert not any(line.startswith("export CUDA_VISIBLE_DEVICES") for line in lines)
    assert "127.0.0.1" not in value(flags, "--rm-url")


@pytest.mark.parametrize(
    "text",
    [
        "\"tcod_variant\": 'f2b'  # arm\n'tcod_eta' : 6   # tcod_eta: 9\ntcod_horizon: !!int '30'\n",
        "{tcod_variant: f2b, tcod_eta: 6,\n tcod_horizon: 30}\n",
        "# tcod_variant: b2f\ntcod_variant:\n  f2b\n? tcod_eta\n: 6\ntcod_horizon: &T 30\n",
    ],
)
def test_a_config_is_yaml_in_any_style(place, text):
    folder, env = place
    (folder / "f2b.yaml").write_text(text)
    lines, _ = dry_run({**env, "ETA": "2", "HORIZON": "20"})
    assert own_settings(env, lines) == {"tcod_variant": "f2b", "tcod_eta": 2, "tcod_horizon": 20}
    lines, _ = dry_run(env)
    assert own_settings(env, lines) == {"tcod_variant": "f2b", "tcod_eta": 6, "tcod_horizon": 30}


def test_the_commands_of_a_dry_run_can_be_pasted(place):
    folder, env = place
    env |= {"RUN_DIR": f"{folder}/it's a run", "TEACHER_URL": "http://127.0.0.1:1"}
    lines, flags = dry_run(env, "--wandb-group", "$(touch x) 'and' more")
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], env={"PATH": env["PATH"]}, cwd=folder, timeout=60)
    seen = json.loads((folder / "seen/train.json").read_text())
    assert done.returncode == 0 and seen["command"][1:] == flags and seen["folder"] == f"{folder}/slime"
    assert yaml.safe_load((folder / "it's a run/tcod.yaml").read_text()) == yaml.safe_load(
        Path(env["CONFIG"]).read_text()
    )


def test_the_trackers_key_is_not_printed(place):
    _, env = place
    lines, flags = dry_run({**env, "WANDB_API_KEY": "abc123"}, "--wandb-key", "abc123")
    assert "abc123" not in "\n".join(lines) and value(flags, "--wandb-key") == "SECRET"


# --------------------------------------------------------------------------------------------------- the folder's name

HOOKS = {
    "--rollout-function-path": "tcod_rollout.generate_rollout",
    "--custom-generate-function-path": "tcod_rollout.generate",
    "--custom-rm-path": "tcod_rollout.reward_func",
    "--custom-reward-post-process-path": "tcod_rollout.post_process_rewards",
    "--dynamic-sampling-filter-path": "tcod_rollout.drop_failed",
    "--custom-rollout-log-function-path": "run_log.log_rollout",
    "--custom-eval-rollout-log-function-path": "run_log.log_eval",
}


def copy_recipe(folder):
    """The script of a copy of the recipe."""
    shutil.copytree(SCRIPT.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / SCRIPT.name


@pytest.fixture
def examples(place):
    """examples/ of slime, a package as Megatron-LM's."""
    folder, _ = place
    for checkout in ("megatron", "slime"):
        (folder / checkout / "examples").mkdir()
        (folder / checkout / "examples/__init__.py").write_text("")
    return folder / "slime/examples"


def python_path(lines):
    [line] = [line for line in lines if line.startswith("export PYTHONPATH=")]
    return line.removeprefix("export PYTHONPATH=").split(":")


@pytest.mark.parametrize(
    "folder, package",
    [
        ("slime/examples/tcod", "examples.tcod"),
        ("slime/examples/my_agent", "examples.my_agent"),
        ("mine/my_agent", "my_agent"),
        ("mine/examples/tcod", "tcod"),
    ],
)
def test_the_hooks_are_those_of_the_folder_that_the_script_lies_in(place, examples, folder, package):
    place, env = place
    copy_recipe(examples / "another")
    lines, flags = dry_run(env, script=copy_recipe(place / folder))
    assert {flag: value(flags, flag) for flag in HOOKS} == {flag: f"{package}.{hook}" for flag, hook in HOOKS.items()}
    ours = [f"{place}/slime", f"{place}/megatron"]
    ours += [] if folder.startswith("slime") else [str((place / folder).parent)]
    path = python_path(lines)
    assert path == ours + env["PYTHONPATH"].split(":")
    # The package is found under that name, in that folder, and as slime's workers look for it.
    code = f"import {package} as ours; print(ours.__file__)"
    found = subprocess.run(
        [sys.executable, "-Pc", code], env={"PYTHONPATH": ":".join(path)}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == f"{place}/{folder}/__init__.py"


def test_a_folder_that_is_linked_into_slime_is_in_slime(place, examples):
    folder, env = place
    copy_recipe(folder / "mine/tcod")
    (examples / "my_agent").symlink_to(folder / "mine/tcod")
    _, flags = dry_run(env, script=examples / "my_agent" / SCRIPT.name)
    assert value(flags, "--custom-rm-path") == "examples.my_agent.tcod_rollout.reward_func"


def test_a_folder_whose_name_is_no_identifier_is_refused(place, examples):
    _, env = place
    done = run(env, script=copy_recipe(examples / "my-agent"))
    refused(done, "examples/my-agent is a Python package: rename it, to my_agent for example")


def test_a_copy_under_another_name_runs(place, examples):
    """From inside its folder, too, whose module names must not hide anybody's."""
    folder, env = place
    copy_recipe(examples / "tcod")  # which the test's environment imports
    script = copy_recipe(examples / "my_agent")
    done = subprocess.run(["bash", script], env=env, cwd=script.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads((folder / "seen/train.json").read_text())["folder"] == f"{folder}/slime"


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"VARIANT": "f2bb"}, "VARIANT must be opd, f2b or b2f, not f2bb"),
        ({"TEACHER": "vllm"}, "TEACHER must be sglang or megatron, not vllm"),
        ({"BATCH": "0"}, "BATCH must be a positive whole number, not 0"),
        ({"ETA": "1.5"}, "ETA must be a positive whole number, not 1.5"),
        ({"CONFIG": "/nowhere"}, "no file /nowhere: set CONFIG"),
        ({"VARIANT": "b2f"}, "f2b.yaml is not for VARIANT=b2f: change one"),
        ({"VARIANT": "opd", "CONFIG": "", "ETA": "3"}, "VARIANT=opd has none: unset ETA"),
        ({"MAX_TURN_LEN": "512", "MAX_CONTEXT_LEN": "512"}, "MAX_TURN_LEN 512 is one turn of MAX_CONTEXT_LEN"),
        ({"TENSOR_PARALLEL": "3"}, "TENSOR_PARALLEL 3 must divide ACTOR_GPUS 4"),
        ({"TENSOR_PARALLEL": "1", "BATCH": "6"}, "BATCH x SAMPLES_PER_TASK must be a multiple of 4"),
        ({"ACTOR_NODES": "2"}, "ACTOR_NODES is 2: set RAY_ADDRESS"),
        ({"TEACHER": "megatron", "TEACHER_URL": "http://a:1"}, "TEACHER=megatron asks no server: unset TEACHER_URL"),
        ({"TEACHER_URL": "http://a:1/generate"}, "TEACHER_URL must be http://HOST:PORT, not http://a:1/generate"),
        ({"TEACHER_GPUS": "6-7"}, "TEACHER_GPUS must be numbers like 6,7, not 6-7"),
        ({"TEACHER_GPUS": "5,6"}, "GPU 5 of TEACHER_GPUS is taken: ACTOR_GPUS + ROLLOUT_GPUS are 0 to 5"),
        ({"MODEL_SCRIPT": "/nowhere"}, "no file /nowhere: set SLIME_DIR to slime's checkout, or MODEL_SCRIPT"),
        ({"MEGATRON_DIR": "/nowhere"}, "no Megatron-LM in /nowhere: set MEGATRON_DIR"),
        ({"STUDENT": "/nowhere"}, "no config.json in /nowhere: set STUDENT"),
        ({"STUDENT_LOAD": "/nowhere"}, "no weights in /nowhere: set STUDENT_LOAD"),
        ({"TEACHER_MODEL": "/nowhere"}, "no config.json in /nowhere: set TEACHER_MODEL"),
        ({"TEACHER": "megatron", "TEACHER_LOAD": "/nowhere"}, "no weights in /nowhere: set TEACHER_LOAD"),
        ({"ALFWORLD_DATA": "/nowhere"}, "no json_2.1.1 in /nowhere: run alfworld-download, or set ALFWORLD_DATA"),
        ({"HORIZON": "09"}, "HORIZON must be a positive whole number, not 09"),
        ({"DATA_DIR": "/nowhere"}, "no train.jsonl in /nowhere: run prepare_alfworld.py, or set DATA_DIR"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, "8 GPUs are needed and 3 visible: change ACTOR_GPUS"),
        ({"TEACHER_GPUS": "8"}, "9 GPUs are needed and 8 visible"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(place, change, sentence):
    folder, env = place
    refused(run({**env, **change}), sentence)
    assert not (folder / "run").exists() and not list((folder / "seen").iterdir())


def refused(done, sentence):
    assert done.returncode == 1
    [message] = done.stderr.splitlines()
    assert message.startswith(("run_qwen3_8b_tcod.sh: ", "launch: ")) and sentence in message


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("tcod_variant: [f2b\n", "f2b.yaml is no YAML (while parsing a flow sequence"),
        ("tcod_variant\n", "f2b.yaml is no mapping: it must hold tcod_* settings"),
        ("# tcod_variant: f2b\ntcod_variant: b2f\n", "f2b.yaml is not for VARIANT=f2b: change one"),
        ("tcod_variant: |\n  tcod_variant: f2b\n", "f2b.yaml is not for VARIANT=f2b: change one"),
    ],
)
def test_a_config_that_says_something_else_is_refused(place, text, sentence):
    folder, env = place
    (folder / "f2b.yaml").write_text(text)
    refused(run({**env, "DRY_RUN": "1"}), sentence)


def test_a_busy_port_is_refused(place):
    _, env = place
    with socket.create_server(("127.0.0.1", int(env["TEACHER_PORT"]))):
        refused(run(env), f"port {env['TEACHER_PORT']} of 127.0.0.1 is taken: set TEACHER_PORT")


def test_a_resumed_run_keeps_its_settings(place):
    folder, env = place
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("25")
    (folder / "run/tcod.yaml").write_text(Path(env["CONFIG"]).read_text())
    refused(run({**env, "ETA": "2"}), "has other settings than this run")


def test_a_resumed_run_may_write_its_settings_otherwise(place):
    folder, env = place
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("25\n")
    (folder / "run/tcod.yaml").write_text(Path(env["CONFIG"]).read_text())
    config = yaml.safe_load(Path(env["CONFIG"]).read_text())
    Path(env["CONFIG"]).write_text("# the same\n" + json.dumps(dict(reversed(config.items()))))
    done = run({**env, "SKIP_PREFLIGHT": "1"})
    assert done.returncode == 0 and "continues from checkpoint 25\n" in done.stdout, done.stderr


@pytest.fixture
def preflight(place, monkeypatch):
    """check(**options) of preflight.py's checks before a GPU is taken; the message where they refuse."""
    folder, env = place
    monkeypatch.setenv("ALFWORLD_DATA", env["ALFWORLD_DATA"])
    from examples.tcod.errors import ConfigError
    from examples.tcod.tools import check_environment, preflight

    monkeypatch.setattr(check_environment, "EnvironmentPool", LocalPool)
    monkeypatch.setattr(preflight, "start_ray", lambda workers: None)

    def check(**options):
        given = {"config": Path(env["CONFIG"]), "data": folder / "data", "student": folder / "student"}
        given |= {"megatron_teacher": None, "ray_gpus": None, "eval_sets": preflight.EVAL_SETS}
        try:
            preflight.check_run(Namespace(**{**given, **options}))
        except ConfigError as error:
            return str(error)

    return folder, check


def row(**metadata):
    return json.dumps({"prompt": "door", "label": "door", "metadata": metadata}) + "\n"


def test_preflight_accepts_what_can_run(preflight):
    folder, check = preflight
    assert check() is None
    assert check(config=folder / "b2f.yaml", megatron_teacher=folder / "teacher") is None


@pytest.mark.parametrize(
    "file, text, sentence",
    [
        ("f2b.yaml", "tcod_variant: f2b\ntcod_horizon: 4\ntcod_etta: 3\n", "unknown setting tcod_etta"),
        ("f2b.yaml", "tcod_variant: f2b\ntcod_horizon: 4\nlr: 1\n", "sets lr: slime reads this file too late"),
        ("data/train.jsonl", row(goal=2) + "{\n", "line 2 of .*train.jsonl is no row"),
        ("data/train.jsonl", row(), "row 1 of train.jsonl in DATA_DIR cannot be played: its .* has no goal"),
        ("data/valid_seen.jsonl", row(), "row 1 of valid_seen.jsonl in DATA_DIR cannot be played"),
        ("data/train.jsonl", row(goal=1, explode=1), "does not play the row .* env_error: .*the corridor collapsed"),
        ("student/chat_template.jinja", "{{ messages }}", "chat template ends an assistant turn"),
    ],
)
def test_preflight_refuses_what_cannot_run(preflight, file, text, sentence):
    folder, check = preflight
    (folder / file).write_text(text)
    assert re.search(sentence, check())


def test_a_teacher_in_megatron_has_the_students_architecture(preflight):
    folder, check = preflight
    (folder / "teacher/config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": 64}))
    message = check(megatron_teacher=folder / "teacher")
    assert "TEACHER_MODEL differs in num_hidden_layers: take a teacher of the student's architecture" in message


def test_the_ray_cluster_has_the_gpus(preflight, monkeypatch):
    import ray

    _, check = preflight
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 6.0})
    monkeypatch.setattr(ray, "init", lambda address, **_: None)
    assert check(ray_gpus=6) is None
    assert check(ray_gpus=8).startswith("the Ray cluster has 6 GPUs, less than the 8 of ACTOR_NODES x ACTOR_GPUS")

    def nobody(address, **_):
        raise ConnectionError("refused")

    monkeypatch.setattr(ray, "init", nobody)
    assert check(ray_gpus=6).startswith("no Ray answers at RAY_ADDRESS 10.0.0.1:6379 (refused): start it")


def test_evaluation_sets_are_named(preflight):
    folder, check = preflight
    (folder / "data/test.jsonl").write_text(row(goal=2))
    (folder / "data/valid_seen.jsonl").unlink()
    assert check(eval_sets=["test=test.jsonl"]) is None
    assert check(eval_sets=[]) is None
    assert "valid_seen.jsonl cannot be read" in check()
    assert check(eval_sets=["test.jsonl"]) == "EVAL_SETS has 'test.jsonl': write NAME=FILE, with files in DATA_DIR"


# --------------------------------------------------------------------------------------------------------- processes


def heed_signals():
    """What this process may have been started to ignore, in the background or under nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Running:
    """The script as a process, with the output so far in a file."""

    def __init__(self, folder, env, heed=lambda: None):
        self.folder, self.output = folder, folder / "output.txt"
        # A shell in the background would hand over SIGINT ignored.
        with self.output.open("w") as output:
            self.popen = subprocess.Popen(
                ["bash", SCRIPT],
                env={**env, "SKIP_PREFLIGHT": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: (heed_signals(), heed()),
            )

    def wait_for(self, role):
        for _ in range(300):
            if (self.folder / f"seen/{role}.json").exists():
                time.sleep(0.3)  # past the write, into what follows
                return
            time.sleep(0.1)
        raise AssertionError(self.output.read_text())

    def end(self, number=None):
        """(exit status, output) after a signal, or of itself; nothing may be left."""
        if number:
            self.popen.send_signal(number)
        status = self.popen.wait(timeout=10 if number else 60)
        assert processes_of(self.folder / "run") == []
        return status, self.output.read_text()


@pytest.fixture
def script(place):
    """script(**variables) -> Running"""
    folder, env = place
    started = []

    def begin(heed=lambda: None, **variables):
        started.append(Running(folder, {**env, **variables}, heed))
        return started[-1]

    yield begin
    for running in started:
        running.popen.kill()
    for pid, _ in processes_of(folder / "run"):
        os.kill(int(pid), signal.SIGKILL)


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
    env |= {"WANDB_PROJECT": "tcod", "NCCL_DEBUG": "WARN"}
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
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "PYTHONUNBUFFERED",
            "no_proxy",
        ),
        *("NCCL_DEBUG", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_RESUME"),
    }
    assert to_workers["ALFWORLD_DATA"] == f"{folder}/games" and to_workers["NCCL_DEBUG"] == "WARN"
    assert seen["env"]["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5" and seen["env"]["RAY_ADDRESS"] == "local"
    assert seen["env"]["WANDB_RESUME"] == "allow" and seen["env"]["TCOD_RUN_DIR"] == f"{folder}/run"
    (folder / "run/checkpoints").mkdir()
    (folder / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("25")
    time.sleep(1)  # log folders are named by the second
    second = run({**env, "SKIP_PREFLIGHT": "1"})
    assert second.returncode == 0 and "run continues from checkpoint 25\n" in second.stdout
    again = json.loads((folder / "seen/train.json").read_text())
    assert again["command"] == seen["command"]
    assert again["env"]["WANDB_RUN_ID"] == seen["env"]["WANDB_RUN_ID"]
    assert len(list((folder / "run/logs").iterdir())) == 2


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


# ------------------------------------------------------------------------------------------------ slime's own parser

PARSER = """
import json, multiprocessing, sys
from smoke.slime_cpu import check_args
check_args.prepare()
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    refusals = pool.map(check_args.refusal, json.load(sys.stdin), chunksize=1)
print("\\n" + json.dumps(refusals))
"""
QWEN3_8B = {
    **{"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": False},
}
QWEN25_05B = {
    **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True},
}


def test_slimes_parser_takes_the_commands(place, monkeypatch):
    if not (os.environ.get("SLIME_DIR") and os.environ.get("MEGATRON_DIR")):
        pytest.skip("slime's parser: run with SLIME_DIR=/path/to/slime MEGATRON_DIR=/path/to/Megatron-LM")
    folder, env = place
    env |= {name: os.environ[name] for name in ("SLIME_DIR", "MEGATRON_DIR")}
    env |= {"CONFIG": "", "MODEL_SCRIPT": "", "WANDB_PROJECT": "tcod"}
    env["ROUTER_POLICY"] = "cache_aware"  # the public router's parser knows no consistent_hashing
    (folder / "student/config.json").write_text(json.dumps(QWEN3_8B))
    (folder / "teacher/config.json").write_text(json.dumps(QWEN25_05B))
    commands = {}

    def add(name, variables, *arguments):
        run_dir = f"{folder}/{len(commands)}"
        lines, commands[name] = dry_run({**env, **variables, "RUN_DIR": run_dir}, *arguments)
        subprocess.run(["bash", "-c", "\n".join(lines[: lines.index("END") + 1])], check=True)  # writes the YAML

    for variant in ("opd", "f2b", "b2f"):
        for teacher in ("sglang", "megatron"):
            add((variant, teacher), {"VARIANT": variant, "TEACHER": teacher})
    monkeypatch.syspath_prepend(env["SLIME_DIR"])
    short = short_test()
    for variant in short.VARIANTS:
        add(("short", variant), {**short.settings(variant), "STUDENT": f"{folder}/teacher"}, *short.FLAGS)
    add("typo", {"VARIANT": "f2b"}, "--opd-kl-coeff", "1")
    path = [ROOT, env["SLIME_DIR"], env["MEGATRON_DIR"], env["PYTHONPATH"]]
    done = subprocess.run(
        [sys.executable, "-c", PARSER],
        input=json.dumps(list(commands.values())),
        env={**env, "PYTHONPATH": os.pathsep.join(map(str, path)), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refusals = dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))
    assert refusals.pop("typo") == "no parser knows --opd-kl-coeff"
    assert refusals == dict.fromkeys(refusals)


def short_test():
    """slime's GPU test of the recipe; its name, with a dot as slime's have, cannot be imported."""
    spec = importlib.util.spec_from_file_location("tcod_short", ROOT / "tests/test_qwen2.5_0.5B_tcod_short.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
