"""What run_qwen3_8b_tcod.sh needs of the machine: GPUs, files, disk space, and a RUN_DIR of its own."""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .launch_settings import Settings, read_yaml, refuse, require

# Of a checkpoint, by parameter: the weight in bfloat16; for Adam the weight in float32 and two moments.
CHECKPOINT_BYTES, WEIGHT_BYTES = 14, 2


def output(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return ""


def visible_gpus() -> list[str]:
    """The indices of GPU 0, 1, .. of CUDA_VISIBLE_DEVICES. slime takes no UUIDs, so these are looked up."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(",", " ").split()
    if not visible:
        return output("nvidia-smi", "--query-gpu=index", "--format=csv,noheader").split()
    if all(name.isdecimal() for name in visible):
        return visible
    lines = output("nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader").splitlines()
    indices = {uuid.strip(): index.strip() for index, _, uuid in (line.partition(",") for line in lines)}
    found = [[index for uuid, index in indices.items() if uuid.startswith(name)] for name in visible]
    for name, matches in zip(visible, found, strict=True):
        require(
            len(matches) == 1,
            f"CUDA_VISIBLE_DEVICES has {name}, which is no GPU of nvidia-smi, and slime wants indices: "
            "set it to those, as 0,1,2",
        )
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # in which nvidia-smi counts
    return [index for [index] in found]


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
    for file, variable in [(s.data_dir / "train.jsonl", "DATA_DIR")] + [
        (file, "DATA_DIR or EVAL_SETS") for file in s.eval_files().values()
    ]:
        require(
            file.is_file() and file.stat().st_size,
            f"no rows in {file}: prepare the data as README.md says, or set {variable}",
        )


def is_checkpoint(folder: Path) -> bool:
    return (folder / "latest_checkpointed_iteration.txt").is_file() or any(folder.glob("*.safetensors"))


def check_machine(s: Settings, gpus: list[str], starts_teacher: bool) -> None:
    used = set(range(s.local_gpus()))
    if starts_teacher:
        used |= set(s.teacher_numbers())
        with suppress(OSError), socket.create_connection((s.teacher_host, s.teacher_port), timeout=5):
            refuse(
                f"port {s.teacher_port} of {s.teacher_host} is taken: "
                "set TEACHER_PORT, or TEACHER_URL if that is the teacher"
            )
    needed = max(used, default=-1) + 1
    require(
        len(gpus) >= needed,
        f"{needed} GPUs are needed and {len(gpus)} visible: change ACTOR_GPUS, ROLLOUT_GPUS or TEACHER_GPUS",
    )
    idle = [str(number) for number in range(len(gpus)) if number not in used]
    if idle and not s.ray_address:
        print(f"GPUs {','.join(idle)} are not used: see ACTOR_GPUS, ROLLOUT_GPUS and TEACHER_GPUS")


# ------------------------------------------------------------------------------------------------------------ RUN_DIR


def lock(run_dir: Path) -> IO[str]:
    """Refuse a RUN_DIR in which a run goes on. It is free again when the file that is returned is closed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        refuse(f"{run_dir} has a run that goes on ({file.read().strip()}): wait for its end, or set another RUN_DIR")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


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
    if checkpoint.isdecimal():
        check_data_state(s, checkpoint)
    return checkpoint


def check_data_state(s: Settings, checkpoint: str) -> None:
    """slime writes the data's position after the weights, and without it would begin the data anew."""
    folder = s.run_dir / "checkpoints" / "rollout"
    state = folder / f"global_dataset_state_dict_{checkpoint}.pt"
    if state.is_file():
        return
    found = (re.fullmatch(r"global_dataset_state_dict_(\d+)\.pt", file.name) for file in folder.glob("*.pt"))
    before = [int(match[1]) for match in found if match and int(match[1]) < int(checkpoint)]
    way_out = "set another RUN_DIR"
    if before:
        older = state.with_name(f"global_dataset_state_dict_{max(before)}.pt")
        way_out = f"copy {older.name} there, whereby the tasks since rollout {max(before)} come again, or {way_out}"
    refuse(f"checkpoint {checkpoint} has no {state}, the position in the data, as after a crash in between: {way_out}")


def check_space(s: Settings) -> None:
    """Refuse a disk on which the checkpoints of the run do not fit. Unknown without the student's safetensors."""
    weights = sum(file.stat().st_size for file in s.student.glob("*.safetensors"))
    config = json.loads((s.student / "config.json").read_text())
    parameters = weights // (4 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2)
    saves = -(-s.num_rollout // s.save_interval)
    # The next one is written before the last one is deleted.
    kept = saves if s.keep_checkpoints == "all" else min(saves, 2)
    needed = parameters * (kept * CHECKPOINT_BYTES + (saves * WEIGHT_BYTES if s.save_hf == "1" else 0))
    files = (file for part in ("checkpoints", "hf") for file in (s.run_dir / part).rglob("*") if file.is_file())
    there = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(next(folder for folder in (s.run_dir, *s.run_dir.parents) if folder.exists())).free
    require(
        free >= needed - there,
        f"the disk of RUN_DIR {s.run_dir} has {free / 1e9:.0f} GB free, and {kept} checkpoints and the copies for "
        f"Hugging Face take {(needed - there) / 1e9:.0f} GB more: set another RUN_DIR, raise SAVE_INTERVAL, or set "
        "KEEP_CHECKPOINTS=last or SAVE_HF=0",
    )
