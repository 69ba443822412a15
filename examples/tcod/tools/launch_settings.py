"""The variables of run_qwen3_8b_tcod.sh, and which of them are refused.

A refusal is exit status 1 and one sentence that names the variable and the fix.
"""

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml


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
    teacher: str
    teacher_model: Path
    teacher_load: Path
    teacher_url: str
    teacher_host: str
    teacher_port: int
    teacher_start_s: int
    actor_nodes: int
    actor_gpus: int
    tensor_parallel: int
    rollout_gpus: int
    teacher_gpus: str
    alfworld_data: Path
    data_dir: Path
    batch: int
    samples_per_task: int
    max_turn_len: int
    max_context_len: int
    eval_temperature: str
    wandb_project: str
    dry_run: str
    ray_address: str  # a cluster that is up; without one Ray starts here

    @classmethod
    def read(cls) -> "Settings":
        return cls(**{field.name: field.type(os.environ.get(field.name.upper(), "")) for field in fields(cls)})

    def local_gpus(self) -> int:
        """How many GPUs of this machine training and rollouts take, from the first on."""
        return 0 if self.ray_address else self.actor_gpus + self.rollout_gpus

    def teacher_numbers(self) -> list[int]:
        return [int(number) for number in self.teacher_gpus.split(",")]

    def teacher_address(self) -> str:
        return self.teacher_url or f"http://{self.teacher_host}:{self.teacher_port}"


def refuse(sentence: str) -> NoReturn:
    """Say it at once, before processes are ended."""
    print(f"launch: {sentence}", file=sys.stderr, flush=True)
    sys.exit(1)


def require(condition: object, sentence: str) -> None:
    """Refuse to go on unless the condition holds."""
    if not condition:
        refuse(sentence)


# ------------------------------------------------------------------------------------------- settings that contradict


def check_settings(s: Settings) -> None:
    """Refuse what contradicts itself, whatever the machine. The script has seen to it that numbers are numbers."""
    require(s.variant in ("opd", "f2b", "b2f"), f"VARIANT must be opd, f2b or b2f, not {s.variant}")
    require(s.teacher in ("sglang", "megatron"), f"TEACHER must be sglang or megatron, not {s.teacher}")
    require(s.config.is_file(), f"no file {s.config}: set CONFIG to a YAML of tcod_* settings")
    variant = read_yaml(s.config).get("tcod_variant")
    require(variant == s.variant, f"{s.config} is not for VARIANT={s.variant}: change one of them")
    require(not s.eta or s.variant != "opd", "ETA is the speed of a curriculum and VARIANT=opd has none: unset ETA")
    require(
        s.max_turn_len < s.max_context_len,
        f"MAX_TURN_LEN {s.max_turn_len} is one turn of MAX_CONTEXT_LEN {s.max_context_len}: make it smaller",
    )
    require(
        s.actor_gpus % s.tensor_parallel == 0,
        f"TENSOR_PARALLEL {s.tensor_parallel} must divide ACTOR_GPUS {s.actor_gpus}",
    )
    copies = s.actor_nodes * s.actor_gpus // s.tensor_parallel
    require(
        s.batch * s.samples_per_task % copies == 0,
        f"BATCH x SAMPLES_PER_TASK must be a multiple of {copies}, ACTOR_NODES x ACTOR_GPUS / TENSOR_PARALLEL",
    )
    require(
        s.actor_nodes == 1 or s.ray_address,
        f"ACTOR_NODES is {s.actor_nodes}: set RAY_ADDRESS to the nodes' Ray",
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
            f"GPU {gpu} of TEACHER_GPUS is taken: ACTOR_GPUS + ROLLOUT_GPUS are 0 to {s.local_gpus() - 1}",
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
    if s.eval_temperature == "1" and s.teacher == "sglang":
        recipe["tcod_eval_kl"] = True
    return recipe


def visible_gpus() -> list[str]:
    """The names in CUDA_VISIBLE_DEVICES of GPU 0, 1, .. of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = visible or output("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
    return visible.replace(",", " ").split()


def output(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return ""


# ----------------------------------------------------------------------------------------- checks before a GPU is used


def check_files(s: Settings, starts_teacher: bool) -> None:
    require((s.slime_dir / "train.py").is_file(), f"no train.py in {s.slime_dir}: set SLIME_DIR to slime's checkout")
    require(
        (s.megatron_dir / "megatron").is_dir(),
        f"no Megatron-LM in {s.megatron_dir}: set MEGATRON_DIR to its checkout",
    )
    weights = "to a Megatron checkpoint or to safetensors of Hugging Face"
    require(
        (s.student / "config.json").is_file(),
        f"no config.json in {s.student}: set STUDENT to the student's Hugging Face checkpoint",
    )
    require(is_checkpoint(s.student_load), f"no weights in {s.student_load}: set STUDENT_LOAD {weights}")
    if s.teacher == "megatron":
        require(is_checkpoint(s.teacher_load), f"no weights in {s.teacher_load}: set TEACHER_LOAD {weights}")
    if s.teacher == "megatron" or starts_teacher:
        require(
            (s.teacher_model / "config.json").is_file(),
            f"no config.json in {s.teacher_model}: set TEACHER_MODEL to the teacher's Hugging Face checkpoint",
        )
    require(
        (s.alfworld_data / "json_2.1.1").is_dir(),
        f"no json_2.1.1 in {s.alfworld_data}: run alfworld-download, or set ALFWORLD_DATA",
    )
    for split in ("train", "valid_seen", "valid_unseen"):
        file = s.data_dir / f"{split}.jsonl"
        require(
            file.is_file() and file.stat().st_size,
            f"no {split}.jsonl in {s.data_dir}: run prepare_alfworld.py, or set DATA_DIR",
        )


def is_checkpoint(folder: Path) -> bool:
    return (folder / "latest_checkpointed_iteration.txt").is_file() or any(folder.glob("*.safetensors"))


def check_machine(s: Settings, gpus: list[str], starts_teacher: bool) -> None:
    needed = s.local_gpus()
    if starts_teacher:
        needed = max(needed, max(s.teacher_numbers()) + 1)
        with suppress(OSError), socket.create_connection((s.teacher_host, s.teacher_port), timeout=5):
            refuse(
                f"port {s.teacher_port} of {s.teacher_host} is taken: "
                "set TEACHER_PORT, or TEACHER_URL if that is the teacher"
            )
    require(
        len(gpus) >= needed,
        f"{needed} GPUs are needed and {len(gpus)} visible: change ACTOR_GPUS, ROLLOUT_GPUS or TEACHER_GPUS",
    )


def last_checkpoint(s: Settings, recipe: dict[str, Any]) -> str:
    """The checkpoint from which the run continues, "" for a new run. It must have had the same settings."""
    file = s.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    checkpoint = file.read_text().strip() if file.is_file() else ""
    before = s.run_dir / "tcod.yaml"
    if checkpoint and before.is_file():
        require(
            read_yaml(before) == recipe,
            f"{before} has other settings than this run: take them back, or set another RUN_DIR",
        )
    return checkpoint
