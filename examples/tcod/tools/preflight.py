"""The checks of launch.py that read data and models. A refusal is one sentence and exit status 1.

    python -m examples.tcod.tools.preflight run --config tcod.yaml --data DIR --student DIR \\
        [--eval-sets NAME=FILE ..] [--megatron-teacher DIR] [--ray-gpus N]
    python -m examples.tcod.tools.preflight teacher --url http://HOST:PORT/generate --student DIR --context-len N
"""

import argparse
import os
import sys
from argparse import Namespace
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from ..chat import ChatTokens
from ..checks import base_url, check_environment, check_teacher, check_training_rows
from ..config import TcodConfig
from ..environment import load_environment
from ..errors import ConfigError
from ..rows import check_rows, read_rows
from .check_environment import play_rows, spread
from .ray_start import start_ray

PLAYED = 2  # rows of train.jsonl
CHAT = {"enable_thinking": False}  # as in the script's --apply-chat-template-kwargs
EVAL_SETS = ["seen=valid_seen.jsonl", "unseen=valid_unseen.jsonl"]
# What the student's MODEL_ARGS say to Megatron, by the names of Hugging Face.
ARCHITECTURE = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "tie_word_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps", "rope_theta"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
)


def check_run(options: Namespace) -> None:
    """Everything that can be known before a GPU is taken. Raises ConfigError."""
    config = TcodConfig.read(options.config)
    check_environment(config)
    load_chat(options.student)
    if options.megatron_teacher:
        check_architecture(options.student, options.megatron_teacher)
    environment = load_environment(config.tcod_environment)
    train = read_rows(options.data / "train.jsonl")
    check_training_rows(config, train, "train.jsonl in DATA_DIR")
    for file in eval_files(options.eval_sets):
        check_rows(read_rows(options.data / file), f"{file} in DATA_DIR", environment, config.tcod_data_root)
    if options.ray_gpus:
        check_ray(options.ray_gpus)
    start_ray(workers=1)
    play_rows(config, spread(train, PLAYED), "train.jsonl in DATA_DIR")


def eval_files(eval_sets: list[str]) -> list[str]:
    """The files of evaluation sets NAME=FILE. Raises ConfigError."""
    pairs = [eval_set.partition("=") for eval_set in eval_sets]
    if wrong := [name + sign + file for name, sign, file in pairs if not (name and file)]:
        raise ConfigError(f"EVAL_SETS has {wrong[0]!r}: write NAME=FILE, with files in DATA_DIR")
    return [file for _, _, file in pairs]


def load_chat(student: Path) -> ChatTokens:
    """The student's chat turns, which must be such that they can be appended to a context. Raises ConfigError."""
    try:
        return ChatTokens(AutoTokenizer.from_pretrained(student), CHAT)
    except ValueError as error:
        raise ConfigError(f"STUDENT {student}: {error}") from error


def check_architecture(student: Path, teacher: Path) -> None:
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (student, teacher))
    for config in (ours, theirs):
        config |= config.get("rope_parameters") or {}
    different = [key for key in ARCHITECTURE if ours.get(key) != theirs.get(key)]
    if different:
        raise ConfigError(
            "TEACHER=megatron loads the teacher into the student's own model, and TEACHER_MODEL differs in "
            f"{', '.join(different)}: take a teacher of the student's architecture, or TEACHER=sglang"
        )


def check_ray(gpus: int) -> None:
    """Whether the cluster of RAY_ADDRESS has the GPUs for training and rollouts."""
    import ray

    address = os.environ["RAY_ADDRESS"]
    try:
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except Exception as error:
        raise ConfigError(f"no Ray answers at RAY_ADDRESS {address} ({error}): start it, or unset it") from error
    found = int(ray.cluster_resources().get("GPU", 0))
    if found < gpus:
        raise ConfigError(
            f"the Ray cluster has {found} GPUs, less than the {gpus} of ACTOR_NODES x ACTOR_GPUS + ROLLOUT_GPUS: "
            "change them, or add nodes"
        )


def check_live_teacher(options: Namespace) -> None:
    """Whether the teacher scores the student's tokens, and long enough episodes. Raises ConfigError."""
    check_teacher(base_url(options.url), load_chat(options.student), options.context_len)


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks of run_qwen3_8b_tcod.sh's data and models.")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="before a GPU is taken")
    run.set_defaults(check=check_run)
    run.add_argument("--config", type=Path, required=True, help="the run's YAML of tcod_* settings")
    run.add_argument("--data", type=Path, required=True, help="folder of train.jsonl and the evaluation sets")
    run.add_argument(
        "--eval-sets", nargs="*", default=EVAL_SETS, help="NAME=FILE, FILE in --data, default: %(default)s"
    )
    run.add_argument("--student", type=Path, required=True, help="Hugging Face checkpoint")
    run.add_argument("--megatron-teacher", type=Path, help="Hugging Face checkpoint of a teacher in Megatron")
    run.add_argument("--ray-gpus", type=int, help="GPUs that the cluster of RAY_ADDRESS must have")
    teacher = commands.add_parser("teacher", help="when the teacher is up")
    teacher.set_defaults(check=check_live_teacher)
    teacher.add_argument("--url", required=True, help="as slime's --rm-url")
    teacher.add_argument("--student", type=Path, required=True, help="Hugging Face checkpoint")
    teacher.add_argument("--context-len", type=int, required=True, help="tokens of the longest episode")
    options = parser.parse_args()
    try:
        options.check(options)
    except ConfigError as error:
        sys.exit(f"preflight: {error}")


if __name__ == "__main__":
    main()
