"""The checks of launch.py that read data and models. A refusal is one sentence and exit status 1.

    python -m examples.tcod.tools.preflight run --config tcod.yaml --data DIR --student DIR \\
        [--megatron-teacher DIR] [--ray-gpus N]
    python -m examples.tcod.tools.preflight teacher --url http://HOST:PORT/generate --student DIR --context-len N
"""

import argparse
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..chat import ChatTokens
from ..checks import base_url, check_environment, check_teacher, check_training_rows
from ..config import TcodConfig
from ..environment import load_environment
from ..errors import ConfigError
from ..rows import check_rows, read_rows

CHAT = {"enable_thinking": False}  # as in the script's --apply-chat-template-kwargs
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
    rows = {split: read_rows(options.data / f"{split}.jsonl") for split in ("train", "valid_seen", "valid_unseen")}
    check_training_rows(config, rows["train"], "train.jsonl in DATA_DIR")
    environment = load_environment(config.tcod_environment)
    for split in ("valid_seen", "valid_unseen"):
        check_rows(rows[split], f"{split}.jsonl in DATA_DIR", environment, config.tcod_data_root)
    play_one_step(config, rows["train"][0].metadata)
    if options.ray_gpus:
        check_ray(options.ray_gpus)


def load_chat(student: Path) -> ChatTokens:
    """The student's chat turns, which must be such that they can be appended to a context. Raises ConfigError."""
    try:
        return ChatTokens(AutoTokenizer.from_pretrained(student), CHAT)
    except ValueError as error:
        raise ConfigError(f"STUDENT {student}: {error}") from error


def play_one_step(config: TcodConfig, metadata: dict[str, Any]) -> None:
    """Reset the first training game and take a step in it."""
    try:
        engine = load_environment(config.tcod_environment)(config.tcod_data_root)
        observation = engine.reset(metadata)
        engine.step(observation.admissible[0] if observation.admissible else "look")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{config.tcod_environment} needs {error.name}: install it, for ALFWorld with pip install alfworld==0.4.2"
        ) from error
    except Exception as error:  # whatever an engine may raise
        raise ConfigError(
            f"the first game of train.jsonl in DATA_DIR cannot be played ({error!r}): "
            "repair the environment or the game data"
        ) from error


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
    run.add_argument("--data", type=Path, required=True, help="folder of train, valid_seen and valid_unseen.jsonl")
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
