"""slime's own train.py on a CPU, against transformers and plain PyTorch: needs SLIME_DIR and MEGATRON_DIR.

Two iterations of an arm with the smoke run's models, games, engines and flags; what slime and Megatron made of the
first one is computed again from slime's own dump of the samples.
"""

import json
import os
import sys

import pytest

if not (os.environ.get("SLIME_DIR") and os.environ.get("MEGATRON_DIR")):
    pytest.skip(
        "slime's train.py: run with SLIME_DIR=/path/to/slime MEGATRON_DIR=/path/to/Megatron-LM",
        allow_module_level=True,
    )

from smoke import hooks, make_games, make_models
from smoke.servers import HERE, Process, SGLangServer
from smoke.slime_cpu import compare

NUM_GPUS = 0
LR = 5e-4


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    make_models.make_student(make_models.SHIPPED, folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("games")
    make_games.make_games(root, 16, 4)
    return root


@pytest.fixture(scope="module")
def arm(student, data, tmp_path_factory):
    """arm(name, *options) -> the run directory of two iterations."""
    logs = tmp_path_factory.mktemp("logs")
    with (
        SGLangServer("student server", student, logs / "student.log") as engine,
        SGLangServer("teacher server", make_models.SHIPPED, logs / "teacher.log") as teacher,
    ):
        engine.wait_ready()
        teacher.wait_ready()

        def run(name, *options):
            run_dir = tmp_path_factory.mktemp(name)
            command = [sys.executable, "-m", "smoke.train_slime", "--config", str(HERE / f"configs/{name}.yaml")]
            command += ["--student", str(student), "--data", str(data), "--run-dir", str(run_dir)]
            command += ["--student-port", str(engine.port), "--teacher-port", str(teacher.port)]
            command += ["--updates", "2", "--batch", "8", "--lr", str(LR), "--skip-first-evaluation", *options]
            env = {"SMOKE_GAMES": str(data), "PYTHONPATH": hooks.python_path()}
            with Process(name, command, run_dir / "train.log", env) as process:
                process.popen.wait(timeout=900)
                process.check()
            return run_dir

        yield run


def test_the_teacher_in_megatron(arm, student):
    """What slime has paused is NaN here. It pushes copies: of the student at the start, and of what it trained."""
    run_dir = arm("f2b", "--teacher", str(make_models.SHIPPED))
    differences = compare.compare(run_dir, student, LR, teacher=make_models.SHIPPED)
    assert max(differences.values()) < compare.TOLERANCE, differences
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for step in (0, 1):  # the engine has the weights that are trained
        logged = compare.logged_step(run_dir / "train.log", step)
        assert logged["train/train_rollout_logprob_abs_diff"] < 1e-4
    assert lines[0]["rollout/tcod/tokens/scored"] == 0 and "rollout/tcod/kl/trajectory" not in lines[0]


@pytest.mark.parametrize("name, ranks, loss", [("f2b", 2, "turn"), ("b2f", 1, "token")])
def test_the_first_step_is_what_plain_torch_computes(arm, student, name, ranks, loss):
    """The third loss, slime's own, is that of the test above."""
    run_dir = arm(name, "--data-parallel", str(ranks), "--loss", loss)
    differences = compare.compare(run_dir, student, LR, loss=loss)
    assert max(differences.values()) < compare.TOLERANCE, differences
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["n"]) for line in lines] == [("rollout", 0), ("rollout", 1), ("eval", 2)]
    assert lines[1]["rollout/tcod/k"] == {"f2b": 5, "b2f": 1}[name]
    assert lines[0]["train_s"] == 0 < lines[1]["train_s"] and (run_dir / "rollouts/train_000001.jsonl").exists()
    assert 0 <= lines[2]["eval/tcod/heldout/success"] <= 1 and lines[2]["eval/tcod/heldout_t1/kl/trajectory"] > 0
