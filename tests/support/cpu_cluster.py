"""A place for the run script on a CPU: real games, tiny models, real SGLang and real slime; the GPUs are names only.

cpu_cluster.py itself is the place's `python3`: the script's own programs run as they are, SGLang's server through
smoke.serve, train.py through smoke.slime_cpu.run_train.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {"train": (8, 0), "valid_seen": (2, 500_000), "valid_unseen": (2, 600_000)}  # games, first seed
CONFIG = """\
tcod_k_start: 2
tcod_eta: 1
tcod_horizon: 12
tcod_environment: .env_alfworld.AlfworldEnvironment
tcod_data_root: $ALFWORLD_DATA
tcod_admissible: never
tcod_env_workers: 2
tcod_envs_per_worker: 8
"""
# A rollout of it takes about half a minute.
SLOW = """\
import time
from tcod.env_alfworld import AlfworldEnvironment
class SlowAlfworld(AlfworldEnvironment):
    def step(self, action):
        time.sleep(0.5)
        return super().step(action)
"""


def build(place: Path, student: Path, teacher: Path) -> tuple[dict[str, str], list[str]]:
    """Make everything below `place`. Returns the script's variables, and its arguments."""
    from smoke.make_games import make_game
    from smoke.train_slime import CPU_SETTINGS, as_flags, model_settings
    from tests.support.fake_cluster import executable

    for folder in ("bin", "games"):
        (place / folder).mkdir(parents=True)
    executable(place / "bin/python3", f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    executable(place / "bin/nvidia-smi", "#!/bin/sh\nfor i in 0 1 2 3; do echo $i; done\n")
    for split, (games, seed) in SPLITS.items():
        for i in range(games):
            make_game(place / "games", split, "pick_and_place_simple", i, seed + i)
    (place / "alfworld.yaml").write_text(CONFIG)
    prepare = [sys.executable, "-m", "examples.tcod.tools.prepare_alfworld", "--config", place / "alfworld.yaml"]
    env = {**os.environ, "ALFWORLD_DATA": f"{place}/games"}
    subprocess.run([*prepare, "--out", place / "data"], check=True, capture_output=True, cwd=ROOT, env=env)
    shape = shlex.join(as_flags(model_settings(student)))
    (place / "model.sh").write_text(f"MODEL_ARGS=({shape})\n")
    folders = [ROOT, os.environ.get("PYTHONPATH", "")]
    variables = {
        **{"PATH": f"{place}/bin:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(map(str, folders))},
        **{"MODEL_SCRIPT": f"{place}/model.sh", "STUDENT": f"{student}", "TEACHER_MODEL": f"{teacher}"},
        **{"ALFWORLD_DATA": f"{place}/games", "DATA_DIR": f"{place}/data", "RUN_DIR": f"{place}/run"},
        **{"CONFIG": f"{place}/alfworld.yaml", "ROUTER_POLICY": "cache_aware"},
        **{"ACTOR_GPUS": "1", "ROLLOUT_GPUS": "1", "TEACHER_GPUS": "2"},
        **{"BATCH": "8", "LR": "5e-4", "MAX_TURN_LEN": "32", "MAX_CONTEXT_LEN": "1024", "OMP_NUM_THREADS": "1"},
        **{"NUM_ROLLOUT": "4", "SAVE_INTERVAL": "2", "EVAL_INTERVAL": "2", "RAY_USAGE_STATS_ENABLED": "0"},
    }
    flags = CPU_SETTINGS | {
        "attention-backend": "auto",
        **{"update-weight-mode": "full", "update-weight-transport": "disk"},
        "update-weight-disk-dir": place / "run/weights",
    }
    return variables, as_flags(flags)


def own_engines(place: Path) -> tuple[dict[str, str], list[str]]:
    """Variables and arguments with which slime starts the student's engines itself, and F2B's rollouts are long."""
    from smoke.train_slime import as_flags

    (place / "slow_alfworld.py").write_text(SLOW)
    config = CONFIG.replace(".env_alfworld.AlfworldEnvironment", "slow_alfworld.SlowAlfworld")
    (place / "alfworld.yaml").write_text(config.replace("k_start: 2", "k_start: 12"))
    folders = [ROOT / "smoke/slime_cpu/engine_site", place, ROOT, os.environ.get("PYTHONPATH", "")]
    flags = {"sglang-device": "cpu", "sglang-dtype": "float32", "sglang-attention-backend": "torch_native"}
    flags |= {"sglang-max-total-tokens": 65536, "sglang-sleep-on-idle": True}
    path = os.pathsep.join(map(str, folders))
    return {"PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1"}, as_flags(flags)


def assert_trained(checkpoint: Path, student: Path) -> None:
    """A checkpoint for Hugging Face has the student's parameters, and all of its matrices have changed."""
    from transformers import AutoModelForCausalLM

    trained, first = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (checkpoint, student))
    assert trained.keys() == first.keys()
    assert all((trained[name] != first[name]).any() for name in first if first[name].dim() > 1)


def main() -> None:
    match sys.argv[1:]:
        case ["-m", "sglang.launch_server", *flags]:
            command = ["-m", "smoke.serve", *flags, "--device", "cpu", "--dtype", "float32"]
            command += ["--attention-backend", "torch_native", "--max-total-tokens", "65536", "--sleep-on-idle"]
        case [program, *flags] if program.endswith(("/train.py", "/train_async.py")):
            command = ["-m", "smoke.slime_cpu.run_train", os.path.basename(program), *flags]
        case command:
            pass
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main()
