"""slime's GPU CI: a few rollouts of each mode by the recipe's own run script, with small models and a few games.

Student and teacher are the same model, so what is tested is the path: checks, teacher, rollouts in ALFWorld, scores,
training, weights. slime's --ci-test is not used: it wants a mean log-prob above -1, which is the model's to have.
Started as slime's other GPU tests are, in a checkout of slime that has examples/tcod:

    python tests/test_qwen2.5_0.5B_tcod_short.py
"""

import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import slime.utils.external_utils.command_utils as U

MODEL_NAME = "Qwen2.5-0.5B-Instruct"
MODEL_TYPE = "qwen2.5-0.5B"
NUM_GPUS = 4

# Variables of the run script. Four GPUs: two train, one generates, one is the teacher's; or they share.
MODES = {
    "f2b": {"VARIANT": "f2b", "ROLLOUT_GPUS": "1"},
    "b2f_fully_async": {"VARIANT": "b2f", "MODE": "fully_async", "ROLLOUT_GPUS": "1"},
    "f2b_colocated": {"VARIANT": "f2b", "COLOCATE": "1"},
    "f2b_megatron": {"VARIANT": "f2b", "TEACHER": "megatron"},
}
GAMES = 8  # of each split
FLAGS = ("--sglang-cuda-graph-max-bs", "16")
# Between the engine's and Megatron's log-probs of the same weights in bfloat16, in nats.
ENGINE_MISMATCH = 0.05

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
        f"cd {TCOD.parents[1]} && ALFWORLD_DATA={FEW_GAMES} python3 -m examples.tcod.tools.prepare_alfworld "
        f"--out {FEW_GAMES}/rows --demos walkthrough"
    )


def settings(mode):
    """Variables of the run script. eta 1: the second rollout is one turn deeper than the first."""
    return {
        **{"RUN_DIR": f"{RUNS}/{mode}", "HORIZON": "30", "ETA": "1"},
        **{"STUDENT": f"/root/models/{MODEL_NAME}", "TEACHER_MODEL": f"/root/models/{MODEL_NAME}"},
        **{"MODEL_SCRIPT": f"{U.repo_base_dir}/scripts/models/{MODEL_TYPE}.sh", "SLIME_DIR": f"{U.repo_base_dir}"},
        **{"ALFWORLD_DATA": f"{FEW_GAMES}", "DATA_DIR": f"{FEW_GAMES}/rows"},
        **{"ACTOR_GPUS": "2", "TENSOR_PARALLEL": "1", "TEACHER_GPUS": "3"},
        **{"NUM_ROLLOUT": "2", "BATCH": "4", "SAMPLES_PER_TASK": "2", "EVAL_INTERVAL": "2", "SAVE_INTERVAL": "2"},
        **{"MAX_TURN_LEN": "64", "MAX_CONTEXT_LEN": "14336"},  # 30 turns of 64 + 375
        **MODES[mode],
    }


def execute():
    for mode in MODES:
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings(mode).items())
        U.exec_command(f"rm -rf {RUNS}/{mode}")
        U.exec_command(f"{variables} bash {TCOD}/run_qwen3_8b_tcod.sh {' '.join(FLAGS)}")
        check(mode, RUNS / mode)


def check(mode, run_dir):
    """What a run must have left: metrics, a checkpoint, and weights in the engines that are those in training."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds == (["rollout"] * 2 if "async" in mode else ["eval", "rollout", "rollout", "eval"]), kinds
    rollouts = [line for line in lines if line["kind"] == "rollout"]
    assert all(math.isfinite(line["rollout/tcod/turns/total"]) for line in rollouts)
    if "async" not in mode:  # else a batch may hold several depths
        assert [line["rollout/tcod/k"] for line in rollouts] == [1, 2]
    if "megatron" not in mode:  # else the scores are not the rollout's
        # Before the first update student and teacher are one model, on two engines.
        assert abs(rollouts[0]["rollout/tcod/kl/token"]) < 0.05
        assert math.isfinite(rollouts[1]["rollout/tcod/kl/token"])
    [log] = run_dir.glob("logs/*/train.log")
    mismatch = re.findall(r"'train/train_rollout_logprob_abs_diff': ([0-9.e-]+)", log.read_text())
    assert len(mismatch) >= 2 and ("async" in mode or max(map(float, mismatch)) < ENGINE_MISMATCH), mismatch
    assert (run_dir / "checkpoints/iter_0000001").is_dir() and any((run_dir / "hf/1").glob("*.safetensors"))


if __name__ == "__main__":
    prepare()
    for proxy_var in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        os.environ.pop(proxy_var, None)
    execute()
