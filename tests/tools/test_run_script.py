"""The cluster's run script, as far as a machine without GPUs goes: what it would run, and what it refuses.

fake_cluster.py stands for the GPUs, SGLang and slime's train.py.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.run_script import checkpoint, dry_run, own_settings, refused, run, value

NUM_GPUS = 0

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
        assert "--opd-teacher-load" not in flags and "--colocate" not in flags
    else:
        assert not servers and "--rm-url" not in flags and "--colocate" in flags
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


def test_gpus_may_be_visible_by_their_uuids(place):
    """As SLURM and Kubernetes have them; slime's int() does not take them."""
    _, env = place
    env |= {"CUDA_VISIBLE_DEVICES": "GPU-7777,GPU-6666-aaaa,GPU-0000", "ACTOR_GPUS": "1", "ROLLOUT_GPUS": "1"}
    lines, _ = dry_run({**env, "TEACHER_GPUS": "2"})
    assert "export CUDA_VISIBLE_DEVICES=7,6" in lines and "export CUDA_DEVICE_ORDER=PCI_BUS_ID" in lines
    assert any(line.startswith("CUDA_VISIBLE_DEVICES=0 python3 -m sglang") for line in lines)


MODES = {
    "sync": ({}, "tcod_rollout.generate_rollout"),
    "async": ({"MODE": "async"}, "tcod_rollout.generate_rollout"),
    "fully_async": ({"MODE": "fully_async"}, "fully_async_rollout.generate_rollout_fully_async"),
    "colocated": ({"COLOCATE": "1"}, "tcod_rollout.generate_rollout"),
    "the teacher in Megatron": ({"TEACHER": "megatron"}, "tcod_rollout.generate_rollout"),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_program_and_flags(place, mode):
    _, env = place
    variables, function = MODES[mode]
    lines, flags = dry_run({**env, **variables})
    assert value(flags, "--rollout-function-path") == f"tcod.{function}"
    assert ("--use-tis" in flags) == (mode in ("async", "fully_async"))
    assert ("--eval-interval" in flags) == (mode != "fully_async")
    assert ("--colocate" in flags) == (mode in ("colocated", "the teacher in Megatron"))
    assert "--offload-train" not in flags and "--use-fault-tolerance" in flags
    gpus = {"colocated": "0,1,2,3", "the teacher in Megatron": "0,1,2,3,4,5,6,7"}.get(mode, "0,1,2,3,4,5")
    assert f"export CUDA_VISIBLE_DEVICES={gpus}" in lines
    teachers = [line.partition(" ")[0] for line in lines if "sglang.launch_server" in line]
    taken = {"colocated": ["4,5,6,7"], "the teacher in Megatron": []}.get(mode, ["6,7"])
    assert teachers == [f"CUDA_VISIBLE_DEVICES={numbers}" for numbers in taken]
    engines = {"colocated": "4", "the teacher in Megatron": "8"}.get(mode, "2")
    assert value(flags, "--rollout-num-gpus") == engines


@pytest.mark.parametrize(
    "batch, gpus, engine, tasks", [("16", "2", "1", "8"), ("16", "6", "2", "6"), ("8", "64", "8", "1")]
)
def test_a_fully_asynchronous_run_plays_about_a_batch_at_once(place, batch, gpus, engine, tasks):
    _, env = place
    env |= {
        "MODE": "fully_async",
        "BATCH": batch,
        "ROLLOUT_GPUS": gpus,
        "ENGINE_GPUS": engine,
        "TEACHER_URL": "http://a:1",
    }
    assert value(dry_run(env)[1], "--sglang-server-concurrency") == tasks
    assert value(dry_run({**env, "CONCURRENCY": "32"})[1], "--sglang-server-concurrency") == "32"


def test_the_default_context_holds_the_horizon_at_full_length(place):
    """The rules, and 30 turns of a response and the longest list of admissible actions."""
    _, flags = dry_run(place[1])
    turn, context = (int(value(flags, f"--rollout-max-{name}-len")) for name in ("response", "context"))
    assert turn == 512 and context >= 500 + 30 * (turn + 375)


def test_context_parallelism_saves_memory(place):
    """slime multiplies --max-tokens-per-gpu by it."""
    _, env = place
    env |= {"ACTOR_GPUS": "8", "PIPELINE_PARALLEL": "2", "CONTEXT_PARALLEL": "2", "TEACHER_URL": "http://a:1"}
    _, flags = dry_run({**env, "MAX_CONTEXT_LEN": "27649"})
    assert value(flags, "--tensor-model-parallel-size") == "2" and value(flags, "--max-tokens-per-gpu") == "13825"
    assert value(flags, "--pipeline-model-parallel-size") == value(flags, "--context-parallel-size") == "2"
    dry_run({**env, "BATCH": "5", "MAX_CONTEXT_LEN": "8192"})  # one copy of the model
    refused(run({**env, "BATCH": "5", "TENSOR_PARALLEL": "1"}), "a multiple of 2, the copies of the model in training")


def test_evaluation_sets_and_template_arguments_are_the_users(place):
    folder, env = place
    env |= {"EVAL_SETS": "easy=a.jsonl hard=more/b.jsonl", "CHAT_TEMPLATE_KWARGS": '{"thinking": false}'}
    _, flags = dry_run(env)
    at = flags.index("--eval-prompt-data") + 1
    assert flags[at : at + 4] == ["easy", f"{folder}/data/a.jsonl", "hard", f"{folder}/data/more/b.jsonl"]
    assert value(flags, "--apply-chat-template-kwargs") == '{"thinking": false}'
    assert "--eval-interval" not in dry_run({**env, "EVAL_SETS": ""})[1]


def test_heads_in_float32(place):
    _, env = place
    lines, flags = dry_run({**env, "FP32_HEADS": "1"})
    assert "--sglang-enable-fp32-lm-head" in flags
    assert any("sglang.launch_server" in line and "--enable-fp32-lm-head" in line for line in lines)
    assert "fp32-lm-head" not in "\n".join(dry_run(env)[0])


def test_checkpoints_are_pruned_and_exported(place):
    folder, env = place
    _, flags = dry_run(env)
    assert value(flags, "--save-retain-interval") == "25"
    assert value(flags, "--save-hf") == f"{folder}/run/hf/{{rollout_id}}"
    _, flags = dry_run({**env, "KEEP_CHECKPOINTS": "all", "SAVE_HF": "0"})
    assert "--save-retain-interval" not in flags and "--save-hf" not in flags


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


def test_a_key_of_the_environment_or_the_teacher_is_not_printed(place):
    _, env = place
    env |= {"SHOP_API_KEY": "abc123", "SHOP_SIZE": "9", "WORKER_ENV": "SHOP_API_KEY SHOP_SIZE"}
    lines, _ = dry_run({**env, "TCOD_TEACHER_API_KEY": "abc123"})
    assert "abc123" not in "\n".join(lines) and "export SHOP_SIZE=9" in lines


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"VARIANT": "f2bb"}, "VARIANT must be one of opd, f2b, b2f, reopd, not f2bb"),
        ({"TEACHER": "vllm"}, "TEACHER must be sglang or megatron, not vllm"),
        ({"BATCH": "0"}, "BATCH must be a positive whole number, not 0"),
        ({"ETA": "1.5"}, "ETA must be a positive whole number, not 1.5"),
        ({"CONFIG": "/nowhere"}, "no file /nowhere: set CONFIG"),
        ({"VARIANT": "b2f"}, "f2b.yaml is not for VARIANT=b2f: change one"),
        ({"VARIANT": "opd", "CONFIG": "", "ETA": "3"}, "VARIANT=opd has none: unset ETA"),
        ({"MAX_TURN_LEN": "512", "MAX_CONTEXT_LEN": "512"}, "MAX_TURN_LEN 512 is one turn of MAX_CONTEXT_LEN"),
        ({"TENSOR_PARALLEL": "3"}, "TENSOR_PARALLEL 3 x PIPELINE_PARALLEL 1 x CONTEXT_PARALLEL 1 must divide the 4"),
        ({"PIPELINE_PARALLEL": "8"}, "TENSOR_PARALLEL 0 x PIPELINE_PARALLEL 8 x CONTEXT_PARALLEL 1 must divide the 4"),
        ({"MODE": "asynchronous"}, "MODE must be sync, async or fully_async, not asynchronous"),
        ({"COLOCATE": "yes"}, "COLOCATE must be 0 or 1, not yes"),
        ({"COLOCATE": "1", "MODE": "async"}, "and MODE=async needs both at once: take MODE=sync"),
        ({"COLOCATE": "1", "ROLLOUT_GPUS": "2"}, "COLOCATE=1 has the engines on the 4 GPUs that train: unset ROLLOUT"),
        ({"TEACHER": "megatron", "COLOCATE": "0"}, "TEACHER=megatron needs COLOCATE=1: elsewhere slime pushes"),
        ({"TEACHER": "megatron", "MODE": "fully_async"}, "MODE=fully_async needs both at once"),
        ({"ENGINE_GPUS": "4"}, "ENGINE_GPUS 4 must divide ROLLOUT_GPUS 2"),
        ({"CHAT_TEMPLATE_KWARGS": "thinking=off"}, "CHAT_TEMPLATE_KWARGS must be a JSON object like {}"),
        ({"EVAL_SETS": "valid_seen.jsonl"}, "EVAL_SETS must be NAME=FILE, files in DATA_DIR, with spaces between"),
        ({"EVAL_SETS": "seen=gone.jsonl"}, "data/gone.jsonl: prepare the data as README.md says, or set DATA_DIR or"),
        ({"WORKER_ENV": "JAVA_HOME_"}, "WORKER_ENV names JAVA_HOME_, which is not set: export it"),
        ({"KEEP_CHECKPOINTS": "3"}, "KEEP_CHECKPOINTS must be last or all, not 3"),
        ({"SAVE_INTERVAL": "1"}, "Megatron deletes no checkpoint with SAVE_INTERVAL=1: set 2 or more"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-9999"}, "has GPU-9999, which is no GPU of nvidia-smi, and slime wants indices"),
        ({"TENSOR_PARALLEL": "1", "BATCH": "6"}, "BATCH x SAMPLES_PER_TASK must be a multiple of 4"),
        ({"ACTOR_NODES": "2"}, "ACTOR_NODES is 2: set RAY_ADDRESS"),
        ({"TEACHER": "megatron", "TEACHER_URL": "http://a:1"}, "TEACHER=megatron asks no server: unset TEACHER_URL"),
        ({"TEACHER_URL": "http://a:1/generate"}, "TEACHER_URL must be http://HOST:PORT, not http://a:1/generate"),
        ({"TEACHER_GPUS": "6-7"}, "TEACHER_GPUS must be numbers like 6,7, not 6-7"),
        ({"TEACHER_GPUS": "5,6"}, "GPU 5 of TEACHER_GPUS is taken: training and the student's engines have 0 to 5"),
        ({"MODEL_SCRIPT": "/nowhere"}, "no file /nowhere: set SLIME_DIR to slime's checkout, or MODEL_SCRIPT"),
        ({"MEGATRON_DIR": "/nowhere"}, "no Megatron-LM in /nowhere: set MEGATRON_DIR"),
        ({"STUDENT": "/nowhere"}, "no config.json in /nowhere: set STUDENT"),
        ({"STUDENT_LOAD": "/nowhere"}, "no weights in /nowhere: set STUDENT_LOAD"),
        ({"TEACHER_MODEL": "/nowhere"}, "no config.json in /nowhere: set TEACHER_MODEL"),
        ({"TEACHER": "megatron", "TEACHER_LOAD": "/nowhere"}, "no weights in /nowhere: set TEACHER_LOAD"),
        ({"HORIZON": "09"}, "HORIZON must be a positive whole number, not 09"),
        ({"DATA_DIR": "/nowhere"}, "no rows in /nowhere/train.jsonl: prepare the data as README.md says, or"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, "8 GPUs are needed and 3 visible: change ACTOR_GPUS"),
        ({"TEACHER_GPUS": "8"}, "9 GPUs are needed and 8 visible"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(place, change, sentence):
    folder, env = place
    refused(run({**env, **change}), sentence)
    assert not (folder / "run").exists() and not list((folder / "seen").iterdir())


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


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--colocate"], "--colocate also changes other flags: set COLOCATE=1"),
        (["--rollout-num-gpus", "4"], "--rollout-num-gpus is the script's own: set ROLLOUT_GPUS"),
        (["--offload-train"], "--offload-train lets slime push weights from memory that it has given up: remove it"),
    ],
)
def test_an_argument_that_passes_by_the_checks_is_refused(place, arguments, sentence):
    _, env = place
    refused(run({**env, "DRY_RUN": "1"}, *arguments), sentence)


def test_a_disk_that_is_too_small_is_refused(place):
    """2 checkpoints of 14 bytes per parameter, and 10 copies of 2, for 8.2e12 parameters."""
    folder, env = place
    with (folder / "student/model.safetensors").open("w") as weights:
        weights.truncate(2 * 8_200_000_000_000)
    refused(run(env), "and 2 checkpoints and the copies for Hugging Face take 393600 GB more: set another RUN_DIR")
    refused(run({**env, "KEEP_CHECKPOINTS": "all", "SAVE_HF": "0"}), "and 10 checkpoints and")
    assert not (folder / "run").exists()


def test_unused_gpus_are_named(place):
    _, env = place
    done = run({**env, "ACTOR_GPUS": "2", "SKIP_PREFLIGHT": "1"})
    assert "GPUs 4,5 are not used: see ACTOR_GPUS" in done.stdout


def test_a_checkpoint_without_the_position_in_the_data_is_refused(place):
    folder, env = place
    checkpoint(folder, 24).unlink()
    refused(run(env), "checkpoint 24 has no ")
    (folder / "run/checkpoints/rollout/global_dataset_state_dict_7.pt").write_text("")
    (folder / "run/checkpoints/rollout/global_dataset_state_dict_16.pt").write_text("")
    refused(run(env), "copy global_dataset_state_dict_16.pt there, whereby the tasks since rollout 16 come again, or")


def test_a_busy_port_is_refused(place):
    _, env = place
    with socket.create_server(("127.0.0.1", int(env["TEACHER_PORT"]))):
        refused(run(env), f"port {env['TEACHER_PORT']} of 127.0.0.1 is taken: set TEACHER_PORT")


def test_a_resumed_run_keeps_its_settings(place):
    folder, env = place
    checkpoint(folder, 24)
    (folder / "run/tcod.yaml").write_text(Path(env["CONFIG"]).read_text())
    refused(run({**env, "ETA": "2"}), "has other settings than this run")


def test_a_resumed_run_may_write_its_settings_otherwise(place):
    folder, env = place
    checkpoint(folder, 24)
    (folder / "run/tcod.yaml").write_text(Path(env["CONFIG"]).read_text())
    config = yaml.safe_load(Path(env["CONFIG"]).read_text())
    Path(env["CONFIG"]).write_text("# the same\n" + json.dumps(dict(reversed(config.items()))))
    done = run({**env, "SKIP_PREFLIGHT": "1"})
    assert done.returncode == 0 and "continues from checkpoint 24\n" in done.stdout, done.stderr
