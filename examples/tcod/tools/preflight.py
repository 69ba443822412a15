"""The checks of launch.py that read data and models. A refusal is one sentence and exit status 1.

    python -m examples.tcod.tools.preflight run --config tcod.yaml --student DIR --train FILE [--eval FILE ..] \\
        [--turn-len N --context-len N] [--megatron-teacher DIR] [--ray-gpus N ..]
    python -m examples.tcod.tools.preflight teacher --config tcod.yaml --url http://HOST:PORT/generate --student DIR \\
        --context-len N
"""

import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path

from transformers import AutoConfig

from .. import ConfigError
from ..environments.protocol import Environment, Observation, ask, load_environment
from ..episode.rows import Row, check_rows, read_rows, task_of
from ..model.chat_tokens import ChatTokens, load_chat
from ..settings.build import history_of
from ..settings.checks import check_environment_class, check_training_rows
from ..settings.config import TcodConfig
from ..settings.server_checks import base_url, check_teacher_scores
from .check_environment import play_rows, spread
from .ray_cluster import check_cluster
from .ray_start import start_ray

PLAYED = 2  # training rows
# What the student's MODEL_ARGS say to Megatron, by the names of Hugging Face.
ARCHITECTURE = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "tie_word_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps", "rope_theta"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
)


def check_run(options: Namespace) -> None:
    """Everything that can be known before a GPU is taken. Raises ConfigError."""
    config = TcodConfig.read(options.config)
    check_environment_class(config)
    chat = student_chat(options, config)
    for warning in chat.warnings:
        warn(f"STUDENT {options.student}: {warning}")
    if options.megatron_teacher:
        check_architecture(options.student, options.megatron_teacher)
    rows = read_rows(options.train)
    check_training_rows(config, rows, str(options.train))
    environment = load_environment(config.tcod_environment)
    for file in options.eval:
        check_rows(read_rows(file), str(file), environment, config.tcod_data_root)
    if options.ray_gpus:
        check_cluster(options, config, rows[0])
    start_ray(workers=1)
    cost = play_rows(config, spread(rows, PLAYED), str(options.train))
    if options.context_len:
        lengths = turn_lengths(config, chat, environment, rows[0], cost.first)
        check_context(config, *lengths, options.turn_len, options.context_len)


def student_chat(options: Namespace, config: TcodConfig) -> ChatTokens:
    """The student's chat turns, which must fit tcod_history and tcod_thoughts. Raises ConfigError."""
    given = options.apply_chat_template_kwargs
    try:
        return load_chat(
            str(options.student), config.template_kwargs if given is None else given, **config.chat_choices
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"STUDENT {options.student}: {error}") from error


def turn_lengths(
    config: TcodConfig, chat: ChatTokens, environment: type[Environment], row: Row, first: Observation
) -> tuple[int, int]:
    """Tokens before the first response, and between two, where all observations are like a row's first."""
    listed, history = config.tcod_admissible == "turn", history_of(config, chat)(10**9)
    rules = ask(environment, "system_prompt", task_of(row.metadata))
    history.begin(rules, ask(environment, "render", first, True, listed))
    opening = len(history.context)
    history.show_replayed("", None)
    history.observe(ask(environment, "render", first, False, listed))
    return opening, len(history.context) - opening - 1  # the response's own end


def check_context(config: TcodConfig, opening: int, observed: int, turn_len: int, context_len: int) -> None:
    """Warn where the turns that are shown at the horizon, of full length, do not fit into the context."""
    between = min(config.tcod_horizon - 1, config.tcod_window or config.tcod_horizon)
    # A template that drops old thoughts leaves little of past responses.
    turns = 1 if (config.tcod_history, config.tcod_thoughts) == ("turns", "keep") else between + 1
    needed = opening + turns * turn_len + between * observed
    if needed > context_len:
        room = max(0, context_len - opening - between * observed) // turns
        warn(
            f"MAX_CONTEXT_LEN {context_len} may end episodes early: {turns} x MAX_TURN_LEN {turn_len}, "
            f"with {opening} tokens before them and {observed} between them as in the first game, are {needed}; "
            f"responses of {room} tokens fit"
        )


def warn(sentence: str) -> None:
    print(f"preflight: warning: {sentence}", file=sys.stderr, flush=True)


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


def check_live_teacher(options: Namespace) -> None:
    """Whether the teacher scores the student's tokens, and long enough episodes. Raises ConfigError."""
    chat = student_chat(options, TcodConfig.read(options.config))
    check_teacher_scores(base_url(options.url), chat, options.context_len)


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description="Checks of run_qwen3_8b_tcod.sh's data and models.")
    commands = parser.add_subparsers(required=True)
    student = argparse.ArgumentParser(add_help=False)
    student.add_argument("--student", type=Path, required=True, help="Hugging Face checkpoint")
    student.add_argument("--config", type=Path, required=True, help="the run's YAML of tcod_* settings")
    student.add_argument("--context-len", type=int, help="tokens of the longest episode")
    student.add_argument(
        "--apply-chat-template-kwargs",
        type=json.loads,
        help='slime\'s --apply-chat-template-kwargs; default: {"enable_thinking": ..} as tcod_thoughts says',
    )
    run = commands.add_parser("run", parents=[student], help="before a GPU is taken")
    run.set_defaults(check=check_run)
    run.add_argument("--train", type=Path, required=True, help="training rows")
    run.add_argument("--eval", type=Path, nargs="+", default=[], help="rows of evaluations")
    run.add_argument("--turn-len", type=int, default=0, help="tokens of the longest turn")
    run.add_argument("--megatron-teacher", type=Path, help="Hugging Face checkpoint of a teacher in Megatron")
    run.add_argument("--ray-gpus", type=int, help="GPUs that the cluster of RAY_ADDRESS must have")
    run.add_argument("--actor-gpus", type=int, default=0, help="of these the ones before the engines'")
    run.add_argument("--engine-gpus", type=int, default=1, help="GPUs of each engine")
    run.add_argument("--node-gpus", type=int, default=8, help="slime's --num-gpus-per-node")
    run.add_argument("--teacher-gpus", default="", help="GPUs of this node that are not Ray's, as 6,7")
    teacher = commands.add_parser("teacher", parents=[student], help="when the teacher is up")
    teacher.set_defaults(check=check_live_teacher)
    teacher.add_argument("--url", required=True, help="as slime's --rm-url")
    return parser.parse_args()


def main() -> None:
    options = parse()
    try:
        options.check(options)
    except ConfigError as error:
        sys.exit(f"preflight: {error}")


if __name__ == "__main__":
    main()
