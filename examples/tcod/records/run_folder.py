"""$TCOD_RUN_DIR, the folder in which a run leaves what people read afterwards. Writing there never stops the run.

    metrics.jsonl    a line for each rollout and evaluation; tools/plot_runs.py draws them
    about.json       commits and versions of each launch; tcod.yaml beside it has the settings, logs/ the commands
    rollouts/        episodes, see saved_episodes.py

Where the variable is not set, nothing is written. Where the disk is full or the folder cannot be written, there is one
warning for each kind of file, and what is missing is counted.

A line of metrics.jsonl is {"kind": "rollout" or "eval", "n": .., "train_s": .., metric: value, ..}. n is the rollout's
id, or how many rollouts were trained on before the evaluation. train_s is the time in seconds between this process's
line before and the begin of the rollout or evaluation: training, weights and checkpoints. A resumed run plays the
rollouts after its last checkpoint again, so the last line of a kind and n is the one that counts.
"""

import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PACKAGES = ("slime", "sglang", "megatron-core", "torch", "transformers", "ray")

_warned: set[str] = set()  # kinds of files
_last_line_at: float | None = None  # time.monotonic()
_unsaved = 0  # lines of metrics.jsonl
_rollout_played = False


def run_dir() -> Path | None:
    folder = os.environ.get("TCOD_RUN_DIR")
    return Path(folder) if folder else None


def write(name: str, text: str, append: bool = False) -> bool:
    """Write a file of the run directory, all of the text or nothing. Returns False where that was not possible.

    Args:
        name: its path below the run directory.
        text: ASCII, as json.dumps gives it.
        append: add to the file, instead of replacing it.
    """
    if (folder := run_dir()) is None:
        return True
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (_append if append else _replace)(path, text)
        return True
    except OSError as error:
        if (kind := name.partition("/")[0]) not in _warned:
            logger.warning("%s is not written, and the run goes on without: %s", kind, error)
            _warned.add(kind)
        return False


def _append(path: Path, text: str) -> None:
    before = path.read_bytes() if path.exists() else b""
    gap = "\n" if before and not before.endswith(b"\n") else ""  # after half a line that a crash has left
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(gap + text)
    except OSError:
        if path.exists():
            os.truncate(path, len(before))  # half a line would spoil the file
        raise


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def rollouts_before(evaluation_id: int) -> int:
    """How many rollouts were trained on before an evaluation: its n in metrics.jsonl and in names of files.

    slime gives the evaluation before rollout 0 and the one after it the same id, and evaluates before a rollout only
    where a run begins.
    """
    return evaluation_id + 1 if _rollout_played else 0


def write_metrics(kind: str, n: int, metrics: dict[str, Any], started: float) -> None:
    """Append a line of metrics.jsonl about what began at `started` (time.monotonic()) and has ended.

    A line that cannot be written is counted in the next ones' metrics, as rollout/tcod/unsaved_lines so far.
    """
    global _last_line_at, _unsaved, _rollout_played
    train_s = 0.0 if _last_line_at is None else max(started - _last_line_at, 0.0)
    _last_line_at = time.monotonic()
    _rollout_played |= kind == "rollout"
    if _unsaved:
        metrics["rollout/tcod/unsaved_lines"] = _unsaved  # slime logs these metrics afterwards
    line = json.dumps({"kind": kind, "n": n, "train_s": train_s, **metrics}) + "\n"
    _unsaved += not write("metrics.jsonl", line, append=True)


def write_about() -> None:
    """Add this launch to about.json: a resumed run has several."""
    if (folder := run_dir()) is None:
        return
    try:
        launches = [*json.loads((folder / "about.json").read_bytes())["launches"]]
    except (OSError, ValueError, KeyError, TypeError):
        launches = []
    about: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())}
    for name, module in {"recipe": __package__, "slime": "slime"}.items():
        about[name] = _commit(importlib.util.find_spec(module).submodule_search_locations[0])
    installed = {one.name: one.version for one in importlib.metadata.distributions() if one.name in PACKAGES}
    launches.append({**about, "versions": {"python": sys.version.split()[0], **installed}})
    write("about.json", json.dumps({"launches": launches}, indent=1) + "\n")


def _commit(folder: str) -> str | None:
    """The commit of the checkout that holds the folder, with "-dirty" where tracked files are changed."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
