"""slime's own tests of plugins, on the recipe's hooks, and slime's loader on every hook path: needs SLIME_DIR.

Of slime's contracts one does not apply: its reward post-processing contract passes samples without log-probs, which
post_process_rewards is there to refuse. Buffer, data source and sample filter hooks are not used by the recipe.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from smoke import hooks
from tests.support import slime_checkout

if not os.environ.get("SLIME_DIR"):
    pytest.skip("slime's plugin contracts: run with SLIME_DIR=/path/to/slime", allow_module_level=True)

from slime.utils.misc import load_function


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return slime_checkout.make(tmp_path_factory.mktemp("checkout") / "slime")


# slime's contracts can be given paths, no settings, and call with bare arguments: what then cannot pass, and why.
HOOKS = f"examples.{slime_checkout.COPY}.tcod_rollout"
NO_ARGS = ["TypeError: vars() argument must have __dict__"]
CONTRACTS = [
    (
        "generate",
        {"custom-generate-function": f"{HOOKS}.generate"},
        3,
        ["ConfigError: --rollout-function-path must be"],
    ),
    ("rollout", {"rollout-function": f"{HOOKS}.generate_rollout"}, 5, NO_ARGS),
    ("rollout", {"rollout-function": f"{HOOKS}.generate_rollout_fully_async"}, 5, NO_ARGS),
    # Its sample was not drawn by the recipe, and not played.
    (
        "path_loading",
        {"dynamic-sampling-filter": f"{HOOKS}.drop_failed", "custom-rm": f"{HOOKS}.reward_func"},
        15,
        ["KeyError: 'tcod'"],
    ),
]


@pytest.mark.parametrize("contract, hooks_of_it, passed, errors", CONTRACTS)
def test_slimes_documented_call_takes_the_hooks_of_a_copy(checkout, contract, hooks_of_it, passed, errors):
    flags = [word for flag, hook in hooks_of_it.items() for word in (f"--{flag}-path", hook)]
    run = subprocess.run(
        [sys.executable, f"tests/plugin_contracts/test_plugin_{contract}_contracts.py", *flags, "--tb=line"],
        env={**os.environ, **slime_checkout.LEAVE_TRACES, "PYTHONPATH": ""},
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    raised = re.findall(r"^/\S+:\d+: (.*)", run.stdout, re.M)
    assert len(raised) == len(errors), run.stdout[-3000:] + run.stderr[-1000:]
    assert all(error in text for error, text in zip(errors, raised, strict=True)), raised
    assert f"{len(errors)} failed, {passed} passed" in run.stdout
    assert slime_checkout.imported(checkout / "examples" / slime_checkout.COPY)
    assert not slime_checkout.imported(checkout / "examples/tcod")


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


OURS = ["examples/tcod", "tests/test_tcod_curriculum.py", "tests/test_qwen2.5_0.5B_tcod_short.py"]


@pytest.mark.parametrize(
    "tool, options",
    [
        ("pytest", [OURS[1], "-p", "no:cacheprovider"]),
        ("black", ["--check", *OURS]),
        ("isort", ["--check", "--profile=black", *OURS]),
        ("ruff", ["check", "--no-cache", *OURS]),
    ],
)
def test_the_recipe_keeps_slimes_own_rules(checkout, tool, options):
    for test in OURS[1:]:
        shutil.copy(hooks.ROOT / test, checkout / test)
    env = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-m", tool, *options], cwd=checkout, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
