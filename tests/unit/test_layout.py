"""The house: few entries, each folder one question, and imports that go one way."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NUM_GPUS = 0
RECIPE = Path(__file__).resolve().parents[2] / "examples" / "tcod"
# What each part may import beside itself and the package's errors. Nothing imports the hooks.
MAY_IMPORT = {
    "curriculum": set(),
    "environments": set(),
    "model": set(),
    "episode": {"environments", "model", "curriculum"},
    "training": {"episode"},
    "records": {"episode"},
    "settings": {"training", "records", "episode", "environments", "model", "curriculum"},
    "tcod_rollout": {"settings", "training", "records", "episode", "curriculum"},
    "tools": {"settings", "training", "records", "episode", "environments", "model", "curriculum"},
}


def imported(file: Path) -> set[str]:
    """The parts of the package that a module imports, wherever in the module it does."""
    folders, found = file.relative_to(RECIPE).parts[:-1], set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            up = folders[: len(folders) - node.level + 1]
            path = [*up, *(node.module or "").split(".")] if node.module else list(up)
            found |= {path[0]} if path else {name.name for name in node.names if (RECIPE / name.name).exists()}
    return found


@pytest.mark.parametrize("file", sorted(RECIPE.rglob("*.py")), ids=lambda file: file.relative_to(RECIPE).as_posix())
def test_imports_go_one_way(file):
    part = file.relative_to(RECIPE).with_suffix("").parts[0]
    if part == "__init__":
        assert imported(file) == set()
    elif part == "env_alfworld":
        assert imported(file) == {"environments"}
    else:
        assert imported(file) - {part} <= MAY_IMPORT[part]


ENVIRONMENTS = [
    RECIPE / "env_alfworld.py",
    *(RECIPE / "environments" / f"{name}.py" for name in ("scienceworld", "sqlite", "textarena", "openenv")),
]


@pytest.mark.parametrize("file", ENVIRONMENTS, ids=lambda file: file.stem)
def test_an_environment_imports_the_protocol_alone(file):
    tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    own = {node.module.split(".")[-1] for node in tree if isinstance(node, ast.ImportFrom) and node.level}
    assert own - {"textworld_speedup"} == {"protocol"}


def test_the_hooks_that_the_documents_name_are_there():
    from examples.tcod import tcod_rollout

    texts = [tcod_rollout.__doc__, *(file.read_text(encoding="utf-8") for file in RECIPE.rglob("*.md"))]
    named = {name for text in texts for name in re.findall(r"\btcod\.tcod_rollout\.(\w+)", text)}
    assert named == set(tcod_rollout.__all__) and all(callable(getattr(tcod_rollout, name)) for name in named)


def test_there_are_few_entries():
    tracked = subprocess.run(["git", "ls-files", "."], cwd=RECIPE, capture_output=True, text=True).stdout.split()
    entries = {Path(name).parts[0] for name in tracked} or {
        entry.name for entry in RECIPE.iterdir() if entry.name != "__pycache__"
    }
    assert len(entries) <= 16
    assert {"README.md", "run_qwen3_8b_tcod.sh", "tcod_rollout.py", "curriculum.py", "env_alfworld.py"} <= entries


@pytest.mark.parametrize("part", [name for name in MAY_IMPORT if (RECIPE / name).is_dir()])
def test_a_folder_says_what_is_decided_there(part):
    lines = (ast.get_docstring(ast.parse((RECIPE / part / "__init__.py").read_text(encoding="utf-8"))) or "").split(
        "\n"
    )
    assert 1 <= len(lines) <= 4 and "mport" in lines[-1]


def test_the_package_and_the_loop_need_neither_slime_nor_ray_nor_transformers():
    code = (
        "import sys, examples.tcod.settings.build, examples.tcod.episode.loop\n"
        "print([name for name in ('slime', 'ray', 'transformers', 'torch') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=RECIPE.parents[1], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.fixture(scope="module")
def shared():
    return None


def test_what_shares_a_fixture_runs_in_one_process(shared, request):
    """pytest-xdist writes the group behind the test's name."""
    assert "@" in request.node.nodeid or "PYTEST_XDIST_WORKER" not in os.environ
