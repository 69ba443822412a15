"""The variables of run_qwen3_8b_tcod.sh, and which of them contradict each other, whatever the machine.

A refusal is exit status 1 and one sentence that names the variable and the fix.
"""

import json
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..curriculum import VARIANTS

# Flags of train.py that the script sets, and by which variable: given again, they would pass by its checks.
OWN_FLAGS = {
    "--rollout-function-path": "MODE",
    "--sglang-server-concurrency": "CONCURRENCY",
    "--opd-type": "TEACHER",
    "--actor-num-nodes": "ACTOR_NODES",
    "--actor-num-gpus-per-node": "ACTOR_GPUS",
    "--rollout-num-gpus": "ROLLOUT_GPUS",
    "--rollout-num-gpus-per-engine": "ENGINE_GPUS",
    "--num-gpus-per-node": "NODE_GPUS",
    "--tensor-model-parallel-size": "TENSOR_PARALLEL",
    "--pipeline-model-parallel-size": "PIPELINE_PARALLEL",
    "--context-parallel-size": "CONTEXT_PARALLEL",
    "--load": "RUN_DIR",
    "--save": "RUN_DIR",
    "--apply-chat-template-kwargs": "CHAT_TEMPLATE_KWARGS",
}


@dataclass(frozen=True)
class Settings:
    """The script's variables, as far as they matter here. The script describes them; "" is one that was not set."""

    variant: str
    config: Path
    horizon: str
    eta: str
    run_dir: Path
    slime_dir: Path
    megatron_dir: Path
    student: Path
    student_load: Path
    chat_template_kwargs: str
    teacher: str
    teacher_model: Path
    teacher_load: Path
    teacher_url: str
    teacher_host: str
    teacher_port: int
    teacher_start_s: int
    mode: str
    colocate: str
    actor_nodes: int
    actor_gpus: int
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    rollout_gpus: int
    engine_gpus: int
    node_gpus: int
    teacher_gpus: str
    data_dir: Path
    eval_sets: str
    worker_env: str
    num_rollout: int
    batch: int
    samples_per_task: int
    max_turn_len: int
    max_context_len: int
    eval_temperature: str
    save_interval: int
    keep_checkpoints: str
    save_hf: str
    wandb_project: str
    dry_run: str
    ray_address: str  # a cluster that is up; without one Ray starts here

    @classmethod
    def read(cls) -> "Settings":
        return cls(**{field.name: field.type(os.environ.get(field.name.upper(), "")) for field in fields(cls)})

    def train_gpus(self) -> int:
        """How many GPUs training and rollouts take, on all nodes together."""
        actors = self.actor_nodes * self.actor_gpus
        return actors if self.colocate == "1" else actors + self.rollout_gpus

    def local_gpus(self) -> int:
        """How many GPUs of this machine they take, from the first on."""
        return 0 if self.ray_address else self.train_gpus()

    def teacher_numbers(self) -> list[int]:
        return [int(number) for number in self.teacher_gpus.split(",")]

    def teacher_address(self) -> str:
        return self.teacher_url or f"http://{self.teacher_host}:{self.teacher_port}"

    def eval_files(self) -> dict[str, Path]:
        """The evaluation sets by name."""
        pairs = (name_and_file.partition("=") for name_and_file in self.eval_sets.split())
        return {name: self.data_dir / file for name, _, file in pairs}


def refuse(sentence: str) -> NoReturn:
    """Say it at once, before processes are ended."""
    print(f"launch: {sentence}", file=sys.stderr, flush=True)
    sys.exit(1)


def require(condition: object, sentence: str) -> None:
    """Refuse to go on unless the condition holds."""
    if not condition:
        refuse(sentence)


def check_settings(s: Settings, train: list[str]) -> None:
    """Refuse what contradicts itself. The script has seen to it that numbers are numbers; `train` is its command."""
    check_arm(s)
    check_mode(s)
    check_parallelism(s)
    check_data_settings(s)
    for flag, variable in OWN_FLAGS.items():
        require(train.count(flag) <= 1, f"{flag} is the script's own: set {variable} instead of giving it again")
    require(s.colocate == "1" or "--colocate" not in train, "--colocate also changes other flags: set COLOCATE=1")
    for flag in ("--offload", "--offload-train", "--release-train"):
        require(flag not in train, f"{flag} lets slime push weights from memory that it has given up: remove it")


def check_arm(s: Settings) -> None:
    require(s.variant in VARIANTS, f"VARIANT must be one of {', '.join(VARIANTS)}, not {s.variant}")
    require(s.teacher in ("sglang", "megatron"), f"TEACHER must be sglang or megatron, not {s.teacher}")
    require(s.config.is_file(), f"no file {s.config}: set CONFIG to a YAML of tcod_* settings")
    recipe = read_yaml(s.config)
    require(recipe.get("tcod_variant") == s.variant, f"{s.config} is not for VARIANT={s.variant}: change one of them")
    grows = s.variant in ("f2b", "b2f") and recipe.get("tcod_schedule") != "kl"
    require(grows or not s.eta, f"ETA is the speed of a linear schedule and VARIANT={s.variant} has none: unset ETA")
    require(
        s.max_turn_len < s.max_context_len,
        f"MAX_TURN_LEN {s.max_turn_len} is one turn of MAX_CONTEXT_LEN {s.max_context_len}: make it smaller",
    )


def check_mode(s: Settings) -> None:
    require(s.mode in ("sync", "async", "fully_async"), f"MODE must be sync, async or fully_async, not {s.mode}")
    require(
        s.teacher == "sglang" or s.colocate == "1",
        "TEACHER=megatron needs COLOCATE=1: elsewhere slime pushes to the engines what it holds on the GPUs, which is "
        "the teacher, or memory that it has given up; with COLOCATE=1 it pushes its copies in main memory",
    )
    require(
        s.mode == "sync" or s.colocate != "1",
        f"COLOCATE=1 gives training and engines the same GPUs in turns, and MODE={s.mode} needs both at once: "
        "take MODE=sync, or COLOCATE=0 and TEACHER=sglang",
    )


def check_parallelism(s: Settings) -> None:
    """GPUs of training, of the engines and of the teacher."""
    actors = s.actor_nodes * s.actor_gpus
    copy = s.tensor_parallel * s.pipeline_parallel * s.context_parallel
    require(
        copy and actors % copy == 0,
        f"TENSOR_PARALLEL {s.tensor_parallel} x PIPELINE_PARALLEL {s.pipeline_parallel} x CONTEXT_PARALLEL "
        f"{s.context_parallel} must divide the {actors} GPUs of ACTOR_NODES x ACTOR_GPUS",
    )
    require(
        s.batch * s.samples_per_task % (actors // copy) == 0,
        f"BATCH x SAMPLES_PER_TASK must be a multiple of {actors // copy}, the copies of the model in training: "
        "ACTOR_NODES x ACTOR_GPUS / (TENSOR_PARALLEL x PIPELINE_PARALLEL x CONTEXT_PARALLEL)",
    )
    require(
        s.actor_nodes == 1 or s.ray_address,
        f"ACTOR_NODES is {s.actor_nodes}: set RAY_ADDRESS to the nodes' Ray",
    )
    require(
        s.colocate != "1" or s.rollout_gpus == actors,
        f"COLOCATE=1 has the engines on the {actors} GPUs that train: unset ROLLOUT_GPUS",
    )
    require(
        s.rollout_gpus % s.engine_gpus == 0,
        f"ENGINE_GPUS {s.engine_gpus} must divide ROLLOUT_GPUS {s.rollout_gpus}",
    )
    if s.teacher == "megatron":
        require(not s.teacher_url, "TEACHER=megatron asks no server: unset TEACHER_URL")
    elif s.teacher_url:
        valid = re.fullmatch("https?://[^/]+", s.teacher_url)
        require(valid, f"TEACHER_URL must be http://HOST:PORT, not {s.teacher_url}")
    else:
        check_teacher_gpus(s)


def check_teacher_gpus(s: Settings) -> None:
    valid = re.fullmatch("[0-9]+(,[0-9]+)*", s.teacher_gpus)
    require(valid, f"TEACHER_GPUS must be numbers like 6,7, not {s.teacher_gpus}")
    for gpu in s.teacher_numbers():
        require(
            gpu >= s.local_gpus(),
            f"GPU {gpu} of TEACHER_GPUS is taken: training and the student's engines have 0 to {s.local_gpus() - 1}",
        )


def check_data_settings(s: Settings) -> None:
    try:
        kwargs = json.loads(s.chat_template_kwargs)
    except ValueError:
        kwargs = None
    require(
        isinstance(kwargs, dict),
        f"CHAT_TEMPLATE_KWARGS must be a JSON object like {{}}, not {s.chat_template_kwargs}",
    )
    for part in s.eval_sets.split():
        require(
            re.fullmatch("[^=/]+=[^=]+", part),
            f"EVAL_SETS must be NAME=FILE, files in DATA_DIR, with spaces between, not {part}",
        )
    for name in s.worker_env.split():
        require(os.environ.get(name), f"WORKER_ENV names {name}, which is not set: export it, or leave it out")
    require(
        s.keep_checkpoints in ("last", "all"),
        f"KEEP_CHECKPOINTS must be last or all, not {s.keep_checkpoints}",
    )
    require(
        s.keep_checkpoints == "all" or s.save_interval > 1,
        "Megatron deletes no checkpoint with SAVE_INTERVAL=1: set 2 or more, or KEEP_CHECKPOINTS=all",
    )


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        refuse(f"{path} is no YAML ({' '.join(str(error).split())}): repair it")
    require(isinstance(settings, dict), f"{path} is no mapping: it must hold tcod_* settings, as `tcod_horizon: 30`")
    return settings


def recipe_settings(s: Settings) -> dict[str, Any]:
    """The run's own tcod_* settings: CONFIG's, and instead of them what the variables say."""
    recipe = read_yaml(s.config)
    if s.horizon:
        recipe["tcod_horizon"] = int(s.horizon)
    if s.eta:
        recipe["tcod_eta"] = int(s.eta)
    if float(s.eval_temperature) == 1 and s.teacher == "sglang":
        recipe["tcod_eval_kl"] = True
    return recipe
