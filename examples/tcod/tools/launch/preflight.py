"""The checks of the launcher that read data and models. They are a process of their own because Ray starts in it.

    python3 -P -m examples.tcod.tools.launch.preflight FILE GPUS     # with the variables of run_qwen3_8b_tcod.sh

When all is checked that needs no teacher, FILE gets the addresses of the Ray cluster's nodes. Then the teacher is
waited for and checked. GPUS are the teacher's. A refusal is one sentence and exit status 1.
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import ray
from transformers import AutoConfig

from ... import ConfigError
from ...environments.protocol import Observation
from ...episode.rows import Row
from ...model.chat_tokens import ChatTokens
from ...settings.build import history_factory, student_chat, text_side_factory
from ...settings.checks import check_environment_class, check_notes, teacher_refusals
from ...settings.config import TcodConfig, read_yaml
from ...settings.row_checks import by_environment, check_evaluation_rows, check_training_rows
from ...settings.secrets import text_without
from ...settings.server_checks import check_teacher_scores, teacher_urls
from ..check_environment import play_rows, spread
from ..common.jsonl import read_rows
from ..common.ray_start import start_ray
from .ray_cluster import check_cluster
from .variables import Settings, require

PLAYED = 2  # training rows
# What the student's MODEL_ARGS say to Megatron, by the names of Hugging Face.
ARCHITECTURE = """
    model_type num_hidden_layers hidden_size intermediate_size vocab_size tie_word_embeddings num_attention_heads
    num_key_value_heads head_dim attention_bias rms_norm_eps rope_theta num_experts num_experts_per_tok
    moe_intermediate_size
""".split()


def main() -> None:
    file, teacher_gpus = sys.argv[1:]
    s = Settings.read(os.environ)
    try:
        config = TcodConfig.read(s.run_dir / "tcod.yaml")
        chat = student_chat(config, str(s.student), s.chat_template_kwargs, "STUDENT")
        nodes = check_run(s, config, chat, teacher_gpus)
        ray.shutdown()
        Path(file).write_text("\n".join(nodes))
        if s.starts_teacher:
            wait_for_teacher(s)
        if s.teacher == "sglang":
            for url in {*teacher_urls(config, s.teacher_address).values()}:
                check_teacher_scores(url, chat, *config.scored_len(s.max_context_len, "MAX_CONTEXT_LEN"))
    except ConfigError as error:
        sys.exit(f"preflight: {text_without(str(error), vars(s), read_yaml(s.run_dir / 'tcod.yaml'))}")


def check_run(s: Settings, config: TcodConfig, chat: ChatTokens, teacher_gpus: str) -> list[str]:
    """What can be known before a GPU is taken. Returns the addresses of the cluster's nodes. Raises ConfigError."""
    check_environment_class(config)
    for sentence in teacher_refusals(config, s.teacher, s.mode):
        raise ConfigError(sentence)
    check_notes(config, chat)
    if s.teacher == "megatron":
        check_architecture(s.student, s.teacher_model)
    train = s.data_dir / "train.jsonl"
    rows = read_rows(train)
    check_training_rows(config, rows, str(train))
    for file in s.eval_files.values():
        check_evaluation_rows(config, read_rows(file), str(file))
    groups = by_environment(config, rows, str(train))
    groups = groups if config.tcod_variant != "sft" else []  # nothing is played
    nodes = check_cluster(s, teacher_gpus, [(own, group[0]) for own, group in groups]) if s.ray_address else []
    if not groups:
        return nodes
    start_ray(workers=1)
    for own, group in groups:
        check_context(s, own, chat, group[0], play_rows(own, spread(group, PLAYED), str(train)).first)
    return nodes


def check_context(s: Settings, config: TcodConfig, chat: ChatTokens, row: Row, first: Observation) -> None:
    """Warn where turns of full length do not fit up to the horizon, if all observations are as the first one."""
    side, history = text_side_factory(config, chat)(row.task), history_factory(config, chat)(10**9)
    history.begin(side.rules(), side.show(first, first=True))
    opening = len(history.context)
    history.add_replayed("", None)
    history.add_turn(side.show(first, first=False))
    between = min(config.tcod_horizon - 1, config.tcod_window or config.tcod_horizon)
    observed = between * (len(history.context) - opening - 1)  # the response's own end
    # A template that drops old thoughts leaves little of past responses.
    turns = 1 if (config.tcod_history, config.tcod_thoughts) == ("turns", "keep") else between + 1
    room = (s.max_context_len - opening - observed) // turns
    if room < s.max_turn_len:
        print(
            f"preflight: warning: MAX_CONTEXT_LEN {s.max_context_len} may end episodes early: the horizon's {turns} x "
            f"MAX_TURN_LEN {s.max_turn_len} and {opening + observed} other tokens, as in the first game"
            f"{config.name and f' of {config.name}'}, do not fit; responses of {max(0, room)} tokens fit",
            file=sys.stderr,
        )


def check_architecture(student: Path, teacher: Path) -> None:
    for variable, folder in {"STUDENT": student, "TEACHER_MODEL": teacher}.items():
        require((folder / "config.json").is_file(), f"no file {folder}/config.json: set {variable} to a checkpoint")
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (student, teacher))
    for config in (ours, theirs):
        config |= config.get("rope_parameters") or {}
    different = ", ".join(key for key in ARCHITECTURE if ours.get(key) != theirs.get(key))
    remedy = "take a teacher of the student's architecture, or TEACHER=sglang"
    loads = "TEACHER=megatron loads the teacher into the student's own model"
    require(not different, f"{loads}, and TEACHER_MODEL differs in {different}: {remedy}")


def wait_for_teacher(s: Settings) -> None:
    """Return when the teacher that was started generates. Raises ConfigError."""
    deadline = time.monotonic() + s.teacher_start_s
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{s.teacher_address}/health_generate", timeout=5, trust_env=False).is_success:
                return
        time.sleep(0.5)
    raise ConfigError(f"the teacher was not ready within TEACHER_START_S={s.teacher_start_s} seconds: see its log")


if __name__ == "__main__":
    main()
