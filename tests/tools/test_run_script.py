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
    return subprocess.run(["bash", script, *arguments], env=env, capture_output=True, text=True, timeout=120)


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
    done = subprocess.run(["bash", script], env=env, cwd=script.parent, capture_output=True, text=True, timeout=120)
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
        ("data/train.jsonl", row(goal=1, explode=1), "does not play the row .* of train.jsonl in DATA_DIR, env_error: .*the corridor collapsed"),
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
