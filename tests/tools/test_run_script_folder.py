"""The run script in a folder of another name, in slime's examples/ and elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.run_script import ROOT, SCRIPT, commands, copy_recipe, run, value

NUM_GPUS = 0

HOOKS = {
    "--rollout-function-path": "generate_rollout",
    "--custom-generate-function-path": "generate",
    "--custom-rm-path": "reward_func",
    "--custom-reward-post-process-path": "post_process_rewards",
    "--dynamic-sampling-filter-path": "drop_failed",
}


@pytest.fixture
def examples(place):
    """examples/ of slime, a package as Megatron-LM's."""
    folder, _ = place
    for checkout in ("megatron", "slime"):
        (folder / checkout / "examples").mkdir()
        (folder / checkout / "examples/__init__.py").write_text("")
    return folder / "slime/examples"


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
    copy_recipe(examples / "another")
    root, env = place
    asked = commands(place, script=copy_recipe(root / folder))
    hooks = {flag: f"{package}.tcod_rollout.{hook}" for flag, hook in HOOKS.items()}
    assert asked.module == f"{package}.tools.launch" and {flag: value(asked.train, flag) for flag in HOOKS} == hooks
    ours = [f"{root}/slime", f"{root}/megatron"]
    ours += [] if folder.startswith("slime") else [str((root / folder).parent)]
    assert asked.env["PYTHONPATH"].split(":") == ours + env["PYTHONPATH"].split(":")
    # The package is found under that name, in that folder, and as slime's workers look for it.
    code = f"import {package} as ours; print(ours.__file__)"
    path = {"PYTHONPATH": asked.env["PYTHONPATH"]}
    found = subprocess.run([sys.executable, "-Pc", code], env=path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"{root}/{folder}/__init__.py"


def test_a_folder_that_is_linked_into_slime_is_in_slime(place, examples):
    copy_recipe(place[0] / "mine/tcod")
    (examples / "my_agent").symlink_to(place[0] / "mine/tcod")
    asked = commands(place, script=examples / "my_agent" / SCRIPT.name)
    assert value(asked.train, "--custom-rm-path") == "examples.my_agent.tcod_rollout.reward_func"


def test_a_folder_whose_name_is_no_identifier_is_refused(place, examples):
    done = run(place[1], script=copy_recipe(examples / "my-agent"))
    assert done.returncode == 1 and "examples/my-agent is a Python package: rename it, to my_agent for" in done.stderr


def test_a_copy_under_another_name_runs(place, examples):
    """With all checks, and from inside its folder, whose module names must not hide anybody's."""
    folder, env = place
    copy_recipe(examples / "tcod")  # which the test's environment imports
    script = copy_recipe(examples / "my_agent")
    # An environment belongs to the copy that it is played by.
    corridor = (ROOT / "tests/support/corridor.py").read_text()
    (script.parent / "corridor.py").write_text(corridor.replace("examples.tcod.", "examples.my_agent."))
    config = Path(env["CONFIG"])
    config.write_text(config.read_text().replace("tests.support.corridor.", ".corridor."))
    env |= {"TEACHER": "megatron"}  # no server
    done = subprocess.run(["bash", script], env=env, cwd=script.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads((folder / "seen/train.json").read_text())["folder"] == f"{folder}/slime"
