"""One arm of the smoke run through slime's own train.py, Megatron training and weight push included, on the CPU.

    SLIME_DIR=.. MEGATRON_DIR=.. python -m smoke.train_slime <the options of train_arm.py> [--data-parallel 2]

The counterpart of train_arm.py, with the same settings: it writes the same files, and also every rollout's samples
(rollout_N.pt, slime's dump) and each pushed checkpoint (weights/). run.py starts it where both variables are set.
"""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from smoke import hooks, train_arm

# Megatron without a GPU's fused kernels.
CPU_SETTINGS = {
    **{
        "transformer-impl": "local",
        "spec": ["smoke.slime_cpu.cpu_layer_spec", "layer_spec"],
        "distributed-backend": "gloo",
    },
    **{"use-cpu-initialization": True, "no-rope-fusion": True, "no-bias-swiglu-fusion": True},
    **{"no-bias-dropout-fusion": True, "no-gradient-accumulation-fusion": True, "no-masked-softmax-fusion": True},
    **{"no-persist-layer-norm": True, "attention-dropout": 0, "hidden-dropout": 0},
}

# slime's weights as on GPUs that training and the engine share: from copies in main memory, not through the disk. An
# engine that slime has not started stays in its memory.
IN_MEMORY = {
    **{"colocate": True, "no-offload-rollout": True},
    **dict.fromkeys(("update-weight-mode", "update-weight-transport", "update-weight-disk-dir"), False),
    "update-weight-disk-keep-files": False,
}


def main() -> None:
    parser = train_arm.option_parser()
    parser.add_argument("--data-parallel", type=int, default=1, help="training ranks")
    parser.add_argument("--teacher", type=Path, help="have Megatron score with this checkpoint, instead of SGLang")
    options = parser.parse_args()
    options.run_dir = options.run_dir.resolve()
    hooks.clear(options.run_dir)
    print(f"running on {hooks.find_slime()}, its train.py", flush=True)
    path = hooks.python_path(os.environ["MEGATRON_DIR"])
    os.environ |= {"PYTHONPATH": path, "TCOD_RUN_DIR": str(options.run_dir)}
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    settings = {**model_settings(options.student), **slime_settings(options), **CPU_SETTINGS}
    if options.teacher:
        settings |= {"opd-type": "megatron", "opd-teacher-load": options.teacher, "rm-url": False}
        settings |= IN_MEMORY | {"save": options.run_dir / "checkpoints", "save-interval": 1}
        settings["save-hf"] = options.run_dir / "hf/{rollout_id}"
    sys.exit(subprocess.run([sys.executable, "-m", "smoke.slime_cpu.run_train", *as_flags(settings)]).returncode)


def model_settings(checkpoint: Path) -> dict[str, Any]:
    """Megatron's description of a dense Qwen3 checkpoint, as in slime's scripts/models/qwen3-*.sh."""
    config = json.loads((checkpoint / "config.json").read_text())
    return {
        **{"swiglu": True, "disable-bias-linear": True, "normalization": "RMSNorm", "qk-layernorm": True},
        **{"use-rotary-position-embeddings": True, "rotary-base": round(config["rope_parameters"]["rope_theta"])},
        "num-layers": config["num_hidden_layers"],
        "hidden-size": config["hidden_size"],
        "ffn-hidden-size": config["intermediate_size"],
        "num-attention-heads": config["num_attention_heads"],
        "group-query-attention": True,
        "num-query-groups": config["num_key_value_heads"],
        "kv-channels": config["head_dim"],
        "norm-epsilon": config["rms_norm_eps"],
        "vocab-size": config["vocab_size"],
        "make-vocab-size-divisible-by": 1,
        "untie-embeddings-and-output-weights": not config["tie_word_embeddings"],
    }


def slime_settings(options: Namespace) -> dict[str, Any]:
    """slime's flags for what train_arm.slime_args and the smoke run's trainer are given."""
    evaluation = options.run_dir / "eval.yaml"
    evaluation.write_text(yaml.safe_dump({"eval": {"datasets": train_arm.evaluation_datasets(options)}}))
    return {
        **{name.replace("_", "-"): value for name, value in train_arm.run_flags(options).items()},
        # models and engines
        **{"load": options.student, "ref-load": options.student, "opd-kl-coef": 1},
        "rollout-external-engine-addrs": f"127.0.0.1:{options.student_port}",
        **{"actor-num-nodes": 1, "actor-num-gpus-per-node": options.data_parallel},
        # rollouts
        **{
            "num-rollout": options.updates,
            "global-batch-size": options.batch * options.samples,
            "rollout-temperature": 1,
        },
        # evaluation and logging
        **{"eval-config": evaluation, "eval-interval": min(options.eval_interval, options.updates)},
        "skip-eval-before-train": options.skip_first_evaluation,
        "save-debug-rollout-data": options.run_dir / "rollout_{rollout_id}.pt",
        # training
        **{"advantage-estimator": "grpo", "entropy-coef": 0, "clip-grad": 1},
        "max-tokens-per-gpu": options.context_len,
        **{"lr": options.lr, "lr-decay-style": "constant", "weight-decay": 0, "adam-beta1": 0.9, "adam-beta2": 0.98},
        # weights
        **{"update-weight-mode": "full", "update-weight-transport": "disk"},
        "update-weight-disk-dir": options.run_dir / "weights",
        "update-weight-disk-keep-files": True,
    }


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Command line of {name: value}. True is a flag without a value, False is left out, a list is several values."""
    flags = []
    for name, value in settings.items():
        if value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return flags


if __name__ == "__main__":
    main()
