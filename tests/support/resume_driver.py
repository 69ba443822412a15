"""A training run without training, for test_resume.py: rollouts, with a checkpoint of the data source after each."""

import json
import sys
from pathlib import Path
from typing import Any

from examples.tcod import tcod_rollout
from examples.tcod.settings import build
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from tests.support.rig import slime_args
from tests.support.toys import LocalPool

TASKS, BATCH, ROLLOUTS = 10, 4, 6  # six batches of four: two epochs, shuffled anew, and a bit


def main(checkpoint: str, folder: str, student_port: int, teacher_port: int, first: int, **settings: Any) -> None:
    """Play from rollout `first` on; one JSON line for each finished one goes to rollouts.jsonl, errors to errors."""
    sys.stderr = (Path(folder) / "errors").open("a", buffering=1)
    build.EnvironmentPool = LocalPool
    run = {"rollout_batch_size": BATCH, "rollout_shuffle": True, "save": folder, "load": folder}
    run |= {"tcod_variant": "f2b", "tcod_horizon": 4, "tcod_eta": 2, "tcod_admissible": "never"}
    run |= {"tcod_environment": "tests.support.toys.Corridor", "tcod_data_root": folder, **settings}
    args = slime_args(checkpoint, f"{folder}/rows.jsonl", student_port, teacher_port, **run)
    source = RolloutDataSourceWithBuffer(args)
    source.load(first - 1)
    for n in range(first, ROLLOUTS):
        output = tcod_rollout.generate_rollout(args, n, source)
        tasks = [sample.metadata["goal"] for group in output.samples for sample in group]
        record = {"n": n, "k": output.metrics["rollout/tcod/k"], "tasks": tasks}
        source.save(n)
        with (Path(folder) / "rollouts.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
