"""README.md's "Adapt it", as it is printed: the class, the rows, the settings, and the commands up to a model."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smoke import hooks

NUM_GPUS = 0
RECIPE = hooks.ROOT / "examples" / "tcod"


@pytest.fixture(scope="module")
def blocks() -> dict[str, list[str]]:
    """The code blocks of the section, by language."""
    section = (RECIPE / "README.md").read_text().split("## Adapt it")[1].split("\n## ")[0]
    found: dict[str, list[str]] = {}
    for language, text in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL):
        found.setdefault(language, []).append(text)
    return found


def run(folder: Path, command: list[str]) -> str:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_is_played_as_printed(blocks, tmp_path):
    game, make_rows = blocks["python"]
    assert len(game.splitlines()) <= 40
    (tmp_path / "examples").mkdir()
    shutil.copytree(RECIPE, tmp_path / "examples" / "tcod", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "examples" / "tcod" / "env_number.py").write_text(game)
    (tmp_path / "make_rows.py").write_text(make_rows)
    (tmp_path / "number_b2f.yaml").write_text(blocks["yaml"][0])
    for line in blocks["bash"][0].splitlines():
        said = run(tmp_path, [sys.executable, *shlex.split(line)[1:]])
    assert "train.jsonl: 8 of 48 rows play (--count 48 plays all), 8 demonstrations replay" in said
    assert "tcod_engines_per_worker: 16" in said


def test_the_settings_are_settings(blocks):
    import yaml

    from examples.tcod.settings.config import TcodConfig

    TcodConfig(**yaml.safe_load(blocks["yaml"][0]))
    commands = "\n".join(blocks["bash"])
    for tool in re.findall(r"examples\.tcod\.tools\.(\w+)", commands):
        assert (RECIPE / "tools" / f"{tool}.py").exists()
    for path in re.findall(r"examples/tcod/[\w./]+", commands):
        assert (hooks.ROOT / path).exists()
