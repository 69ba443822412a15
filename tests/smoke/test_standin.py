"""The stand-in for slime does what slime does: one scenario (standin_scenario.py), played on it and on a checkout.

slime_624b824a8.json is what slime of that commit does; `python -c "$PROGRAM" OUT` with SLIME_DIR writes it anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slime.rollout import sglang_rollout
from smoke import hooks

PROGRAM = """
import sys
from smoke import hooks
hooks.find_slime()
from tests.support import standin_scenario
standin_scenario.main(sys.argv[1])
"""
SLIME = json.loads(Path(__file__).with_name("slime_624b824a8.json").read_text())


def play(out, env):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    env = {key: value for key, value in os.environ.items() if key != "SLIME_DIR"}
    env["PYTHONPATH"] = hooks.python_path(hooks.STANDIN)
    return play(tmp_path_factory.mktemp("scenario") / "out.json", env)


@pytest.mark.parametrize("part", SLIME)
def test_the_stand_in_does_what_slime_does(standin, part):
    assert standin[part] == SLIME[part]


def test_what_the_stand_in_leaves_out_it_refuses():
    if not hasattr(sglang_rollout, "_REFUSED"):
        pytest.skip("this is slime itself")
    with pytest.raises(NotImplementedError, match="the slime stand-in has no partial_rollout: set SLIME_DIR"):
        sglang_rollout.SingletonMeta._instances.clear()
        sglang_rollout.GenerateState(hooks.rollout_args(partial_rollout=True))


def test_slime_still_does_so(tmp_path):
    if not os.environ.get("SLIME_DIR"):
        pytest.skip("set SLIME_DIR to a checkout of slime to compare it with what is written down")
    assert play(tmp_path / "out.json", dict(os.environ)) == SLIME


def test_a_wrong_slime_dir_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIME_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no checkout of slime"):
        hooks.find_slime()
