"""A place for the run script: checkpoints, data and code that are small or fake, and executables that stand for GPUs.

fake_cluster.py itself is what the place's `python3` runs as SGLang's server, as slime's train.py, as preflight.py
where FAKE_CHECKS is set, and as the launcher where FAKE_LAUNCH is. It writes its part to seen/. The first three
start a process in a process group of its own, as Ray and SGLang do, and wait or fail if FAKE_TEACHER, .. says so.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.request import urlopen

PYTHON3 = """#!/bin/sh
case "$*" in
  *" -m "*".tools.launch "*) role=${{FAKE_LAUNCH:+launch}} ;;
  *" -m "*".tools.launch.preflight "*) role=${{FAKE_CHECKS:+checks}} ;;
  "-m sglang.launch_server"*) role=teacher ;;
  */train.py*|*/train_async.py*) role=train ;;
esac
exec {python} ${{role:+{here} $role {place}}} "$@"
"""
NVIDIA_SMI = "#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo $i; done\n"
CONFIG = """\
tcod_k_start: 1
tcod_eta: 6
tcod_horizon: 4
tcod_environment: tests.support.corridor.Corridor
tcod_data_root: $ALFWORLD_DATA
"""
ROW = {"prompt": "door 2", "label": "door", "metadata": {"goal": 2, "demo": {"actions": ["right", "right"]}}}


def build(place: Path, save_tokenizer) -> dict[str, str]:
    """Make everything below `place`; returns the script's variables, with which it runs to its end."""
    for folder in ("bin", "seen", "slime/scripts/models", "megatron/megatron", "games", "data"):
        (place / folder).mkdir(parents=True)
    executable(place / "bin/python3", PYTHON3.format(python=sys.executable, here=__file__, place=place))
    executable(place / "bin/nvidia-smi", NVIDIA_SMI)
    (place / "slime/train.py").write_text("")
    (place / "slime/scripts/models/qwen3-8B.sh").write_text('MODEL_ARGS=(--num-layers 2 --normalization "RMSNorm")\n')
    (place / "alfworld.yaml").write_text(CONFIG)
    for split in ("train", "valid_seen", "valid_unseen"):
        (place / f"data/{split}.jsonl").write_text(json.dumps(ROW) + "\n")
    for model in ("student", "teacher"):
        save_tokenizer(place / model)
        (place / model / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
        (place / model / "model.safetensors").write_text("")
    return {
        **{"PATH": f"{place}/bin:{os.environ['PATH']}", "SLIME_DIR": f"{place}/slime"},
        **{"MEGATRON_DIR": f"{place}/megatron", "STUDENT": f"{place}/student", "TEACHER_MODEL": f"{place}/teacher"},
        **{"ALFWORLD_DATA": f"{place}/games", "DATA_DIR": f"{place}/data", "RUN_DIR": f"{place}/run"},
        **{"VARIANT": "f2b", "CONFIG": f"{place}/alfworld.yaml"},
    }


def processes_of(run_dir: Path) -> list[tuple[int, str]]:
    """(pid, command line) of every process that the script started for this run directory."""
    mark, found = f"TCOD_RUN_DIR={run_dir}\0".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_bytes():
                found.append((int(process.name), (process / "cmdline").read_text()))
    return found


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def main() -> None:
    role, place, *command = sys.argv[1:]
    seen = {"command": command, "env": dict(os.environ), "folder": os.getcwd(), "pid": os.getpid()}
    (Path(place) / f"seen/{role}.json").write_text(json.dumps(seen))
    if role == "launch":
        return
    subprocess.Popen(["sleep", "600"], process_group=0)
    print(f"{role} speaks", os.environ.get("FAKE_LINE", "") if role == "train" else "", flush=True)
    does = os.environ.get(f"FAKE_{role.upper()}")
    if does == "fail":
        sys.exit("CUDA out of memory")
    if does == "wait":
        signal.signal(signal.SIGTERM, lambda *_: end_slowly(Path(place) / "seen/asked.json"))
        time.sleep(600)
    if role == "teacher":
        option = dict(zip(command, command[1:], strict=False))
        HTTPServer((option["--host"], int(option["--port"])), Healthy).serve_forever()
    if role == "checks":
        Path(command[-2]).write_text("10.0.0.7\n10.0.0.8")
        while does == "ask the teacher":
            with suppress(OSError):
                return urlopen(f"{os.environ['TEACHER_ADDRESS']}/health_generate")
            time.sleep(0.1)


def end_slowly(asked: Path) -> None:
    asked.write_text("{}")
    time.sleep(1)
    sys.exit()


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()


if __name__ == "__main__":
    main()
