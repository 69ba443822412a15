"""What the smoke run makes of other machines than its own: Python, paths, proxies, torchvision, device."""

import os
import subprocess
import sys

import pytest

from smoke.hooks import ROOT
from tests.support.fake_cluster import executable

# What torchvision does when it was built for the PyTorch that is there.
TORCHVISION = """
import torch
torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_a_torchvision_that_fits_keeps_its_operators(tmp_path):
    (tmp_path / "torchvision.py").write_text(TORCHVISION)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ".")])
    done = run(
        "from smoke import cpu_only; cpu_only.prepare(); cpu_only.prepare(); import torchvision", PYTHONPATH=path
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_device_is_refused():
    done = run("from smoke import servers", SMOKE_DEVICE="gpu")
    assert (done.returncode, done.stderr) == (1, "SMOKE_DEVICE must be cpu or cuda, not gpu\n")


def bash(tmp_path, code, installed=True, venv="venv", **env):
    """Run code that sources smoke/setup.sh, where everything is installed or nothing."""
    venv = tmp_path / venv
    if installed:
        (venv / "bin").mkdir(parents=True)
        files = ["requirements.txt", "requirements-slime.txt"]
        stamp = subprocess.run(["sha256sum", *files], cwd=ROOT / "smoke", capture_output=True, text=True)
        (venv / ".installed").write_text(stamp.stdout)
    env = {"PATH": os.environ["PATH"], "TCOD_VENV": str(venv), **env}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert venv.exists() == installed, done.stdout
    return done


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_a_python_that_is_not_supported_is_refused_before_anything_is_installed(tmp_path, version):
    python = tmp_path / "a python"
    says = f"import sys; sys.version_info = {(*version, 0, 'final', 0)}; exec(sys.argv[1])"
    executable(python, f'#!/bin/sh\nexec {sys.executable} -c "{says}" "$2"\n')
    done = bash(tmp_path, "source smoke/setup.sh", installed=False, PYTHON=str(python))
    said = (
        f"no Python from 3.11 to 3.13 among {python}: install one, or name it: PYTHON=/path/to/python3.12 bash bash\n"
    )
    assert (done.returncode, done.stderr) == (1, said)


def test_a_path_that_ray_starts_no_worker_from_is_refused(tmp_path):
    done = bash(tmp_path, "source smoke/setup.sh", installed=False, venv="my venv")
    assert done.returncode == 1 and f"from {tmp_path}/my venv, whose path has a space: set TCOD_VENV=" in done.stderr


@pytest.mark.parametrize(
    "name, theirs", [("no_proxy", ""), ("NO_PROXY", "my.site,10.0.0.1"), ("no_proxy", ".my.site, 10.0.0.1,")]
)
def test_no_proxy_is_asked_for_this_machine(tmp_path, name, theirs):
    code = "source smoke/setup.sh; printenv no_proxy NO_PROXY PYTHONUTF8"
    done = bash(tmp_path, code, http_proxy="http://127.0.0.1:9", **{name: theirs})
    lower, upper, utf8 = done.stdout.splitlines()
    assert lower == upper and utf8 == "1"
    names = lower.split(",")
    assert {"localhost", "127.0.0.1", "::1", *filter(None, theirs.replace(" ", "").split(","))} <= set(names)
    assert all(names) and len(set(names)) == len(names)


def test_checkouts_are_named_in_a_file_of_which_nothing_is_executed(tmp_path):
    (tmp_path / ".config/tcod").mkdir(parents=True)
    lines = f"SLIME_DIR=/my slime\nMEGATRON_DIR=/not/this\nPATH=/nowhere\nSLIME_DIR=$(touch {tmp_path}/executed)"
    (tmp_path / ".config/tcod/tests.env").write_text(lines)
    executable(tmp_path / "say", '#!/bin/sh\necho "$SLIME_DIR, $MEGATRON_DIR, $*"\n')
    code = f"mv {tmp_path}/say $TCOD_VENV/bin/python; bash tests/run.sh -k name"
    done = bash(tmp_path, code, HOME=str(tmp_path), MEGATRON_DIR="/mine")
    assert done.stdout.startswith("/my slime, /mine, -m pytest ") and done.stdout.endswith(" -k name\n"), done.stderr
    assert not (tmp_path / "executed").exists()
