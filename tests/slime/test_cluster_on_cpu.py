"""The run script with all but the GPUs real: SGLang, slime's train.py, Megatron, ALFWorld; small and on a CPU.

Needs SLIME_DIR and MEGATRON_DIR. What the script does around them is tested without them in test_run_script.py.
"""

import json
import os
import re
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest
import torch

from tests.support import cpu_cluster, slime_checkout
from tests.support.fake_cluster import processes_of

if not (os.environ.get("SLIME_DIR") and os.environ.get("MEGATRON_DIR")):
    pytest.skip(
        "the run script on a CPU: run with SLIME_DIR=/path/to/slime MEGATRON_DIR=/path/to/Megatron-LM",
        allow_module_level=True,
    )

from smoke import make_models
from smoke.servers import Process, SGLangServer, free_port
from smoke.slime_cpu import compare

SCRIPT = cpu_cluster.ROOT / "examples/tcod/run_qwen3_8b_tcod.sh"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """(folder, the script's variables, its arguments), with the student's engine up."""
    place = tmp_path_factory.mktemp("cluster")
    make_models.make_student(make_models.SHIPPED, place / "student", seed=5)
    with SGLangServer("student server", place / "student", place / "student.log") as engine:
        variables, arguments = cpu_cluster.build(place, place / "student", make_models.SHIPPED)
        engine.wait_ready()
        yield place, variables, [*arguments, "--rollout-external-engine-addrs", f"127.0.0.1:{engine.port}"]


def start(cluster, log, script=SCRIPT, **variables):
    place, ours, arguments = cluster
    env = {**ours, "TEACHER_PORT": str(free_port()), "RUN_DIR": f"{place}/run", **variables}
    dumps = ["--save-debug-rollout-data", env["RUN_DIR"] + "/rollout_{rollout_id}.pt"]
    return Process("run script", ["bash", str(script), *arguments, *dumps], place / log, env)


def finish(cluster, log, script=SCRIPT, **variables):
    """A run that comes to its end."""
    with start(cluster, log, script, **variables) as process:
        assert process.popen.wait() == 0, process.log.read_text()[-3000:]
    return process


def test_a_run_that_was_killed_goes_on_where_it_was(cluster):
    """One row's demonstration is not one: its episodes are counted and never trained on."""
    data = cluster[0] / "damaged"
    shutil.copytree(cluster[0] / "data", data)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    rows[1]["metadata"]["demo"] = {"actions": ["put x in y"] * 4}  # not the row that a launch plays
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = cluster[0] / "run"
    with start(cluster, "first.log", VARIANT="b2f", DATA_DIR=str(data)) as process:
        wait_for(process, lambda: ("rollout", 2) in [(line["kind"], line["n"]) for line in lines(run_dir)])
        [driver] = driver_of(run_dir)
        os.kill(driver, signal.SIGKILL)
        assert process.popen.wait(120) == 1
    assert f"training ended with status 137: see {run_dir}/logs" in process.log.read_text()
    assert processes_of(run_dir) == []
    before = lines(run_dir)
    process = finish(cluster, "second.log", VARIANT="b2f", DATA_DIR=str(data))
    assert processes_of(run_dir) == []
    assert f"{run_dir} continues from checkpoint" in process.log.read_text()
    after = lines(run_dir)[len(before) :]
    rollouts = [line for line in before + after if line["kind"] == "rollout"]
    assert [line["n"] for line in rollouts] == [0, 1, 2, 2, 3]
    assert [line["rollout/tcod/k"] for line in rollouts] == [2, 3, 4, 4, 5]
    assert sum(line.get("rollout/tcod/failed/demo_inadmissible", 0) for line in rollouts) >= 2
    # Of the checkpoints the last is kept, of the copies for Hugging Face all.
    assert [folder.name for folder in (run_dir / "checkpoints").glob("iter_*")] == ["iter_0000003"]
    assert sorted(folder.name for folder in (run_dir / "hf").iterdir()) == ["1", "3"]
    cpu_cluster.assert_trained(run_dir / "hf/3", cluster[0] / "student")


def test_a_copy_under_another_name_trains(cluster):
    """In slime's examples, beside the original, of which nothing is imported."""
    slime, run_dir = slime_checkout.make(cluster[0] / "slime"), cluster[0] / "copy"
    copy = slime / "examples" / slime_checkout.COPY
    variables = {"SLIME_DIR": str(slime), "RUN_DIR": str(run_dir), **slime_checkout.LEAVE_TRACES}
    finish(cluster, "copy.log", copy / SCRIPT.name, VARIANT="b2f", NUM_ROLLOUT="2", EVAL_SETS="", **variables)
    [command] = run_dir.glob("logs/*/command.sh")
    named = set(re.findall(r"[\w.]+\.tcod_rollout\b", command.read_text()))
    assert named == {f"examples.{slime_checkout.COPY}.tcod_rollout"}
    assert slime_checkout.imported(copy) and not slime_checkout.imported(slime / "examples/tcod")
    assert [(line["kind"], line["n"]) for line in lines(run_dir)] == [("rollout", 0), ("rollout", 1)]
    cpu_cluster.assert_trained(run_dir / "hf/1", cluster[0] / "student")


def test_a_fully_asynchronous_run_trains_what_is_played(cluster):
    """Every episode that ends is trained, however long it was; at the end some are under way."""
    run_dir, batch = cluster[0] / "fully_async", 8
    finish(cluster, "async.log", MODE="fully_async", VARIANT="f2b", RUN_DIR=str(run_dir), NUM_ROLLOUT="6")
    rollouts = lines(run_dir)
    assert [(line["kind"], line["n"]) for line in rollouts] == [("rollout", n) for n in range(6)]
    for metric in ("stale", "aborted", "failed"):
        assert sum(line[f"rollout/tcod/{metric}"] for line in rollouts) == 0
    dumps = [torch.load(run_dir / f"rollout_{n}.pt")["samples"] for n in range(6)]
    trained = [sample["index"] for dump in dumps for sample in dump]
    assert len(set(trained)) == len(trained) == 6 * batch
    missing = set(range(max(trained))) - set(trained)
    assert len(missing) < batch and min(missing, default=max(trained)) >= max(trained) - 2 * batch, sorted(missing)
    records = [sample["metadata"]["tcod"] for dump in dumps for sample in dump]
    turns = [len(record["turns"]) for record in records]
    assert max(turns) > min(turns)
    versions = {turn["weight_version"] for record in records for turn in record["turns"]}
    assert len(versions) >= 3
    print(f"{statistics.mean(turns):.2f} turns, weight versions {sorted(versions)}, missing {sorted(missing)}")


def test_a_killed_engine_is_replaced(tmp_path):
    """slime has two engines of its own here: one is killed, the other plays on, and both get the next weights."""
    make_models.make_student(make_models.SHIPPED, tmp_path / "student", seed=5)
    variables, arguments = cpu_cluster.build(tmp_path, tmp_path / "student", make_models.SHIPPED)
    engine_variables, engine_arguments = cpu_cluster.own_engines(tmp_path)
    place, run_dir = (tmp_path, variables | engine_variables, arguments + engine_arguments), tmp_path / "run"
    # Both engines play, and each one's requests are in the log.
    gpus = {"ROLLOUT_GPUS": "2", "TEACHER_GPUS": "3", "ROUTER_POLICY": "round_robin", "RAY_DEDUP_LOGS": "0"}
    changes = {"VARIANT": "f2b", "EVAL_SETS": "", "SAVE_INTERVAL": "9", "NUM_ROLLOUT": "3"}
    with start(place, "killed.log", **gpus, **changes) as process:
        # While rollout 1 is played: slime does not see a death before it pushes weights, if it has not asked since.
        wait_for(process, lambda: train_log(run_dir).count("Resuming health monitor") >= 2)
        [first, _] = engines_of(run_dir)
        os.kill(first, signal.SIGKILL)
        assert process.popen.wait() == 0, process.log.read_text()[-3000:]
    log = train_log(run_dir)
    assert "Health check failed for rollout engine" in log and "Recovered 1 dead rollout engines" in log
    assert len(set(re.findall(r"SGLangEngine pid=(\d+)\).* \"POST /generate ", log))) == 3  # the new one plays, too
    rollouts = lines(run_dir)
    assert [line["n"] for line in rollouts] == [0, 1, 2]
    assert sum(line["rollout/tcod/failed"] for line in rollouts) == 0  # the other engine took over


def test_imitation_and_then_the_reward_alone(cluster):
    """Without an engine, from its copy for Hugging Face on, and without a teacher."""
    place, first, second = cluster[0], cluster[0] / "sft", cluster[0] / "reward"
    finish(cluster, "sft.log", VARIANT="sft", RUN_DIR=str(first), NUM_ROLLOUT="2")
    assert [(line["kind"], line["n"]) for line in lines(first)] == [("rollout", 0), ("rollout", 1)]
    assert all(0 < compare.logged_step(next(first.glob("logs/*/train.log")), step)["train/loss"] for step in (0, 1))
    cpu_cluster.assert_trained(first / "hf/1", place / "student")
    # Few tasks are won by some of their four samples and lost by others.
    (place / "patient.yaml").write_text((place / "alfworld.yaml").read_text() + "tcod_max_replacements: 60\n")
    alone = {"CONFIG": f"{place}/patient.yaml", "TEACHER": "none", "REWARD_COEF": "1", "EVAL_SETS": ""}
    alone |= {"STUDENT_LOAD": f"{first}/hf/1", "RUN_DIR": str(second), "NUM_ROLLOUT": "2"}
    finish(cluster, "reward.log", VARIANT="b2f", SAMPLES_PER_TASK="4", BATCH="2", **alone)
    rollouts = lines(second)
    assert [line["n"] for line in rollouts] == [0, 1] and not any("kl" in name for line in rollouts for name in line)
    assert all(0 < line["rollout/tcod/success"] < 1 for line in rollouts)
    cpu_cluster.assert_trained(second / "hf/1", first / "hf/1")


def train_log(run_dir: Path) -> str:
    return "".join(file.read_text(errors="replace") for file in run_dir.glob("logs/*/train.log"))


def engines_of(run_dir: Path) -> list[int]:
    """The schedulers of SGLang that slime's actors started; the teacher has one, too."""
    schedulers = [pid for pid, command in processes_of(run_dir) if command.startswith("sglang::scheduler")]
    mark = b"SGLANG_JIT_DEEPGEMM_PRECOMPILE="
    return [pid for pid in schedulers if mark in Path(f"/proc/{pid}/environ").read_bytes()]


def lines(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(process: Process, condition) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        process.check_running()
        assert time.monotonic() < deadline, process.describe("takes too long")
        time.sleep(0.2)


def driver_of(run_dir: Path) -> list[int]:
    return [pid for pid, command in processes_of(run_dir) if "\0smoke.slime_cpu.run_train\0" in command]
