"""slime's GPU CI: two rollouts each of F2B and B2F by the recipe's own run script, with small models and a few games.

Student and teacher are the same model, so what is tested is the path: checks, teacher, rollouts in ALFWorld, scores,
training, weights. Started as slime's other GPU tests are, in a checkout of slime that has examples/tcod:

    python tests/test_qwen2.5_0.5B_tcod_short.py
"""

import json
import math
import os
import shlex
import shutil
from pathlib import Path

import slime.utils.external_utils.command_utils as U

MODEL_NAME = "Qwen2.5-0.5B-Instruct"
MODEL_TYPE = "qwen2.5-0.5B"
NUM_GPUS = 4

VARIANTS = ("f2b", "b2f")
GAMES = 8  # of each split
FLAGS = ("--ci-test", "--sglang-cuda-graph-max-bs", "16")

TCOD = Path(__file__).resolve().parents[1] / "examples" / "tcod"
ALFWORLD = Path("/root/datasets/alfworld")
FEW_GAMES = Path("/root/datasets/alfworld_few")
RUNS = Path("/root/tcod_short")


def prepare():
    U.exec_command("mkdir -p /root/models /root/datasets")
    U.exec_command(f"hf download Qwen/{MODEL_NAME} --local-dir /root/models/{MODEL_NAME}")
    U.exec_command("pip install alfworld==0.4.2")
    U.exec_command(f"ALFWORLD_DATA={ALFWORLD} alfworld-download")
    for split in ("train", "valid_seen", "valid_unseen"):
        for game in sorted((ALFWORLD / "json_2.1.1" / split).glob("*/*/game.tw-pddl"))[:GAMES]:
            shutil.copytree(game.parent, FEW_GAMES / game.parent.relative_to(ALFWORLD), dirs_exist_ok=True)
    U.exec_command(
        f"cd {TCOD.parents[1]} && python3 -m examples.tcod.tools.prepare_alfworld --data-root {FEW_GAMES} "
        f"--out {FEW_GAMES}/rows --demos walkthrough"
    )


def settings(variant):
    """Variables of the run script. eta 1: the second rollout is one turn deeper than the first."""
    return {
        **{"VARIANT": variant, "RUN_DIR": f"{RUNS}/{variant}", "HORIZON": "30", "ETA": "1"},
        **{"STUDENT": f"/root/models/{MODEL_NAME}", "TEACHER_MODEL": f"/root/models/{MODEL_NAME}"},
        **{"MODEL_SCRIPT": f"{U.repo_base_dir}/scripts/models/{MODEL_TYPE}.sh", "SLIME_DIR": f"{U.repo_base_dir}"},
        **{"ALFWORLD_DATA": f"{FEW_GAMES}", "DATA_DIR": f"{FEW_GAMES}/rows"},
        **{"ACTOR_GPUS": "2", "TENSOR_PARALLEL": "1", "ROLLOUT_GPUS": "1", "TEACHER_GPUS": "3"},
        **{"NUM_ROLLOUT": "2", "BATCH": "4", "SAMPLES_PER_TASK": "2", "EVAL_INTERVAL": "2", "SAVE_INTERVAL": "2"},
        **{"MAX_TURN_LEN": "64", "MAX_CONTEXT_LEN": "8192"},
    }


def execute():
    for variant in VARIANTS:
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings(variant).items())
        U.exec_command(f"rm -rf {RUNS}/{variant}")
        U.exec_command(f"{variables} bash {TCOD}/run_qwen3_8b_tcod.sh {' '.join(FLAGS)}")
        lines = [json.loads(line) for line in (RUNS / variant / "metrics.jsonl").read_text().splitlines()]
        assert [line["kind"] for line in lines] == ["eval", "rollout", "rollout", "eval"]
        rollouts = [line for line in lines if line["kind"] == "rollout"]
        assert [line["rollout/tcod/k"] for line in rollouts] == [1, 2]
        # Before the first update student and teacher are one model, on two engines.
        assert abs(rollouts[0]["rollout/tcod/kl/token"]) < 0.05 and math.isfinite(rollouts[1]["rollout/tcod/kl/token"])


if __name__ == "__main__":
    prepare()
    for proxy_var in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        os.environ.pop(proxy_var, None)
    execute()
