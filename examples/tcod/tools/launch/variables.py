"""The variables of run_qwen3_8b_tcod.sh, and what contradicts itself or does not fit the machine.

The script describes them, and has seen to it that numbers are numbers and choices one of those it names. What slime,
Ray and Megatron refuse at once is left to them. A refusal is a ConfigError.
"""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ... import ConfigError
from ...settings.checks import KL_OF_EVALUATIONS, reward_refusals
from ...settings.config import TcodConfig, read_yaml
from ...settings.secrets import without_secrets

# Variables that win over CONFIG: NAME over its tcod_name. A further one is a word here and a line in the script.
TCOD_VARIABLES = "VARIANT HORIZON ETA REWARD_COEF TEACHER_SEES".split()
PATHS = "config run_dir slime_dir megatron_dir student student_load teacher_model teacher_load data_dir".split()
NUMBERS = """
    teacher_port teacher_start_s colocate actor_nodes actor_gpus tensor_parallel pipeline_parallel context_parallel
    rollout_gpus engine_gpus node_gpus eval_interval num_rollout batch samples_per_task max_turn_len max_context_len
    save_interval save_hf dry_run
""".split()
# Flags of train.py, and the variables that stand for them: given by hand, they would pass by the checks.
OWN_FLAGS = dict(
    pair.split("=")
    for pair in (
        "--rollout-function-path=MODE --sglang-server-concurrency=CONCURRENCY --opd-type=TEACHER --rm-url=TEACHER_URL "
        "--colocate=COLOCATE --actor-num-nodes=ACTOR_NODES --actor-num-gpus-per-node=ACTOR_GPUS --load=RUN_DIR "
        "--rollout-num-gpus=ROLLOUT_GPUS --rollout-num-gpus-per-engine=ENGINE_GPUS --num-gpus-per-node=NODE_GPUS "
        "--tensor-model-parallel-size=TENSOR_PARALLEL --pipeline-model-parallel-size=PIPELINE_PARALLEL --save=RUN_DIR "
        "--context-parallel-size=CONTEXT_PARALLEL --prompt-data=DATA_DIR --eval-prompt-data=EVAL_SETS "
        "--apply-chat-template-kwargs=CHAT_TEMPLATE_KWARGS --custom-config-path=CONFIG --loss-type=VARIANT "
        "--use-opd=TEACHER --rollout-max-response-len=MAX_TURN_LEN --rollout-max-context-len=MAX_CONTEXT_LEN "
        "--rollout-batch-size=BATCH --n-samples-per-prompt=SAMPLES_PER_TASK --hf-checkpoint=STUDENT "
        "--opd-teacher-load=TEACHER_LOAD --save-interval=SAVE_INTERVAL --eval-temperature=EVAL_TEMPERATURE"
    ).split()
)
TAKEN_NAMES = ("train", "step", "tcod", "eval_s")  # metrics or files under these names are not an evaluation's
# Of a checkpoint, by parameter: the weight in bfloat16; for Adam the weight in float32 and two moments.
CHECKPOINT_BYTES, WEIGHT_BYTES = 14, 2
OUTPUT_S = 60.0  # of nvidia-smi and hostname; signals are held back meanwhile


class Settings(SimpleNamespace):
    """The script's variables in lower case: NUMBERS, PATHS, and texts. "" is one that was not set."""

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> "Settings":
        """Raises ConfigError where a value cannot be read."""
        s = cls(**{name.lower(): text for name, text in variables.items()})
        vars(s).update({name: int(vars(s)[name]) for name in NUMBERS})
        vars(s).update({name: Path(vars(s)[name]) for name in PATHS})
        s.ray_address = "" if s.ray_address == "local" else s.ray_address  # Ray's own word for one that starts here
        s.actors = s.actor_nodes * s.actor_gpus  # GPUs that train, on all nodes together
        imitates = s.variant == "sft"  # nothing is played, and so nothing evaluated
        s.train_gpus = s.actors if s.colocate or imitates else s.actors + s.rollout_gpus  # that train and play
        s.local_gpus = 0 if s.ray_address else s.train_gpus  # those of this machine, from the first on
        s.starts_teacher = s.teacher == "sglang" and not s.teacher_url
        s.teacher_gpus = [int(number) for number in s.teacher_gpus.split(",")] if s.starts_teacher else []
        s.eval_files = {} if imitates else read_eval_sets(s)
        with suppress(ValueError):
            s.chat_template_kwargs = json.loads(s.chat_template_kwargs)
        valid = isinstance(s.chat_template_kwargs, dict)
        require(valid, f"CHAT_TEMPLATE_KWARGS must be a JSON object like {{}}, not {s.chat_template_kwargs}")
        return s


def read_eval_sets(s: Settings) -> dict[str, Path]:
    """The rows of each evaluation, by the name that its metrics and files have."""
    files: dict[str, Path] = {}
    for part in s.eval_sets.split():
        name, _, file = part.partition("=")
        valid = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) and file.endswith(".jsonl")
        form = "NAME=FILE.jsonl, with spaces between, NAME of letters, digits, . _ -"
        require(valid, f"EVAL_SETS must be {form}: not {part}")
        taken = name in (*TAKEN_NAMES, *files)
        require(not taken, f"EVAL_SETS has the name {name}, which is taken: choose another one")
        files[name] = s.data_dir / file
    return files


def read_tcod(s: Settings, variables: Mapping[str, str]) -> dict[str, Any]:
    """The run's tcod_* settings: CONFIG's, and instead of them what the variables say. Raises ConfigError."""
    tcod = read_yaml(s.config)
    for name in TCOD_VARIABLES:
        if value := variables.get(name):
            with suppress(ValueError):  # a text as it is
                value = json.loads(value)
            tcod[f"tcod_{name.lower()}"] = value
    if variables.get("HORIZON") and "tcod_horizon" in str(tcod.get("tcod_environments")):
        raise ConfigError("HORIZON would be that of some environments alone: set it in CONFIG's tcod_environments")
    if float(s.eval_temperature) == 1 and s.teacher == "sglang":
        tcod["tcod_eval_kl"] = True
    if sentence := next(reward_refusals(tcod, s.teacher != "none", s.samples_per_task), None):
        raise ConfigError(sentence)
    require(s.teacher == "sglang" or not tcod.get("tcod_eval_kl"), KL_OF_EVALUATIONS)
    return tcod


def teacher_context(s: Settings, tcod: dict[str, Any]) -> int:
    """Tokens that the teacher's server takes: an episode, a note, and 7 that SGLang keeps. Raises ConfigError."""
    folders = ("tcod_data_root", "tcod_environments")  # may be another machine's
    settings = {name: value for name, value in tcod.items() if name not in folders}
    return TcodConfig.from_mapping(settings, str(s.config)).scored_len(s.max_context_len)[0] + 7


def eval_flags(s: Settings, tcod: dict[str, Any], extra: list[str]) -> list[str]:
    """train.py's flags of evaluations, which slime's fully asynchronous mode does not have.

    Raises:
        ConfigError: no evaluation could have the KL that is asked for.
    """
    if s.mode == "fully_async" or not s.eval_files:
        return []
    untempered = float(s.eval_temperature) == 1 or any(word.startswith("--eval-config") for word in extra)
    require(untempered or not tcod.get("tcod_eval_kl"), "tcod_eval_kl is of policies as they are: EVAL_TEMPERATURE=1")
    flags = {"--eval-interval": s.eval_interval, "--n-samples-per-eval-prompt": 1, "--eval-top-p": 1}
    flags |= {"--eval-temperature": s.eval_temperature, "--eval-max-response-len": s.max_turn_len}
    return [str(word) for pair in [*flags.items(), ["--eval-prompt-data"], *s.eval_files.items()] for word in pair]


def require(condition: object, sentence: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(sentence)


def check_settings(s: Settings, extra: list[str]) -> None:
    """Refuse what contradicts itself, whatever the machine; `extra` are the user's own flags of train.py."""
    for flag in (word.partition("=")[0] for word in extra):
        variable = OWN_FLAGS.get(flag)
        require(not variable, f"{flag} is the script's own: set {variable} instead of giving it again")
    run_dir, url = str(s.run_dir), without_secrets(s.teacher_url)
    require(not re.search(r"[{}\x00-\x1f]", run_dir), f"RUN_DIR {run_dir!r} has a brace or a line break: rename it")
    copy = s.tensor_parallel * s.pipeline_parallel * s.context_parallel
    require(
        copy and s.actors % copy == 0 and s.batch * s.samples_per_task % (s.actors // copy) == 0,
        f"the {s.actors} GPUs of ACTOR_NODES x ACTOR_GPUS must be a multiple of TENSOR_PARALLEL x PIPELINE_PARALLEL x "
        "CONTEXT_PARALLEL, one copy of the model, and BATCH x SAMPLES_PER_TASK a multiple of the copies",
    )
    whole = s.rollout_gpus % s.engine_gpus == 0
    require(whole, f"ENGINE_GPUS {s.engine_gpus} must divide ROLLOUT_GPUS {s.rollout_gpus}")
    same = f"COLOCATE=1 has the engines on the {s.actors} GPUs that train: unset ROLLOUT_GPUS"
    require(s.rollout_gpus == s.actors or not s.colocate, same)
    for gpu in s.teacher_gpus:
        taken = f"GPU {gpu} of TEACHER_GPUS is taken: training and the student's engines have 0 to {s.local_gpus - 1}"
        require(gpu >= s.local_gpus, taken)
    require(s.mode == "sync" or s.variant != "sft", "VARIANT=sft plays nothing, so nothing ahead: set MODE=sync")
    alone = "TEACHER=megatron needs COLOCATE=1: elsewhere slime pushes the teacher's weights to the engines"
    require(s.teacher != "megatron" or s.colocate, alone)
    require(s.teacher == "sglang" or not url, f"TEACHER={s.teacher} asks no other server: unset TEACHER_URL")
    valid = re.fullmatch(r"(https?://([^/@]+@)?(\[[0-9A-Fa-f:.]+\]|[^][/:@]+)(:\d+)?)?", s.teacher_url)
    # Where it listens is also where the nodes ask it.
    everywhere = s.starts_teacher and s.ray_address and s.teacher_host in ("0.0.0.0", "::")
    require(not everywhere, f"TEACHER_HOST {s.teacher_host} names no node: set the address that the nodes reach")
    require(valid, f"TEACHER_URL must be http://HOST:PORT, an IPv6 address in brackets, not {url}")


def output(*command: str) -> str:
    """What a program prints; nothing where it is missing, fails or hangs."""
    with suppress(OSError, subprocess.TimeoutExpired):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            printed, _ = process.communicate(timeout=OUTPUT_S)
            return "" if process.returncode else printed
        finally:
            process.kill()  # and not waited for: in a driver that hangs it may not die
    return ""


def visible_gpus() -> list[str]:
    """The names of GPU 0, 1, .. of CUDA_VISIBLE_DEVICES, or of all that there are."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(",", " ").split()
    return named or output("nvidia-smi", "--query-gpu=index", "--format=csv,noheader").split()


def check_machine(s: Settings, gpus: list[str]) -> None:
    """Whether there are the GPUs, as visible_gpus has them, the teacher's port and disk space."""
    for name in gpus:  # slime counts with them
        require(name.isdecimal(), f"CUDA_VISIBLE_DEVICES has {name}: set it to indices of nvidia-smi, as 0,1,2")
    used = {*range(s.local_gpus), *s.teacher_gpus}
    needed, change = max(used, default=-1) + 1, "see ACTOR_GPUS, ROLLOUT_GPUS and TEACHER_GPUS"
    require(needed <= len(gpus), f"{needed} GPUs are needed and {len(gpus)} visible: {change}")
    if len(used) < len(gpus) and not s.ray_address:
        print(f"{len(gpus) - len(used)} of {len(gpus)} GPUs are not used: {change}")
    with suppress(OSError):
        if s.starts_teacher:
            socket.create_connection((s.teacher_host, s.teacher_port), timeout=5).close()
            taken = f"port {s.teacher_port} of {s.teacher_host} is taken"
            raise ConfigError(f"{taken}: set TEACHER_PORT, or TEACHER_URL if that is the teacher")
    check_space(s)


def check_space(s: Settings) -> None:
    """Whether the checkpoints of the run fit on the disk, by the student's safetensors in bfloat16."""
    saves = -(-s.num_rollout // s.save_interval)
    # The next one is written before the last one is deleted; Megatron never deletes that of rollout 0.
    kept = min(saves, 2 + (s.save_interval == 1)) if s.keep_checkpoints == "last" else saves
    parameters = size(s.student.glob("*.safetensors")) // 2
    needed = parameters * (kept * CHECKPOINT_BYTES + saves * WEIGHT_BYTES * s.save_hf)
    needed -= size(s.run_dir.glob("checkpoints/**/*")) + size(s.run_dir.glob("hf/**/*"))
    free = shutil.disk_usage(s.run_dir).free
    change = "set another RUN_DIR, raise SAVE_INTERVAL, or set KEEP_CHECKPOINTS=last or SAVE_HF=0"
    require(
        free >= needed,
        f"the disk of RUN_DIR {s.run_dir} has {free / 1e9:.0f} GB free, and {kept} checkpoints and the copies for "
        f"Hugging Face take {needed / 1e9:.0f} GB more: {change}",
    )


def size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
