"""What the tests of the run script share: its dry runs, its refusals, and the script as a process."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import yaml

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


def run(env, *arguments, script=SCRIPT):
    return subprocess.run(["bash", script, *arguments], env=env, capture_output=True, text=True, timeout=600)


def dry_run(env, *arguments, script=SCRIPT):
    """(all lines, flags of train.py)"""
    done = run({**env, "DRY_RUN": "1"}, *arguments, script=script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    python, train, *flags = shlex.split(lines[-1])
    program = "train.py" if env.get("MODE", "sync") == "sync" else "train_async.py"
    assert python == "python3" and train == f"{env['SLIME_DIR']}/{program}"
    return lines, flags


def value(flags, name):
    return flags[flags.index(name) + 1]


def own_settings(env, lines):
    """The run's own YAML in a dry run."""
    first = lines.index(f"cat >{env['RUN_DIR']}/tcod.yaml <<'END'") + 1
    return yaml.safe_load("\n".join(lines[first : lines.index("END")]))


def checkpoint(folder: Path, rollout: int) -> Path:
    """Leave what slime leaves of a checkpoint, as far as the launcher looks; returns the position in the data."""
    state = folder / f"run/checkpoints/rollout/global_dataset_state_dict_{rollout}.pt"
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text("")
    (folder / "run/checkpoints/latest_checkpointed_iteration.txt").write_text(f"{rollout}\n")
    return state


def copy_recipe(folder):
    """The script of a copy of the recipe."""
    shutil.copytree(SCRIPT.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / SCRIPT.name


def refused(done, sentence):
    assert done.returncode == 1
    [message] = done.stderr.splitlines()
    assert message.startswith(("run_qwen3_8b_tcod.sh: ", "launch: ")) and sentence in message


def heed_signals():
    """What this process may have been started to ignore, in the background or under nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Running:
    """The script as a process, with the output so far in a file."""

    def __init__(self, folder, env, heed=lambda: None, arguments=()):
        self.folder, self.output = folder, folder / "output.txt"
        # A shell in the background would hand over SIGINT ignored.
        with self.output.open("w") as output:
            self.popen = subprocess.Popen(
                ["bash", SCRIPT, *arguments],
                env={**env, "SKIP_PREFLIGHT": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: (heed_signals(), heed()),
            )

    def wait_for(self, role):
        for _ in range(300):
            if (self.folder / f"seen/{role}.json").exists():
                time.sleep(0.3)  # past the write, into what follows
                return
            time.sleep(0.1)
        raise AssertionError(self.output.read_text())

    def end(self, number=None):
        """(exit status, output) after a signal, or of itself; nothing may be left."""
        if number:
            self.popen.send_signal(number)
        status = self.popen.wait(timeout=10 if number else 60)
        assert processes_of(self.folder / "run") == []
        return status, self.output.read_text()
