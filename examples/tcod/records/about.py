"""about.json in the run directory: what ran. Every launch adds an entry, so a resumed run has several.

    {"launches": [{"started": "2026-01-31T12:00:00+00:00", "command": "python train.py ..", "settings": {..},
                   "slime_arguments": {..}, "recipe": {"commit": .., "sha256": ..}, "slime": {"commit": ..},
                   "versions": {"python": "3.12.3", "torch": ..}}]}

Keys and passwords are left out.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..settings.config import TcodConfig
from .run_dir import run_dir, write
from .secrets import without_secrets

logger = logging.getLogger(__name__)

PACKAGES = ("slime", "sglang", "megatron-core", "torch", "transformers", "ray")
HERE = Path(__file__).resolve().parents[1]  # the recipe


def write_about(args: Namespace) -> None:
    """Add this launch to about.json. Never raises."""
    try:
        _write_about(args)
    except Exception:  # whatever slime's arguments hold
        logger.exception("about.json is not written, and the run goes on without")


def _write_about(args: Namespace) -> None:
    folder = run_dir()
    if folder is None:
        return
    launches: list[Any] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        launches = list(json.loads((folder / "about.json").read_text())["launches"])
    text = json.dumps({"launches": [*launches, describe(args)]}, indent=1, default=lambda it: without_secrets(str(it)))
    write("about.json", text + "\n", "facts about the run")


def describe(args: Namespace) -> dict[str, Any]:
    """This launch, as plain data."""
    slime = importlib.util.find_spec("slime")
    slime_folder = Path(slime.origin).parent if slime and slime.origin else None
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(without_secrets(shlex.split(_command()))),
        "settings": without_secrets(TcodConfig.from_args(args).model_dump()),
        "slime_arguments": without_secrets({k: v for k, v in sorted(vars(args).items()) if not k.startswith("tcod_")}),
        "recipe": {"commit": _commit(HERE), "sha256": _digest(HERE)},
        "slime": {"commit": _commit(slime_folder) if slime_folder else None},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _command() -> str:
    """The driver's command line. The hooks run in a worker of Ray, which has another one."""
    import ray

    if ray.is_initialized():  # else the next line would start Ray
        with contextlib.suppress(Exception):  # Ray's own account of its jobs is no public interface
            job = ray.get_runtime_context().get_job_id()
            [command] = [one["Entrypoint"] for one in ray._private.state.jobs() if one["JobID"] == job]
            return command or shlex.join(sys.orig_argv)
    return shlex.join(sys.orig_argv)


def _commit(folder: Path) -> str | None:
    """Of the git checkout that the folder is in, "-dirty" behind it where tracked files are changed."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    return None


def _digest(folder: Path) -> str:
    """Of the recipe's modules: it may have been copied to where git does not know it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
