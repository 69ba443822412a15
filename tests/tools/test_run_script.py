"""The cluster's run script, as far as a machine without GPUs goes: what it would run, and what it refuses.

fake_cluster.py stands for the GPUs, SGLang and slime's train.py.
"""

import json
import re
import socket
import subprocess

import pytest
import yaml

from examples.tcod import ConfigError
from examples.tcod.tools.launch import __main__ as launcher
from examples.tcod.tools.launch import variables as of_script
from examples.tcod.tools.launch.variables import (
    Settings,
    check_machine,
    check_settings,
    eval_flags,
    read_tcod,
    visible_gpus,
)
from tests.support.fake_cluster import executable
from tests.support.run_script import ROOT, SCRIPT, commands, dry_run, run, value

NUM_GPUS = 0

# The variables; the program, the function, the GPUs of training and rollouts, and the teacher's.
MODES = {
    "sync": ({}, "train.py", "generate_rollout", 6, [6, 7]),
    "async": ({"MODE": "async"}, "train_async.py", "generate_rollout", 6, [6, 7]),
    "fully_async": ({"MODE": "fully_async"}, "train_async.py", "generate_rollout_fully_async", 6, [6, 7]),
    "colocated": ({"COLOCATE": "1"}, "train.py", "generate_rollout", 4, [4, 5, 6, 7]),
    "megatron": ({"TEACHER": "megatron"}, "train.py", "generate_rollout", 8, []),
    "self": ({"TEACHER": "self"}, "train.py", "generate_rollout", 8, []),
    "none": ({"TEACHER": "none", "REWARD_COEF": "0.5"}, "train.py", "generate_rollout", 8, []),
    "sft": ({"VARIANT": "sft"}, "train.py", "generate_rollout", 8, []),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_program_flags_and_gpus(place, mode):
    folder, _ = place
    variables, program, function, gpus, teacher_gpus = MODES[mode]
    asked = commands(place, "--seed", "7", **variables)
    flags, s = asked.train, Settings.read(asked.env)
    assert flags[:4] == ["python3", f"{folder}/slime/{program}", "--num-layers", "2"] and asked.extra == [
        "--seed",
        "7",
    ]
    assert value(flags, "--rollout-function-path") == f"tcod.tcod_rollout.{function}"
    assert value(flags, "--load") == value(flags, "--save") == f"{folder}/run/checkpoints"
    assert ("--use-tis" in flags) == (mode in ("async", "fully_async"))
    assert ("--colocate" in flags) == (mode in ("colocated", "megatron"))
    assert ("--eval-interval" in eval_flags(s, {}, [])) == (mode not in ("fully_async", "sft"))
    assert "--offload-train" not in flags and "--use-fault-tolerance" in flags
    assert (s.local_gpus, s.teacher_gpus) == (gpus, teacher_gpus)
    assert ["--use-opd" in flags, *re.findall(r"--opd-type (\w+)", " ".join(flags))] == (
        [False] if mode in ("none", "sft") else [True, s.teacher.replace("self", "sglang")]
    )
    assert ("--debug-train-only" in flags, "sft_loss" in flags) == (mode == "sft",) * 2
    if teacher_gpus:
        assert value(asked.teacher, "--tp") == str(len(teacher_gpus))
        assert value(flags, "--rm-url") == f"http://127.0.0.1:{s.teacher_port}/generate"
    else:
        assert asked.teacher == [] and ("--rm-url" in flags) == (mode == "self")
        assert mode in ("none", "self", "sft") or value(flags, "--opd-teacher-load") == f"{folder}/teacher"


@pytest.mark.parametrize("batch, gpus, engine, tasks", [(16, 2, 1, 8), (16, 6, 2, 6), (8, 64, 8, 1)])
def test_a_fully_asynchronous_run_plays_about_a_batch_at_once(place, batch, gpus, engine, tasks):
    variables = {"MODE": "fully_async", "BATCH": f"{batch}", "ROLLOUT_GPUS": f"{gpus}", "ENGINE_GPUS": f"{engine}"}
    assert value(commands(place, **variables).train, "--sglang-server-concurrency") == str(tasks)
    assert value(commands(place, **variables, CONCURRENCY="32").train, "--sglang-server-concurrency") == "32"


def test_lengths_memory_heads_and_checkpoints(place):
    flags = commands(place).train
    turn, context = (int(value(flags, f"--rollout-max-{name}-len")) for name in ("response", "context"))
    assert turn == 512 and context >= 500 + 30 * (turn + 375)  # the rules, and a horizon of full length
    assert value(flags, "--save-retain-interval") == str(25 * 251)
    assert value(flags, "--save-hf") == f"{place[0]}/run/hf/{{rollout_id}}"
    variables = {"ACTOR_GPUS": "8", "PIPELINE_PARALLEL": "2", "CONTEXT_PARALLEL": "2", "MAX_CONTEXT_LEN": "27649"}
    asked = commands(place, **variables, KEEP_CHECKPOINTS="all", SAVE_HF="0", FP32_HEADS="1", SAMPLES_PER_TASK="2")
    assert value(asked.train, "--global-batch-size") == "32"
    assert value(asked.train, "--tensor-model-parallel-size") == "2"
    assert value(asked.train, "--max-tokens-per-gpu") == "13825"  # which slime multiplies by CONTEXT_PARALLEL
    assert not {"--save-retain-interval", "--save-hf"} & {*asked.train}
    assert "--sglang-enable-fp32-lm-head" in asked.train and "--enable-fp32-lm-head" in asked.teacher


@pytest.mark.parametrize("host, address", [("10.0.0.3", "10.0.0.3"), ("fd00::3", "[fd00::3]")])
def test_in_a_cluster_other_nodes_reach_the_teacher(place, host, address):
    executable(place[0] / "bin/hostname", f"#!/bin/sh\necho {host} 10.9.9.9\n")
    asked = commands(place, RAY_ADDRESS="10.0.0.1:6379", ACTOR_NODES="2", TEACHER_GPUS="0")
    s = Settings.read(asked.env)
    assert value(asked.teacher, "--host") == host and s.teacher_address == f"http://{address}:{s.teacher_port}"
    assert value(asked.train, "--rm-url") == f"{s.teacher_address}/generate"
    assert (s.ray_address, s.local_gpus, s.train_gpus) == ("10.0.0.1:6379", 0, 10)
    assert Settings.read({**asked.env, "RAY_ADDRESS": "local"}).ray_address == ""  # one that starts here


@pytest.mark.parametrize("given, config, variant", [("", "", "f2b"), ("", "b2f", "b2f"), ("opd", "b2f", "opd")])
def test_a_variable_wins_over_config(place, given, config, variant):
    arm = f"'tcod_variant' : {config}  # arm\n" if config else ""
    (place[0] / "mine.yaml").write_text(f"tcod_horizon: !!int '30'\ntcod_eta: 6  # tcod_eta: 9\n{arm}")
    changes = {"CONFIG": f"{place[0]}/mine.yaml", "VARIANT": given, "RUN_DIR": "", "ETA": "2", "EVAL_TEMPERATURE": "1"}
    env = commands(place, **changes).env
    assert env["RUN_DIR"] == f"/root/tcod_runs/mine-qwen3-8b-{variant}"
    recipe = {"tcod_variant": variant, "tcod_horizon": 30, "tcod_eta": 2, "tcod_eval_kl": True}
    assert read_tcod(Settings.read(env), env) == recipe


def test_the_arm_of_config_is_found_in_any_locale(place):
    config = place[0] / "mine.yaml"
    config.write_bytes("tcod_variant: b2f  # d\u00e9j\u00e0 vu\n".encode())
    (place[0] / "yaml.py").write_text("raise SystemExit(1)")  # where the script is called from
    bare = {"VARIANT": "", "CONFIG": str(config), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for script, folder in ((SCRIPT, place[0]), (SCRIPT.relative_to(ROOT), ROOT)):
        done = run({**place[1], **bare, "FAKE_LAUNCH": "1", "CDPATH": "."}, script=script, cwd=folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads((place[0] / "seen/launch.json").read_text())["env"]["VARIANT"] == "b2f"


def test_another_environment_gets_nothing_of_alfworld(place):
    assert commands(place, EVAL_SETS="").env["EVAL_SETS"] == ""  # ALFWorld's own can be left out
    del place[1]["ALFWORLD_DATA"]
    config = "examples/tcod/configs/scienceworld.yaml"
    env = commands(place, CONFIG=config, VARIANT="", RUN_DIR="", DATA_DIR="").env
    assert "ALFWORLD_DATA" not in env and env["EVAL_SETS"] == env["WORKER_ENV"] == ""
    assert env["DATA_DIR"] == "/root/tcod_scienceworld"
    assert env["RUN_DIR"] == "/root/tcod_runs/scienceworld-qwen3-8b-f2b"


def test_what_hangs_prints_nothing(monkeypatch):
    monkeypatch.setattr(of_script, "OUTPUT_S", 0.1)
    assert of_script.output("sleep", "600") == of_script.output("false") == of_script.output("/nowhere") == ""
    assert of_script.output("echo", "1") == "1\n"


def test_gpus_are_numbered_within_the_visible_ones(place, monkeypatch):
    monkeypatch.setenv("PATH", place[1]["PATH"])
    for visible, gpus in [("8,9,10", ["8", "9", "10"]), ("", list("01234567"))]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert visible_gpus() == gpus
    assert launcher.pick(["8", "9", "10"], [1, 2, 3]) == "9,10,3"


def test_a_dry_run_prints_what_can_be_pasted_and_starts_nothing(place):
    folder, env = place
    env |= {"RUN_DIR": f"{folder}/it's a run", "HORIZON": "20", "TEACHER_SEES": "demo hindsight"}
    lines, flags = dry_run(env, "--wandb-group", "$(touch x) 'and' more")
    assert not (folder / "it's a run").exists() and not list((folder / "seen").iterdir())
    assert lines[-2].startswith("CUDA_VISIBLE_DEVICES=6,7 python3 -m sglang")
    assert lines.pop(-2).endswith(f" --context-length {27648 + 4096 + 7} &")  # an episode and the teacher's note
    assert lines[-1].startswith("RAY_ADDRESS=local CUDA_VISIBLE_DEVICES=0,1,2,3,4,5 python3 ")
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], env={"PATH": env["PATH"]}, cwd=folder, timeout=60)
    seen = json.loads((folder / "seen/train.json").read_text())
    assert done.returncode == 0 and seen["command"][1:] == flags and seen["folder"] == f"{folder}/slime"
    settings = yaml.safe_load((folder / "alfworld.yaml").read_text()) | {"tcod_variant": "f2b", "tcod_horizon": 20}
    settings |= {"tcod_teacher_sees": "demo hindsight"}
    assert yaml.safe_load((folder / "it's a run/tcod.yaml").read_text()) == settings


def test_a_dry_run_needs_neither_gpus_nor_checkpoints_and_prints_no_secret(place):
    folder, env = place
    (folder / "bin/nvidia-smi").unlink()
    with (folder / "alfworld.yaml").open("a") as config:
        config.write("tcod_env_args: {api_key: abc123, size: 9}\n")
    env |= {"SHOP_KEY": "abc123", "SHOP_SIZE": "9", "WORKER_ENV": "SHOP_KEY SHOP_SIZE", "WANDB_API_KEY": "abc123"}
    env |= {"TEACHER_URL": "http://me:abc123@a:1", "STUDENT": "/nowhere", "DATA_DIR": "/nowhere"}
    lines, flags = dry_run(env, "--wandb-key", "abc123")
    assert "abc123" not in "\n".join(lines) and "export SHOP_SIZE=9" in lines and "  size: 9" in lines
    assert value(flags, "--wandb-key") == "SECRET" and value(flags, "--rm-url") == "http://SECRET@a:1/generate"


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"VARIANT": "f2bb"}, "VARIANT must be opd, f2b, b2f, reopd or sft, not f2bb"),
        ({"HORIZON": "09"}, "HORIZON must be a positive whole number, not 09"),
        ({"EVAL_TEMPERATURE": "x"}, "EVAL_TEMPERATURE must be a number like 0.5, not x"),
        ({"REWARD_COEF": "-1"}, "REWARD_COEF must be a number like 0.5, not -1"),
        ({"REWARD_COEF": ".5"}, "REWARD_COEF must be a number like 0.5, not .5"),
        ({"TEACHER": "some"}, "TEACHER must be sglang, self, megatron or none, not some"),
        ({"COLOCATE": "yes"}, "COLOCATE must be 0 or 1, not yes"),
        ({"TEACHER_GPUS": "6-7"}, "TEACHER_GPUS must be numbers like 6,7, not 6-7"),
        ({"MODEL_SCRIPT": "/nowhere"}, "no file /nowhere: set SLIME_DIR to slime's checkout, or MODEL_SCRIPT"),
    ],
)
def test_the_script_refuses_what_it_cannot_compute_with(place, change, sentence):
    done = run({**place[1], **change})
    assert (done.returncode, done.stderr) == (1, f"run_qwen3_8b_tcod.sh: {sentence}\n")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("BATCH=6 TENSOR_PARALLEL=1", "and BATCH x SAMPLES_PER_TASK a multiple of the copies"),
        ("PIPELINE_PARALLEL=8 TENSOR_PARALLEL=0", "the 4 GPUs of ACTOR_NODES x ACTOR_GPUS must be a multiple of"),
        ("ENGINE_GPUS=4", "ENGINE_GPUS 4 must divide ROLLOUT_GPUS 2"),
        ("COLOCATE=1", "COLOCATE=1 has the engines on the 4 GPUs that train: unset ROLLOUT_GPUS"),
        ("TEACHER=megatron", "TEACHER=megatron needs COLOCATE=1"),
        ("TEACHER=megatron COLOCATE=1 ROLLOUT_GPUS=4 TEACHER_URL=http://a:1", "no other server: unset TEACHER_URL"),
        ("TEACHER=none TEACHER_URL=http://a:1", "TEACHER=none asks no other server: unset TEACHER_URL"),
        ("TEACHER_URL=http://a:1/generate", "must be http://HOST:PORT, an IPv6 address in brackets, not http://a:1/g"),
        ("TEACHER_URL=http://me:word@fd00::1:8000", "in brackets, not http://SECRET@fd00::1:8000"),
        ("VARIANT=sft MODE=async", "VARIANT=sft plays nothing, so nothing ahead: set MODE=sync"),
        ("TEACHER_GPUS=5,6", "GPU 5 of TEACHER_GPUS is taken: training and the student's engines have 0 to 5"),
        ("CHAT_TEMPLATE_KWARGS=thinking", "CHAT_TEMPLATE_KWARGS must be a JSON object like {}"),
        ("RAY_ADDRESS=a:1 TEACHER_HOST=0.0.0.0", "TEACHER_HOST 0.0.0.0 names no node: set the address that the"),
        ("RUN_DIR=/runs/{lr=1e-6}", "RUN_DIR '/runs/{lr=1e-6}' has a brace or a line break: rename it"),
        ("EVAL_SETS=valid_seen.jsonl", "EVAL_SETS must be NAME=FILE.jsonl, with spaces between"),
        ("EVAL_SETS=seen=a.json", "NAME of letters, digits, . _ -: not seen=a.json"),
        ("EVAL_SETS=a/b=a.jsonl", "not a/b=a.jsonl"),
        ("EVAL_SETS=--x=a.jsonl", "not --x=a.jsonl"),
        ("EVAL_SETS=train=a.jsonl", "EVAL_SETS has the name train, which is taken"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings, change, sentence):
    with pytest.raises(ConfigError) as error:
        check_settings(settings(**dict(pair.split("=", 1) for pair in change.split())), [])
    assert sentence in str(error.value)
    with pytest.raises(ConfigError, match="EVAL_SETS has the name a, which is taken: choose another one"):
        settings(EVAL_SETS="a=a.jsonl a=b.jsonl")


def test_a_reward_that_cannot_work_is_refused(settings):
    """Which ones cannot: test_configuration.py."""
    variables = {"TEACHER": "none", "REWARD_COEF": "0.5", "SAMPLES_PER_TASK": "2"}
    assert read_tcod(settings(**variables), variables)["tcod_reward_coef"] == 0.5
    for change in ({"REWARD_COEF": ""}, {"TEACHER": "sglang", "VARIANT": "sft"}, {"SAMPLES_PER_TASK": "1"}):
        with pytest.raises(ConfigError, match="REWARD_COEF"):
            read_tcod(settings(**variables | change), variables | change)


@pytest.mark.parametrize(
    "flag, variable",
    [("--colocate", "COLOCATE"), ("--load=/x", "RUN_DIR"), ("--rollout-max-context-len", "MAX_CONTEXT_LEN")],
)
def test_a_flag_that_a_variable_stands_for_is_refused(settings, flag, variable):
    with pytest.raises(ConfigError, match=f"{flag.partition('=')[0]} is the script's own: set {variable} instead"):
        check_settings(settings(), ["--seed", "7", flag])
    check_settings(settings(), ["--seed", "7"])


def test_an_evaluation_is_played_where_it_is_checked(settings, tmp_path):
    s = settings(EVAL_SETS=f"easy=more/a.jsonl held={tmp_path}/x.jsonl")
    assert [*map(str, s.eval_files.values())] == [f"{tmp_path}/data/more/a.jsonl", f"{tmp_path}/x.jsonl"]
    pairs = [str(word) for pair in s.eval_files.items() for word in pair]
    assert eval_flags(s, {}, [])[-5:] == ["--eval-prompt-data", *pairs]
    kl = {"tcod_eval_kl": True}  # by CONFIG; the temperature is 0.4
    assert eval_flags(settings(EVAL_SETS=""), kl, []) == [] != eval_flags(s, kl, ["--eval-config=mine.yaml"])
    with pytest.raises(ConfigError, match="EVAL_TEMPERATURE=1"):
        eval_flags(s, kl, [])
    (tmp_path / "alfworld.yaml").write_text("tcod_horizon: 4\ntcod_eval_kl: true\n")
    with pytest.raises(ConfigError, match="tcod_eval_kl asks a teacher's own server"):
        read_tcod(settings(TEACHER="self"), {})


def test_what_does_not_fit_the_machine_is_refused(settings, tmp_path, capsys):
    (tmp_path / "run").mkdir()

    def refusal(gpus, **changes):
        with pytest.raises(ConfigError) as error:
            check_machine(settings(**changes), gpus)
        return str(error.value)

    gpus = list("01234567")
    check_machine(settings(ACTOR_GPUS="2", TENSOR_PARALLEL="2"), gpus)
    assert "2 of 8 GPUs are not used: see ACTOR_GPUS" in capsys.readouterr().out
    assert "8 GPUs are needed and 3 visible: see ACTOR_GPUS" in refusal(gpus[:3])
    assert "CUDA_VISIBLE_DEVICES has GPU-7777-a: set it to indices" in refusal(["GPU-7777-a"])
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is taken: set TEACHER_PORT, or" in refusal(gpus, TEACHER_PORT=port)
    with (tmp_path / "student/model.safetensors").open("w") as weights:
        weights.truncate(2 * 8_200_000_000_000)  # 2 checkpoints of 14 bytes per parameter, and 10 copies of 2
    assert "and 2 checkpoints and the copies for Hugging Face take 393600 GB more: set" in refusal(gpus)
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "student")  # what a resumed run has already
    assert "take 377200 GB more: set" in refusal(gpus)
    assert "and 10 checkpoints and" in refusal(gpus, KEEP_CHECKPOINTS="all")
    assert "and 3 checkpoints and" in refusal(gpus, SAVE_INTERVAL="1")  # Megatron keeps that of rollout 0


# ------------------------------------------------------------------------------------------------------------ RUN_DIR
