"""What the tests of the run script share: its commands, its dry runs, and the script as a process."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from smoke.servers import free_port
from tests.support import fake_cluster
from tests.support.fake_cluster import processes_of
from tests.support.toys import save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/tcod/run_qwen3_8b_tcod.sh"
OWN = {"RAY_ADDRESS", "CUDA_VISIBLE_DEVICES", "SLIME_DIR", "MEGATRON_DIR"}  # of whoever runs the tests


def build(folder: Path) -> dict[str, str]:
    """The script's environment, with which it runs to its end; everything is in the folder."""
    env = {key: value for key, value in os.environ.items() if key not in OWN}
    env |= fake_cluster.build(folder, save_tokenizer)
    return {**env, "TEACHER_PORT": str(free_port())}


def run(env, *arguments, script=SCRIPT, cwd=None):
    command = ["bash", script, *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=600)


def commands(place, *arguments, script=SCRIPT, **variables):
    """What the script hands to the launcher: .env, the variables, .teacher, .train and .extra, the three commands."""
    folder, env = place
    done = run({**env, **variables, "FAKE_LAUNCH": "1"}, *arguments, script=script)
    assert done.returncode == 0, done.stderr
    seen = json.loads((folder / "seen/launch.json").read_text())
    words = seen["command"][3:]  # -P -m module
    first = words.index("--")
    second = words.index("--", first + 1)
    parts = {"teacher": words[:first], "train": words[first + 1 : second], "extra": words[second + 1 :]}
    return SimpleNamespace(env=seen["env"], module=seen["command"][2], **parts)


def dry_run(env, *arguments):
    """(all lines, flags of train.py)"""
    done = run({**env, "DRY_RUN": "1"}, *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    words = shlex.split(lines[-1])
    return lines, words[words.index("python3") + 2 :]


def value(flags, name):
    return flags[flags.index(name) + 1]


def checkpoint(run_dir: Path, rollout: int) -> Path:
    """Leave what slime leaves of a checkpoint, as far as the launcher looks; returns the position in the data."""
    state = run_dir / f"checkpoints/rollout/global_dataset_state_dict_{rollout}.pt"
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text("")
    (run_dir / "checkpoints/latest_checkpointed_iteration.txt").write_text(f"{rollout}\n")
    return state


def copy_recipe(folder):
    """The script of a copy of the recipe."""
    shutil.copytree(SCRIPT.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / SCRIPT.name


def heed(hangup):
    """In a child: SIGINT as ever. The tests' own process ignores it in the background, and SIGHUP under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, hangup)


class Running:
    """The script as a process, with stand-ins for its checks, the teacher and training."""

    def __init__(self, folder, env, hangup):
        self.folder, self.output = folder, folder / f"output{time.monotonic()}.txt"
        env = {"FAKE_CHECKS": "ask the teacher", **env}
        with self.output.open("w") as output:
            options = {"env": env, "stdout": output, "stderr": output, "preexec_fn": partial(heed, hangup)}
            self.popen = subprocess.Popen(["bash", SCRIPT], **options)

    def wait_for(self, role):
        """What the stand-in was given, once it is there."""
        for _ in range(300):
            with suppress(OSError, ValueError):
                return json.loads((self.folder / f"seen/{role}.json").read_text())
            time.sleep(0.1)
        raise AssertionError(self.output.read_text())

    def end(self, number=None):
        """(exit status, output) after a signal, or of itself; nothing may be left."""
        if number:
            self.popen.send_signal(number)
        status = self.popen.wait(60)
        assert processes_of(self.folder / "run") == []
        return status, self.output.read_text()
