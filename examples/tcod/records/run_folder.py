"""$TCOD_RUN_DIR, the folder in which a run leaves what people read afterwards. Writing there never stops the run.

    metrics.jsonl    a line for each rollout and evaluation; tools/plot_runs.py draws them
    about.json       commits and versions of each launch; tcod.yaml beside it has the settings, logs/ the commands
    rollouts/        episodes, see saved_episodes.py

Where the variable is not set, nothing is written. Where the disk is full or the folder cannot be written, there is one
warning for each kind of file, and what is missing is counted.

A line of metrics.jsonl is {"kind": "rollout" or "eval", "n": .., "train_s": .., metric: value, ..}. n is the rollout's
id, or how many rollouts were trained on before the evaluation. train_s is the time in seconds, since this process's
line before, that was neither rollout nor evaluation: training, weights and checkpoints. A resumed run plays the
rollouts after its last checkpoint again, so the last line of a kind and n is the one that counts.
"""

import contextlib
import datetime
import errno
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .. import words
from ..episode.jsonl import read_lines

logger = logging.getLogger(__name__)

PACKAGES = ("slime", "sglang", "megatron-core", "torch", "transformers", "ray")
T = TypeVar("T")

_warned: set[str] = set()
_last_line_at: float | None = None  # time.monotonic()
_unsaved = 0
_rollout_played = False


def run_dir() -> Path | None:
    folder = os.environ.get("TCOD_RUN_DIR")
    return Path(folder) if folder else None


def write(name: str, text: str, kind: str, append: bool = False) -> bool:
    """Write a file of the run directory, all of the text or nothing. Returns whether it is there now.

    Args:
        name: its path below the run directory.
        text: ASCII, as json.dumps gives it.
        kind: what the file holds, for the warning.
        append: add to the file, instead of replacing it.
    """
    folder = run_dir()
    if folder is None:
        return False
    try:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (_append if append else _replace)(folder / name, text.encode("ascii"))
        return True
    except OSError as error:
        if kind not in _warned:
            logger.warning("%s are not written, and the run goes on without: %s", kind, error)
            _warned.add(kind)
        return False


def _append(path: Path, data: bytes) -> None:
    with path.open("ab+", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before:
            file.seek(before - 1)
            data = data if file.read() == b"\n" else b"\n" + data  # behind half a line that a crash has left
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)  # half a line would spoil the file
            raise


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def parse_lines(path: Path, parse: Callable[[Any], T]) -> Iterator[tuple[int, T]]:
    """(number, from 1; what `parse` makes of its JSON) of each line of a file that is not blank.

    A line that is no JSON, or that `parse` refuses, is left out with a warning: a run that was killed may have left
    half a line at the end.
    """

    def leave_out(number: int, error: Exception) -> None:
        logger.warning("line %d of %s is left out: %s", number, path, words(error))

    for number, line in read_lines(path, leave_out=leave_out):
        try:
            yield number, parse(line)
        except (ValueError, KeyError, TypeError) as error:
            leave_out(number, error)


# --------------------------------------------------------------------------------------------------- metrics.jsonl


def log_rollout(n: int, args: Any, samples: list[Any], metrics: dict[str, Any] | None, seconds: float) -> bool:
    """The metrics that generate_rollout returned, and train_s. False: slime logs as well."""
    note_rollout()
    _log("rollout", n, {} if metrics is None else metrics, seconds)
    return False


def log_eval(evaluation_id: int, args: Any, data: dict[str, Any], metrics: dict[str, Any] | None) -> bool:
    """An evaluation's metrics, and train_s. False: slime logs as well."""
    metrics = {} if metrics is None else metrics
    _log("eval", rollouts_before(evaluation_id), metrics, metrics.get("eval/tcod/eval_s", 0.0))
    return False


def note_rollout() -> None:
    """A rollout was played in this process."""
    global _rollout_played
    _rollout_played = True


def rollouts_before(evaluation_id: int) -> int:
    """How many rollouts were trained on before an evaluation: its n in metrics.jsonl and in names of files.

    slime gives the evaluation before rollout 0 and the one after it the same id, and evaluates before a rollout only
    where a run begins.
    """
    return evaluation_id + 1 if _rollout_played else 0


def _log(kind: str, n: int, metrics: dict[str, Any], seconds: float) -> None:
    """Append a line. One that cannot be written is counted in the next ones, as rollout/tcod/unsaved_lines so far."""
    global _last_line_at, _unsaved
    now = time.monotonic()
    train_s = 0.0 if _last_line_at is None else max(now - _last_line_at - seconds, 0.0)
    _last_line_at = now
    if _unsaved:
        metrics["rollout/tcod/unsaved_lines"] = _unsaved  # slime logs these metrics afterwards
    line = json.dumps({"kind": kind, "n": n, "train_s": train_s, **metrics}) + "\n"
    if not write("metrics.jsonl", line, "metrics", append=True) and run_dir():
        _unsaved += 1


# ------------------------------------------------------------------------------------------------------ about.json


def write_about() -> None:
    """Add this launch to about.json: a resumed run has several."""
    if (folder := run_dir()) is None:
        return
    launches: list[Any] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        launches = list(json.loads((folder / "about.json").read_text(encoding="utf-8"))["launches"])
    slime, versions = importlib.util.find_spec("slime"), {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    launches.append(
        {
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "recipe": _commit(Path(__file__).parent),
            "slime": _commit(Path(slime.origin).parent) if slime and slime.origin else None,
            "versions": versions,
        }
    )
    write("about.json", json.dumps({"launches": launches}, indent=1) + "\n", "facts about the run")


def _commit(folder: Path) -> str | None:
    """Of the git checkout that the folder is in, "-dirty" behind it where tracked files are changed."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    return None
