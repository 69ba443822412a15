"""A place for the run script: checkpoints, data and code that are small or fake, and executables that stand for GPUs.

fake_cluster.py itself is what the place's `python3` runs as SGLang's server and as slime's train.py. Each starts a
process in a process group of its own, as Ray and SGLang do, writes what it was given to seen/, and then does what
FAKE_TEACHER or FAKE_TRAIN says.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PYTHON3 = """#!/usr/bin/env bash
case "$*" in
  "-P -m "*".tools.launch "*) ;;
  "-P -m "*".tools.preflight "*)
    if [[ -n ${{SKIP_PREFLIGHT:-}} ]]; then printf '%s\n' "${{@:4}}" >{place}/seen/preflight_$4.txt; exit 0; fi ;;
  "-m sglang.launch_server"*) exec {python} {here} teacher {place} "$@" ;;
  */train.py*|*/train_async.py*) exec {python} {here} train {place} "$@" ;;
esac
exec {python} "$@"
"""
NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *uuid*) for i in 0 1 2 3 4 5 6 7; do echo "$i, GPU-$i$i$i$i-aaaa"; done ;;
  *) seq 0 7 ;;
esac
"""
MODEL_SCRIPT = 'MODEL_ARGS=(--num-layers 2 --normalization "RMSNorm")\n'
CONFIG = """\
tcod_variant: {variant}
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
    (place / "slime/scripts/models/qwen3-8B.sh").write_text(MODEL_SCRIPT)
    for variant in ("opd", "f2b", "b2f"):
        (place / f"{variant}.yaml").write_text(CONFIG.format(variant=variant))
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
        **{"VARIANT": "f2b", "CONFIG": f"{place}/f2b.yaml"},
    }


def processes_of(run_dir: Path) -> list[tuple[int, str]]:
    """(pid, command line) of every process that the script started for this run directory."""
    mark, found = f"TCOD_RUN_DIR={run_dir}\0".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                found.append((int(process.name), (process / "cmdline").read_text()))
        except OSError:
            pass
    return found


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def main() -> None:
    role, place, *command = sys.argv[1:]
    seen = {"command": command, "env": dict(os.environ), "folder": os.getcwd()}
    subprocess.Popen(["sleep", "600"], start_new_session=False, process_group=0)
    print(f"{role} speaks", flush=True)
    (Path(place) / "seen" / f"{role}.json").write_text(json.dumps(seen))
    (teacher if role == "teacher" else train)(command)


def train(command: list[str]) -> None:
    behaviour = os.environ.get("FAKE_TRAIN", "ends")
    if behaviour == "goes on":
        time.sleep(600)
    sys.exit(3 if behaviour == "fails" else 0)


def teacher(command: list[str]) -> None:
    behaviour = os.environ.get("FAKE_TEACHER", "serves")
    if behaviour == "dies":
        sys.exit("CUDA out of memory")
    if behaviour == "is slow":
        time.sleep(600)
    if behaviour == "ends slowly":
        signal.signal(signal.SIGTERM, lambda *_: time.sleep(3) or sys.exit())
    option = dict(zip(command, command[1:], strict=False))
    tokenizer_file = Path(option["--model-path"]) / "tokenizer.json"

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.answer({"max_req_input_len": int(option["--context-length"]) - 6})

        def do_POST(self):
            from tokenizers import Tokenizer

            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
            ids = Tokenizer.from_file(str(tokenizer_file)).encode(text).ids
            scores = [[None if i == 0 else -0.5, token, None] for i, token in enumerate(ids)]
            self.answer({"meta_info": {"input_token_logprobs": scores}})

        def answer(self, value):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

    server = ThreadingHTTPServer((option["--host"], int(option["--port"])), Handler)
    if behaviour == "ends":
        server.timeout = 0.1
        until = time.monotonic() + 4
        while time.monotonic() < until:
            server.handle_request()
        sys.exit("the teacher is gone")
    server.serve_forever()


if __name__ == "__main__":
    main()
