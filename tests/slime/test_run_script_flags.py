"""slime's own argument parser reads the run script's commands: needs SLIME_DIR and MEGATRON_DIR."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from smoke.train_slime import as_flags
from tests.gpu.steps import training_flags
from tests.support.run_script import ROOT, SCRIPT, build, dry_run

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


MODES = {
    "async": {"MODE": "async"},
    "fully_async": {"MODE": "fully_async"},
    "colocated": {"COLOCATE": "1", "FP32_HEADS": "1"},
    "parallel": {"ACTOR_GPUS": "8", "PIPELINE_PARALLEL": "2", "CONTEXT_PARALLEL": "2", "TEACHER_URL": "http://a:1"},
    "all checkpoints": {"KEEP_CHECKPOINTS": "all", "SAVE_HF": "0", "EVAL_SETS": ""},
}
# What CLUSTER.md advises where memory is short.
LESS_MEMORY = [
    *("--log-probs-chunk-size", "1024", "--recompute-loss-function"),
    *("--optimizer-cpu-offload", "--overlap-cpu-optimizer-d2h-h2d", "--use-precision-aware-optimizer"),
    *("--train-env-vars", '{"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}'),
    *("--sglang-mem-fraction-static", "0.6", "--sglang-max-running-requests", "16"),
]


def test_slimes_parser_takes_the_commands(tmp_path, monkeypatch):
    if not (os.environ.get("SLIME_DIR") and os.environ.get("MEGATRON_DIR")):
        pytest.skip("slime's parser: run with SLIME_DIR=/path/to/slime MEGATRON_DIR=/path/to/Megatron-LM")
    folder, env = tmp_path, build(tmp_path)
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
    for mode, variables in MODES.items():
        add(mode, variables)
    add("less memory", {}, *LESS_MEMORY)
    add("one GPU", {"COLOCATE": "1", "ACTOR_GPUS": "1"}, *as_flags(training_flags(on_gpu=True)))
    monkeypatch.syspath_prepend(env["SLIME_DIR"])
    short = short_test()
    for mode in short.MODES:
        add(
            ("short", mode),
            {**short.settings(mode), "STUDENT": f"{folder}/teacher", "TEACHER_MODEL": f"{folder}/teacher"},
            *short.FLAGS,
        )
    add("typo", {"VARIANT": "f2b"}, "--opd-kl-coeff", "1")
    path = [ROOT, env["SLIME_DIR"], env["MEGATRON_DIR"], env["PYTHONPATH"]]
    assert not any("--ci-test" in command for command in commands.values())  # it wants a log-prob above -1
    done = subprocess.run(
        [sys.executable, "-c", PARSER],
        input=json.dumps(list(commands.values())),
        env={**env, "PYTHONPATH": os.pathsep.join(map(str, path)), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refusals = dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))
    assert refusals.pop("typo") == "no parser knows --opd-kl-coeff"
    assert refusals == dict.fromkeys(refusals)


def test_the_advice_where_memory_is_short_names_these_flags():
    advice = (SCRIPT.parent / "docs/CLUSTER.md").read_text().split("**Out of memory**")[1].split("\n\n**")[0]
    flags = set(re.findall(r"--[a-z][a-z0-9-]+", advice))
    teachers = {"--chunked-prefill-size", "--mem-fraction-static"}  # of SGLang's own server
    assert teachers < flags and flags - teachers <= set(LESS_MEMORY)
    assert all(flag in SCRIPT.read_text() for flag in teachers)


def short_test():
    """slime's GPU test of the recipe; its name, with a dot as slime's have, cannot be imported."""
    spec = importlib.util.spec_from_file_location("tcod_short", ROOT / "tests/test_qwen2.5_0.5B_tcod_short.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
