"""README.md's "Adapt it", as it is printed: the class, the rows, the settings, and the commands up to a model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from examples.tcod.tools import check_environment
from examples.tcod.tools.common import command
from smoke import hooks, plays

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
    # Every process that the command starts has this PYTHONPATH.
    environments = [process / "environ" for process in Path("/proc").glob("[0-9]*")]
    assert not [path for path in environments if f"PYTHONPATH={folder}".encode() in read_bytes(path)]
    return done.stdout


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


def test_the_example_is_played_as_printed(blocks, tmp_path):
    game, make_rows = blocks["python"]
    assert len(game.splitlines()) <= 40
    (tmp_path / "examples").mkdir()
    shutil.copytree(RECIPE, tmp_path / "examples" / "tcod", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "examples" / "tcod" / "env_number.py").write_text(game)
    (tmp_path / "make_rows.py").write_text(make_rows)
    (tmp_path / "number.yaml").write_text(blocks["yaml"][0])
    for line in blocks["bash"][0].splitlines():
        said = run(tmp_path, [sys.executable, *shlex.split(line)[1:]])
    assert "train.jsonl: 8 of 48 rows play (--count 48 plays all), 8 demonstrations replay" in said
    assert "tcod_envs_per_worker: 16" in said


def test_a_smoke_run_checks_the_rows_first(tmp_path):
    row = {"prompt": "", "label": "", "metadata": {"goal": 1, "demo": {"actions": ["right"]}}}
    settings = {"tcod_variant": "b2f", "tcod_horizon": 3, "tcod_environment": "tests.support.corridor.Corridor"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    options = Namespace(
        config=tmp_path / "c.yaml",
        data=tmp_path,
        out=tmp_path / "out",
        variant=None,
        train_games=2,
        heldout_games=1,
    )

    def choose(name: str, *rows: dict) -> list[dict]:
        (tmp_path / name).write_text("\n\n".join(json.dumps(one, ensure_ascii=False) for one in rows))
        play = plays.choose(options)
        return [json.loads(line) for line in (play.data / name).read_text().splitlines()]

    odd = {**row, "prompt": "a\u2028b"}
    assert choose("train.jsonl", odd, row, row) == [odd, row]
    for name, bad, says in (
        ("train.jsonl", {**row, "metadata": {"goal": 1}}, "the first is line 3 of .*train.jsonl: it has none"),
        ("heldout.jsonl", {**row, "metadata": {}}, "line 3 of .*heldout.jsonl cannot be played"),
    ):
        with pytest.raises(SystemExit, match=f"^smoke run: .*{says}"):
            choose(name, row, bad)
        choose(name, row)


def test_help_names_this_copy_of_the_package(monkeypatch):
    monkeypatch.setattr(command, "PACKAGE", "examples.mine")
    text = command.new_parser(check_environment.__doc__).format_help()
    assert "python -m examples.mine.tools.check_environment" in text and "examples.tcod" not in text
