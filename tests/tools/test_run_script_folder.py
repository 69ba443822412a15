"""The run script in a folder of another name, in slime's examples/ and elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.run_script import ROOT, SCRIPT, copy_recipe, dry_run, refused, run, value

NUM_GPUS = 0

HOOKS = {
    "--rollout-function-path": "tcod_rollout.generate_rollout",
    "--custom-generate-function-path": "tcod_rollout.generate",
    "--custom-rm-path": "tcod_rollout.reward_func",
    "--custom-reward-post-process-path": "tcod_rollout.post_process_rewards",
    "--dynamic-sampling-filter-path": "tcod_rollout.drop_failed",
    "--custom-rollout-log-function-path": "tcod_rollout.log_rollout",
    "--custom-eval-rollout-log-function-path": "tcod_rollout.log_eval",
}


@pytest.fixture
def examples(place):
    """examples/ of slime, a package as Megatron-LM's."""
    folder, _ = place
    for checkout in ("megatron", "slime"):
        (folder / checkout / "examples").mkdir()
        (folder / checkout / "examples/__init__.py").write_text("")
    return folder / "slime/examples"


def python_path(lines):
    [line] = [line for line in lines if line.startswith("export PYTHONPATH=")]
    return line.removeprefix("export PYTHONPATH=").split(":")


@pytest.mark.parametrize(
    "folder, package",
    [
        ("slime/examples/tcod", "examples.tcod"),
        ("slime/examples/my_agent", "examples.my_agent"),
        ("mine/my_agent", "my_agent"),
        ("mine/examples/tcod", "tcod"),
    ],
)
def test_the_hooks_are_those_of_the_folder_that_the_script_lies_in(place, examples, folder, package):
    place, env = place
    copy_recipe(examples / "another")
    lines, flags = dry_run(env, script=copy_recipe(place / folder))
    assert {flag: value(flags, flag) for flag in HOOKS} == {flag: f"{package}.{hook}" for flag, hook in HOOKS.items()}
    ours = [f"{place}/slime", f"{place}/megatron"]
    ours += [] if folder.startswith("slime") else [str((place / folder).parent)]
    path = python_path(lines)
    assert path == ours + env["PYTHONPATH"].split(":")
    # The package is found under that name, in that folder, and as slime's workers look for it.
    code = f"import {package} as ours; print(ours.__file__)"
    found = subprocess.run(
        [sys.executable, "-Pc", code], env={"PYTHONPATH": ":".join(path)}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == f"{place}/{folder}/__init__.py"


def test_a_folder_that_is_linked_into_slime_is_in_slime(place, examples):
    folder, env = place
    copy_recipe(folder / "mine/tcod")
    (examples / "my_agent").symlink_to(folder / "mine/tcod")
    _, flags = dry_run(env, script=examples / "my_agent" / SCRIPT.name)
    assert value(flags, "--custom-rm-path") == "examples.my_agent.tcod_rollout.reward_func"


def test_a_folder_whose_name_is_no_identifier_is_refused(place, examples):
    _, env = place
    done = run(env, script=copy_recipe(examples / "my-agent"))
    refused(done, "examples/my-agent is a Python package: rename it, to my_agent for example")


def test_a_copy_under_another_name_runs(place, examples):
    """From inside its folder, too, whose module names must not hide anybody's."""
    folder, env = place
    copy_recipe(examples / "tcod")  # which the test's environment imports
    script = copy_recipe(examples / "my_agent")
    # An environment belongs to the copy that it is played by.
    corridor = (ROOT / "tests/support/corridor.py").read_text()
    (script.parent / "corridor.py").write_text(corridor.replace("examples.tcod.", "examples.my_agent."))
    config = Path(env["CONFIG"])
    config.write_text(config.read_text().replace("tests.support.corridor.", ".corridor."))
    done = subprocess.run(["bash", script], env=env, cwd=script.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads((folder / "seen/train.json").read_text())["folder"] == f"{folder}/slime"


def test_what_stands_for_the_clusters_programs_needs_nothing_of_the_recipe(tmp_path):
    """It is started with slime first on its path, whose package `examples` is not the recipe's."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/__init__.py").write_text("")
    code = "import smoke.serve, smoke.slime_cpu.run_train, tests.support.cpu_cluster"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "SMOKE_DEVICE": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, check=True, timeout=300)
