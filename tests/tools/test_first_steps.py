"""README.md's "Run", as it is typed: up to a dry run, with a download that makes its games here."""

import os
import re
import shlex
import subprocess
import sys

from smoke import hooks
from tests.support.fake_cluster import executable
from tests.support.run_script import OWN, copy_recipe, value

NUM_GPUS = 0

# The programs of the container, and what they leave behind.
NOTHING = "#!/bin/sh\n"
PYTHON = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
DOWNLOAD = f"""#!{sys.executable}
import os, sys
sys.path.insert(0, {str(hooks.ROOT)!r})
from smoke.make_games import make_game
for seed, split in enumerate(("train", "valid_seen", "valid_unseen")):
    make_game(os.environ["ALFWORLD_DATA"], split, "pick_and_place_simple", 0, seed)
"""
PROGRAMS = {"git": NOTHING, "pip": NOTHING, "hf": NOTHING, "alfworld-download": DOWNLOAD}


def test_the_first_steps_work_as_they_are_typed(tmp_path):
    readme = (hooks.ROOT / "examples/tcod/README.md").read_text()
    [steps] = re.findall(
        r"```bash\n(.*?)```", readme.split("\n## Run it on a cluster\n")[1].split("\n## ")[0], re.DOTALL
    )
    *typed, start = steps.splitlines()
    assert start == "VARIANT=f2b bash examples/tcod/run_qwen3_8b_tcod.sh" and typed[-1].startswith("DRY_RUN=1 ")
    script = copy_recipe(tmp_path / "slime/examples/tcod")
    models = tmp_path / "slime/scripts/models"
    models.mkdir(parents=True)
    (models / "qwen3-8B.sh").write_text("MODEL_ARGS=(--num-layers 36)\n")
    (tmp_path / "bin").mkdir()
    for name, text in {**PROGRAMS, "python": PYTHON, "python3": PYTHON}.items():
        executable(tmp_path / "bin" / name, text)
    env = {name: set_to for name, set_to in os.environ.items() if name not in {*OWN, "PYTHONPATH", "ALFWORLD_DATA"}}
    env["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    text = "\n".join(typed).replace("/root/", f"{tmp_path}/")
    done = subprocess.run(["bash", "-euc", text], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.name for file in (tmp_path / "tcod_alfworld").iterdir()} >= {
        f"{name}.jsonl" for name in ("train", "valid_seen", "valid_unseen")
    }
    # The script's own defaults are the folders that were made.
    lines = done.stdout.splitlines()
    flags = shlex.split(lines[-1])
    assert script.parent.is_dir() and f"export ALFWORLD_DATA={tmp_path}/alfworld" in lines
    for folder in (value(flags, "--hf-checkpoint"), os.path.dirname(value(flags, "--prompt-data")), "/root/Qwen3-32B"):
        assert folder in steps and folder in done.stdout
