"""A slime checkout that has the recipe in its examples, also under another name."""

import os
import shutil
from pathlib import Path

from tests.support.run_script import copy_recipe

COPY = "my_agent"
LEAVE_TRACES = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": ""}  # environment for `imported` to see them


def make(folder: Path) -> Path:
    """Copy SLIME_DIR to this folder, with examples/tcod and examples/my_agent. No file of it was imported yet."""
    leave_out = shutil.ignore_patterns(".git", "docs", "docker", "__pycache__")
    shutil.copytree(os.environ["SLIME_DIR"], folder, ignore=leave_out)
    for name in ("tcod", COPY):
        shutil.rmtree(folder / "examples" / name, ignore_errors=True)
        copy_recipe(folder / "examples" / name)
    return folder


def imported(folder: Path) -> bool:
    """Whether a Python process that leaves traces has imported from this folder."""
    return any(folder.rglob("*.pyc"))
