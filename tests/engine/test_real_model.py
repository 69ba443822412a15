"""A real language model, SmolLM2-135M-Instruct: one update of each curriculum and an evaluation, on the real SGLang.

Opt-in, because a laptop takes minutes for it: `TCOD_REAL_MODEL=1 bash tests/run.sh tests/engine/test_real_model.py`.
"""

import json
import math
import os
import subprocess
import sys

import pytest
import yaml

from smoke import hooks
from smoke.make_games import make_games
from smoke.servers import SGLangServer
from tests.support.real_tokenizers import Unavailable, smollm2_model

NUM_GPUS = 0
pytestmark = pytest.mark.slow
SETTINGS = {
    **{"tcod_horizon": 8, "tcod_k_start": 2, "tcod_eta": 1, "tcod_admissible": "turn", "tcod_env_workers": 1},
    **{"tcod_data_root": "$SMOKE_GAMES", "tcod_eval_kl": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Games, the model, a teacher that differs a little from it, and a server of each: (folder, student, ports)."""
    if not os.environ.get("TCOD_REAL_MODEL"):
        pytest.skip("takes minutes: run with TCOD_REAL_MODEL=1")
    folder = tmp_path_factory.mktemp("real")
    try:
        student = smollm2_model(folder / "student")
        teacher = smollm2_model(folder / "teacher", noise=0.01)
    except Unavailable as error:
        pytest.skip(str(error))
    make_games(folder / "games", 2, 2)
    servers = [SGLangServer(model.name, model, folder / f"{model.name}.log", 4) for model in (student, teacher)]
    with servers[0], servers[1]:
        for server in servers:
            server.wait_ready(600)
        yield folder, student, [server.port for server in servers]


@pytest.mark.parametrize("variant", ["f2b", "b2f"])
def test_one_update_and_one_evaluation(place, variant):
    folder, student, (student_port, teacher_port) = place
    config, run_dir = folder / f"{variant}.yaml", folder / variant
    config.write_text(yaml.safe_dump({"tcod_variant": variant, **SETTINGS}))
    command = [sys.executable, "-m", "smoke.train_arm", "--config", config, "--student", student]
    command += ["--student-port", student_port, "--teacher-port", teacher_port, "--data", folder / "games"]
    command += ["--run-dir", run_dir, "--updates", 1, "--batch", 2, "--lr", 1e-5, "--skip-first-evaluation"]
    command += ["--response-len", 40, "--context-len", 2048, "--concurrency", 2]
    env = {**os.environ, "SMOKE_GAMES": str(folder / "games"), "PYTHONPATH": hooks.python_path()}
    run = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rollout = next(line for line in lines if line["kind"] == "rollout")
    evaluation = next(line for line in lines if line["kind"] == "eval")
    assert rollout["rollout/tcod/failed"] == 0 and rollout["rollout/tcod/turns/student"] >= 1
    assert (rollout["rollout/tcod/turns/replayed"] > 0) == (variant == "b2f")
    assert math.isfinite(rollout["train/loss"]) and rollout["train/grad_norm"] > 0
    # The engine and the trainer, both in float32, agree on every sampled token.
    assert rollout["train/logprob_abs_diff"] < 1e-3
    assert 0 < rollout["rollout/tcod/kl/token"] < 5
    assert evaluation["eval/tcod/heldout/episodes"] == evaluation["eval/tcod/heldout_t1/kl/episodes"] == 2
    print({name: value for name, value in rollout.items() if name.startswith(("rollout/tcod/kl/", "train/"))})
