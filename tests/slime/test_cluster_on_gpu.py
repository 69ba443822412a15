"""The run script on one GPU that slime's training and the student's engine share, for both kinds of teacher.

Needs SLIME_DIR and MEGATRON_DIR, a GPU, and SGLang with its GPU kernels, as slime's container has them. Where there is
no TransformerEngine, Megatron's layers are those of smoke/slime_cpu/cpu_layer_spec.py.
"""

import ast
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

if not (os.environ.get("SLIME_DIR") and os.environ.get("MEGATRON_DIR") and torch.cuda.is_available()):
    pytest.skip(
        "the run script on a GPU: run with SLIME_DIR=/path/to/slime MEGATRON_DIR=/path/to/Megatron-LM",
        allow_module_level=True,
    )

from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.tcod.tools.launch.processes import Process
from smoke import make_models
from smoke.servers import free_port, wait_ready
from smoke.train_slime import CPU_SETTINGS, as_flags
from tests.support import cpu_cluster

NUM_GPUS = 1
SCRIPT = cpu_cluster.ROOT / "examples/tcod/run_qwen3_8b_tcod.sh"
ON_GPU = {"SGLANG_USE_CPU_ENGINE": "0"}  # other tests' servers are on the CPU
ENGINE = ["--attention-backend", "triton", "--sampling-backend", "pytorch"]  # what a bare SGLang has
SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
SHOWN = ("train/loss", "train/grad_norm", "train/opd_reverse_kl", "train/train_rollout_logprob_abs_diff")
PRINTED = ("kl/token", "kl/trajectory", "turns/student", "tokens/trained", "rollout_s", "/failed")
START_S, RUN_S = 900, 3600
NOISE = 0.1  # of the teacher's parameters to the student's, relative


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """(folder, the script's variables, its arguments), with the teacher's server up."""
    place = tmp_path_factory.mktemp("cluster")
    make_pair(place / "student", place / "teacher")
    variables, flags = cpu_cluster.build(place, place / "student", place / "teacher")
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # nothing that stands for a GPU
    # The learning rate is so high that an engine with the weights of before is far from those that are trained.
    variables |= {"COLOCATE": "1", "LR": "1e-3", "EVAL_SETS": "", "SAVE_INTERVAL": "2", **ON_GPU}
    flags = as_flags(settings(dict(CPU_SETTINGS)))
    flags += [f"--sglang-{flag[2:]}" if flag.startswith("--") else flag for flag in ENGINE]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["python3", "-m", "sglang.launch_server", "--model-path", str(place / "teacher"), "--port", str(port)]
    command += ["--mem-fraction-static", "0.15", *ENGINE]
    with Process("teacher", command, place / "teacher.log", ON_GPU) as teacher:
        wait_ready(teacher, url, START_S)
        yield place, {**variables, "TEACHER_URL": url}, flags


def settings(plain):
    """train.py's flags: Megatron's layers in plain PyTorch where there is no TransformerEngine."""
    memory = {"sglang-mem-fraction-static": 0.3}
    if importlib.util.find_spec("transformer_engine"):
        return memory
    del plain["distributed-backend"], plain["use-cpu-initialization"]
    return memory | plain | {"attention-backend": "auto"}


def make_pair(student: Path, teacher: Path) -> None:
    """A random model with the smoke run's tokenizer, and one beside it, in bfloat16."""
    torch.manual_seed(1)
    tiny = Qwen3Config.from_pretrained(make_models.SHIPPED)
    config = Qwen3Config.from_dict({**tiny.to_dict(), **SHAPE, "layer_types": None})
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    for folder, noise in ((student, 0.0), (teacher, NOISE)):
        shutil.copytree(make_models.SHIPPED, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        with torch.no_grad():
            for value in model.parameters():
                if value.dim() > 1:
                    value += noise * value.std() * torch.randn_like(value)
        model.save_pretrained(folder)


def run(cluster, log, **variables):
    """Run the script to its end; returns the run's rollouts and what slime logged of each optimizer step."""
    place, ours, arguments = cluster
    env = {**ours, **variables}
    run_dir = Path(env["RUN_DIR"])
    with Process("run script", ["bash", str(SCRIPT), *arguments], place / log, env) as process:
        status = process.popen.wait(RUN_S)
    logs = sorted(run_dir.glob("logs/*/train.log"))
    assert status == 0, process.log.read_text()[-3000:] + "".join(file.read_text()[-8000:] for file in logs[-1:])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = re.findall(r"\bstep \d+: (\{.*?\})", logs[-1].read_text(errors="replace"))
    return [line for line in lines if line["kind"] == "rollout"], [ast.literal_eval(step) for step in steps]


def assert_steps(steps, count):
    """There is a gradient, and the engine that played has the weights that are trained, in another rounding."""
    assert len(steps) == count
    for step in steps:
        print({name: value for name, value in step.items() if name in SHOWN})
        assert 0 < step["train/grad_norm"] < math.inf
        assert step["train/train_rollout_logprob_abs_diff"] < 0.05 and step["train/opd_reverse_kl"] > 0


def test_a_run_beside_a_teachers_server_goes_on_where_it_ended(cluster):
    run_dir = cluster[0] / "run"
    first, steps = run(cluster, "first.log", VARIANT="b2f", RUN_DIR=str(run_dir), NUM_ROLLOUT="2")
    assert_steps(steps, 2)
    both, steps = run(cluster, "second.log", VARIANT="b2f", RUN_DIR=str(run_dir), NUM_ROLLOUT="4")
    assert_steps(steps, 2)
    assert [line["n"] for line in both] == [0, 1, 2, 3] and both[:2] == first
    for line in both:
        print({name: value for name, value in line.items() if name.endswith(PRINTED)})
        assert line["rollout/tcod/kl/token"] > 0 and line["rollout/tcod/failed"] == 0
    cpu_cluster.assert_trained(run_dir / "hf/3", cluster[0] / "student")


def test_the_teacher_in_the_training_processes(cluster):
    """slime swaps its weights with the student's, which main memory keeps while the engine has the GPU."""
    run_dir = cluster[0] / "megatron"
    variables = {"TEACHER": "megatron", "TEACHER_URL": "", "TEACHER_LOAD": f"{cluster[0]}/teacher"}
    rollouts, steps = run(cluster, "megatron.log", VARIANT="f2b", RUN_DIR=str(run_dir), NUM_ROLLOUT="2", **variables)
    assert_steps(steps, 2)
    assert [line["n"] for line in rollouts] == [0, 1]
    cpu_cluster.assert_trained(run_dir / "hf/1", cluster[0] / "student")
