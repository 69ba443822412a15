"""One arm of the smoke run: the recipe's hooks on slime (or its stand-in), a gradient step on the CPU, weights pushed.

    python -m smoke.train_arm --config YAML --student DIR --student-port P --teacher-port Q \\
        --data DIR --run-dir DIR

Writes to the run directory what the recipe writes in every run (metrics.jsonl, rollouts/, about.json), and weights/,
the student's newest checkpoint. run.py starts this once per arm.
"""

import argparse
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import ray
import requests
import torch

from examples.tcod.settings.config import TcodConfig, read_yaml
from smoke import hooks
from smoke.trainer import Trainer

# slime's arguments for each loss, see examples/tcod/training/turn_mean.py.
LOSSES: dict[str, dict[str, Any]] = {
    "trajectory": {},
    "token": {"calculate_per_token_loss": True},
    "turn": {"custom_pg_loss_reducer_function_path": "examples.tcod.training.turn_mean.turn_mean"},
}


def main(trainer: type[Trainer] = Trainer) -> None:
    """Train the arm of the command line; `trainer` makes its steps."""
    options = option_parser().parse_args()
    hooks.clear(options.run_dir)
    os.environ["TCOD_RUN_DIR"] = str(options.run_dir)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # the two engines and the environment workers share the cores
    print(f"running on {hooks.find_slime()}", flush=True)
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="warning", log_to_driver=False)
    train(options, trainer(options.student, lr=options.lr, loss=options.loss))


def train(options: Namespace, trainer: Trainer) -> None:
    """Rollouts, steps, weights pushed and evaluations, in slime's order."""
    from examples.tcod import tcod_rollout
    from slime.rollout.data_source import RolloutDataSourceWithBuffer
    from slime.utils.http_utils import init_http_client

    args = slime_args(options)
    init_http_client(args)
    source = RolloutDataSourceWithBuffer(args)
    weights = options.run_dir / "weights"
    shutil.copytree(options.student, weights, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)

    def push(n: int) -> None:
        trainer.save(weights)
        push_weights(options.student_port, weights, version=str(n))

    def evaluate(n: int) -> None:  # as slime does: before rollout 0 with its id, and after rollout n
        tcod_rollout.generate_rollout(args, n, source, evaluation=True)

    push(0)
    if not options.skip_first_evaluation:
        evaluate(0)
    for n in range(options.updates):
        output = tcod_rollout.generate_rollout(args, n, source)
        batch = hooks.convert_samples_to_train_data(args, hooks.flat(output.samples))
        print(f"update {n}: {trainer.step(batch)}", flush=True)
        push(n + 1)
        if (n + 1) % options.eval_interval == 0 or n + 1 == options.updates:
            evaluate(n)


# Without a teacher; and imitation, with a log-prob for no token and an advantage for none.
ALONE = {"use_opd": False, "opd_type": False, "rm_url": False}
IMITATION = {**ALONE, "loss_type": "sft_loss", "disable_compute_advantages_and_returns": True}


def run_flags(options: Namespace) -> dict[str, Any]:
    """slime's arguments, by name, of any run: here, and of slime's own train.py (train_slime.py)."""
    config = TcodConfig.read(options.config)
    imitates = config.tcod_variant == "sft"
    return {
        **hooks.RECIPE_FLAGS,
        **LOSSES[options.loss],
        "hf_checkpoint": str(options.student),
        "apply_chat_template_kwargs": config.template_kwargs,
        "custom_config_path": str(options.config),
        "rm_url": f"http://127.0.0.1:{options.teacher_port}/generate" if options.teacher_port else "self",
        "sglang_server_concurrency": options.concurrency,
        "rollout_num_gpus": 1,
        "prompt_data": str(options.data / "train.jsonl"),
        "input_key": "prompt",
        "label_key": "label",
        "rollout_shuffle": True,
        "rollout_seed": options.seed,
        "rollout_batch_size": options.batch,
        "n_samples_per_prompt": options.samples,
        "rollout_max_response_len": options.response_len,
        "rollout_max_context_len": options.context_len,
        "use_dynamic_batch_size": True,
        **(IMITATION if imitates else ALONE if options.no_teacher else {}),
    }


def slime_args(options: Namespace) -> Namespace:
    """slime's arguments for this run, with the YAML's keys set as slime's --custom-config-path does."""
    from slime.utils.eval_config import EvalDatasetConfig

    datasets = [EvalDatasetConfig(**dataset) for dataset in evaluation_datasets(options)]
    router = {"sglang_router_ip": "127.0.0.1", "sglang_router_port": options.student_port}
    args = hooks.rollout_args(**run_flags(options), **router, eval_datasets=datasets)
    vars(args).update(read_yaml(options.config))
    return args


def evaluation_datasets(options: Namespace) -> list[dict[str, Any]]:
    """Success is measured at the paper's temperature; a KL is only defined at the temperature that is trained at.

    A KL needs fewer games, because it is a mean over many tokens: those of heldout_kl.jsonl, where that file is.
    """
    heldout, fewer = options.data / "heldout.jsonl", options.data / "heldout_kl.jsonl"
    common = {"n_samples_per_eval_prompt": 1, "top_p": 1.0, "top_k": -1, "max_response_len": options.response_len}
    common |= {"input_key": "prompt", "label_key": "label", "metadata_key": "metadata"}
    return [
        {"name": "heldout", "temperature": 0.4, "path": str(heldout), **common},
        {"name": "heldout_t1", "temperature": 1.0, "path": str(fewer if fewer.exists() else heldout), **common},
    ]


def push_weights(port: int, folder: Path, version: str) -> None:
    """Have the student's server load a checkpoint. Raises RuntimeError with the server's own words if it does not."""
    reply = requests.post(
        f"http://127.0.0.1:{port}/update_weights_from_disk",
        json={"model_path": str(folder), "weight_version": version, "flush_cache": True},
        timeout=60,
    )
    if reply.status_code != 200 or not reply.json().get("success"):
        raise RuntimeError(f"the student's server did not load {folder}: {reply.text[:500]}")


def option_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One arm of the smoke run.")
    parser.add_argument("--config", type=Path, required=True, help="YAML of the arm's tcod_* settings")
    parser.add_argument("--student", type=Path, required=True, help="the student's first checkpoint")
    parser.add_argument("--student-port", type=int, required=True)
    parser.add_argument("--teacher-port", type=int, required=True, help="0: the student's own engine scores")
    parser.add_argument("--data", type=Path, required=True, help="folder of train.jsonl and heldout.jsonl")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="tasks per update")
    parser.add_argument("--samples", type=int, default=1, help="episodes of a task")
    parser.add_argument("--no-teacher", action="store_true", help="train on the reward alone")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--loss", choices=LOSSES, default="trajectory", help="what it is a mean over")
    parser.add_argument("--eval-interval", type=int, default=10**9, help="updates between evaluations")
    parser.add_argument("--skip-first-evaluation", action="store_true", help="another arm's run has it")
    parser.add_argument("--response-len", type=int, default=32, help="largest response in tokens")
    parser.add_argument("--context-len", type=int, default=1024, help="largest episode in tokens")
    parser.add_argument("--concurrency", type=int, default=32, help="episodes at once")
    return parser


if __name__ == "__main__":
    main()
