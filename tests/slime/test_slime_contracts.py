"""slime's own tests of plugins, on the recipe's hooks, and slime's loader on every hook path: needs SLIME_DIR.

Of slime's contracts one does not apply: its reward post-processing contract passes samples without log-probs, which
post_process_rewards is there to refuse. Buffer, data source and sample filter hooks are not used by the recipe.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from smoke import hooks

if not os.environ.get("SLIME_DIR"):
    pytest.skip("slime's plugin contracts: run with SLIME_DIR=/path/to/slime", allow_module_level=True)

from slime.utils.misc import load_function

NUM_GPUS = 0
CONTRACTS = Path(os.environ["SLIME_DIR"]) / "tests" / "plugin_contracts"
# slime puts stubs where ray and transformers are not imported yet, and its checkout first on the import path.
RUN = """
import runpy, sys
from smoke import hooks
hooks.find_slime()
import ray, transformers, examples.tcod.tcod_rollout
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "contract, hooks_of_it",
    [
        ("generate", {"custom-generate-function-path": "tests.support.slime_contract_hooks.generate"}),
        ("rollout", {"rollout-function-path": "tests.support.slime_contract_hooks.generate_rollout"}),
        (
            "path_loading",
            {
                "eval-function-path": "tests.support.slime_contract_hooks.generate_rollout",
                "custom-rm-path": "tests.support.slime_contract_hooks.reward_func",
                "dynamic-sampling-filter-path": "examples.tcod.tcod_rollout.drop_failed",
            },
        ),
    ],
)
def test_slimes_plugin_contracts_hold(contract, hooks_of_it):
    file = CONTRACTS / f"test_plugin_{contract}_contracts.py"
    flags = [part for name, path in hooks_of_it.items() for part in (f"--{name}", path)]
    env = {**os.environ, "PYTHONPATH": hooks.python_path()}
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN,
            str(file),
            *flags,
            "-p",
            "no:cacheprovider",
        ],
        env=env,
        cwd=CONTRACTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert re.search(r"\d+ passed", run.stdout) and "failed" not in run.stdout


def hook_paths():
    """(where, path) of everything in scripts and YAMLs that slime or the recipe loads by its path."""
    script = (hooks.ROOT / "examples/tcod/run_qwen3_8b_tcod.sh").read_text()
    yield from (("run script", path) for path in re.findall(r"\bexamples\.tcod\.\w+\.\w+", script))
    yield from ((name, path) for name, path in hooks.RECIPE_FLAGS.items() if name.endswith("_path"))
    for file in [*hooks.ROOT.glob("examples/tcod/configs/*.yaml"), *hooks.ROOT.glob("smoke/configs/*.yaml")]:
        settings = yaml.safe_load(file.read_text())
        if "tcod_environment" in settings:
            yield file.name, re.sub(r"^\.", "examples.tcod.", settings["tcod_environment"])


@pytest.mark.parametrize("where, path", sorted(set(hook_paths())))
def test_slime_loads_every_hook(where, path):
    assert callable(load_function(path))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """slime's settings, with the recipe and its tests where slime has examples and tests."""
    root = tmp_path_factory.mktemp("slime")
    shutil.copy(Path(os.environ["SLIME_DIR"]) / "pyproject.toml", root)
    shutil.copytree(hooks.ROOT / "examples/tcod", root / "examples/tcod", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(os.environ["SLIME_DIR"]) / "examples/__init__.py", root / "examples")
    (root / "tests").mkdir()
    for test in ("test_tcod_curriculum.py", "test_qwen2.5_0.5B_tcod_short.py"):
        shutil.copy(hooks.ROOT / "tests" / test, root / "tests")
    return root


@pytest.mark.parametrize(
    "tool, options",
    [
        ("pytest", ["tests/test_tcod_curriculum.py", "-p", "no:cacheprovider"]),
        ("black", ["--check", "."]),
        ("isort", ["--check", "--profile=black", "."]),
        ("ruff", ["check", "--no-cache", "."]),
    ],
)
def test_the_recipe_keeps_slimes_own_rules(tree, tool, options):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-m", tool, *options], cwd=tree, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
