"""RUN_DIR: one run at a time, and a run that continues is the same run. A refusal is a ConfigError.

run.yaml there says what the run is made of: its settings, and rows, models and lengths by the script's variables.
"""

import fcntl
import hashlib
import os
import random
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import yaml

from ... import ConfigError
from ...settings.config import TcodConfig
from ..common.command import result_file
from .variables import Settings, require

MIB = 2**20
# Of the settings: where things are, and how a run is played, not what it learns.
FREE = {f"tcod_{name}" for name in "data_root teacher_url env_workers envs_per_worker env_timeout_s".split()}
FREE_OF_A_RUN = {f"tcod_{name}" for name in "engine_timeout_s teacher_timeout_s teacher_concurrency eval_kl".split()}
FREE_OF_A_RUN |= {"tcod_max_replacements", "tcod_save_episodes", "tcod_save_plain_scores"}


def lock(run_dir: Path) -> IO[str]:
    """Make RUN_DIR, and refuse one in which a run goes on. It is free again when the file is closed."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"RUN_DIR {run_dir} cannot be written ({error}): set another one") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        goes_on = f"{run_dir} has a run that goes on ({file.read().strip()})"
        raise ConfigError(f"{goes_on}: wait for its end, or set another RUN_DIR") from error
    except OSError as error:  # a file system without locks
        print(f"launch: warning: no lock in {run_dir} ({error}): start no second run there", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def begin(s: Settings, tcod: dict[str, Any], commands: str) -> Path:
    """Write down what the run is and what is started. Returns the folder of this start's logs."""
    before, file = {}, s.run_dir / "run.yaml"
    now = identity(s, TcodConfig.from_mapping(tcod, str(s.config)))
    for settings in (tcod, *(tcod.get("tcod_environments") or {}).values()):
        root = os.path.expanduser(os.path.expandvars(settings.get("tcod_data_root") or "/"))
        require(os.path.isabs(root), f"tcod_data_root {root} depends on the current folder: give the whole path")
    if checkpoint := last_checkpoint(s.run_dir):
        before = made_of(file) if file.is_file() else {}
        changed = ", ".join(sorted(key for key in before.keys() & now.keys() if before[key] != now[key]))
        require(not changed, f"{s.run_dir} has a run with another {changed}: take it back, or set another RUN_DIR")
    require(checkpoint or s.student_load.exists(), f"nothing there, {s.student_load}: set STUDENT_LOAD")
    started = time.strftime("%Y%m%d-%H%M%S")
    logs = s.run_dir / "logs" / started
    logs.mkdir(parents=True, exist_ok=True, mode=0o700)  # slime prints all settings, and some may be keys
    for name in () if checkpoint else ("metrics.jsonl", "about.json", "rollouts"):
        if (s.run_dir / name).exists():  # of a start that ended before its first checkpoint
            (s.run_dir / name).rename(logs / f"before-{name}")
    now["wandb_run_id"] = before.get("wandb_run_id") or f"tcod-{started}-{random.randrange(32768)}"
    for name, values in {"tcod.yaml": tcod, "run.yaml": before | now}.items():
        with result_file(s.run_dir / name) as opened:
            os.fchmod(opened.fileno(), 0o600)
            opened.write(to_yaml(values))
    (logs / "command.sh").write_text(commands, "utf-8")
    if os.environ.get("WANDB_PROJECT"):  # slime passes no run id
        os.environ.update(WANDB_RUN_ID=now["wandb_run_id"], WANDB_RESUME="allow")
    print(f"{s.run_dir} continues from checkpoint {checkpoint}" if checkpoint else f"{s.run_dir} starts")
    print(f"logs: {logs}", flush=True)
    return logs


def made_of(file: Path) -> dict[str, Any]:
    """What run.yaml says. Raises ConfigError where it cannot be read."""
    values = None
    with suppress(ValueError, yaml.YAMLError):
        values = yaml.safe_load(file.read_text("utf-8"))
    remedy = "move it away to go on without a comparison, or set another RUN_DIR"
    require(isinstance(values, dict), f"{file} is damaged, and says no more what the run is made of: {remedy}")
    for entry in (values.get("tcod_environments") or {}).values():
        for name in FREE & entry.keys():  # as earlier versions wrote it
            del entry[name]
    return values


def last_checkpoint(run_dir: Path) -> str:
    """The checkpoint from which the run continues, "" for a new run."""
    latest = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    checkpoint = latest.read_text().strip() if latest.is_file() else ""
    # slime writes the position in the data after the weights, and without it would begin the data anew.
    state = run_dir / "checkpoints" / "rollout" / f"global_dataset_state_dict_{checkpoint}.pt"
    way_out = "copy the newest older one there (the tasks that came after it come again), or set another RUN_DIR"
    lost = f"checkpoint {checkpoint} has no {state}, the position in the data: {way_out}"
    require(state.is_file() or not checkpoint.isdecimal(), lost)
    return checkpoint


def identity(s: Settings, config: TcodConfig) -> dict[str, Any]:
    """What the run is made of, by setting and by variable. Rows and models count by content, not by path."""
    files = {"DATA_DIR": s.data_dir / "train.jsonl", "STUDENT": s.student}
    files |= {f"EVAL_SETS {name}": file for name, file in s.eval_files.items()}
    if s.teacher in ("sglang", "megatron") and not s.teacher_url:
        variable = "TEACHER_LOAD" if s.teacher == "megatron" else "TEACHER_MODEL"
        files[variable] = vars(s)[variable.lower()]
    entries = {"tcod_environments": {"__all__": FREE}}
    parts = config.model_dump(exclude={**dict.fromkeys(FREE | FREE_OF_A_RUN, True), **entries})
    for name in ("CHAT_TEMPLATE_KWARGS", "MAX_TURN_LEN", "MAX_CONTEXT_LEN", "SAMPLES_PER_TASK", "TEACHER"):
        parts[name] = vars(s)[name.lower()]
    return parts | {variable: digest(path, variable) for variable, path in files.items()}


def digest(path: Path, variable: str) -> str:
    """Of a file, or of a model's files, of which sizes and ends are enough. Raises ConfigError if there is nothing."""
    files = [path] if path.is_file() else sorted(path.glob("*.[js]*"))  # json, jinja, safetensors; or Megatron's
    files = files or sorted(file for file in path.rglob("*") if file.is_file())
    require(files, f"nothing there, {path}: set {variable.partition(' ')[0]}, or prepare it as README.md says")
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(0 if file == path else max(0, size - MIB))
            whole.update(f"{size} ".encode() + opened.read())
    return whole.hexdigest()


def to_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
