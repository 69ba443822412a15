"""Whether the engines ever wait for the recipe: requests in flight during a rollout, by their timestamps.

Rollouts of 64 episodes at once through slime's rollout loop, with the smoke run's models on two real SGLang servers.
Every request to the student's engine and to the teacher is timed in the rollout process. Reported of each rollout:

    idle             share of its wall time without any request at the student's engine, and of it the part before the
                     first request (environments reset, demonstrations replayed), between the first and the last, and
                     after the last (the last scores)
    in flight        mean number of requests at the student's engine
    teacher exposed  time with a request at the teacher but none at the student's engine, over all time with a request
                     at the teacher: the scoring that is not hidden behind generation
"""

import argparse
import os
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import ray
import yaml

from benchmarks import report
from examples.tcod import tcod_rollout
from examples.tcod.model import teacher as tcod_teacher
from examples.tcod.model.client import SGLangClient
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.http_utils import init_http_client
from slime.utils.misc import SingletonMeta
from smoke import make_games, make_models, train_arm
from smoke.servers import HERE, SGLangServer

EPISODES = 64
Span = tuple[float, float]  # time.monotonic() of a request and of its reply
SETS = {  # name: (config, the student is the teacher itself)
    "OPD, weak student": ({"tcod_variant": "opd"}, False),
    "OPD, strong student": ({"tcod_variant": "opd"}, True),
    "F2B at k = 4": ({"tcod_variant": "f2b", "tcod_k_start": 4}, False),
    "B2F at k = 1": ({"tcod_variant": "b2f", "tcod_k_start": 1}, False),
}


class Timed(SGLangClient):
    """The recipe's client; remembers when each request was under way."""

    spans: list[Span]

    async def _attempt(self, *request: Any) -> Any:
        started = time.monotonic()
        try:
            return await super()._attempt(*request)
        finally:
            self.spans.append((started, time.monotonic()))


class Student(Timed):
    spans = []


class Teacher(Timed):
    spans = []


def union(spans: list[Span]) -> list[Span]:
    """The times at which at least one of the spans is under way, as spans that do not touch."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)


def evaluate(started: float, ended: float) -> dict[str, float]:
    """What one rollout between these times shows."""
    student, teacher = union(Student.spans), union(Teacher.spans)
    wall = ended - started
    exposed = length(union(student + teacher)) - length(student)
    return {
        "wall s": wall,
        "idle": 1 - length(student) / wall,
        "before": (student[0][0] - started) / wall,
        "between": (student[-1][1] - student[0][0] - length(student)) / wall,
        "after": (ended - student[-1][1]) / wall,
        "in flight": length(Student.spans) / wall,
        "teacher s": length(teacher),
        "teacher exposed": exposed / length(teacher),
        "exposed / wall": exposed / wall,
    }


def measure(options: Any, settings: dict[str, Any], student: SGLangServer, teacher: SGLangServer) -> dict[str, Any]:
    """Medians over the rollouts of one set, after one to warm up."""
    config = options.out / "overlap.yaml"
    arm = yaml.safe_load((HERE / "configs" / "f2b.yaml").read_text())
    # As many engines as episodes: none waits for another to end.
    config.write_text(yaml.safe_dump({**arm, **settings, "tcod_engines_per_worker": EPISODES // 2}))
    flags = ["--config", config, "--student", make_models.SHIPPED, "--data", options.out, "--run-dir", options.out]
    flags += ["--student-port", student.port, "--teacher-port", teacher.port]
    flags += ["--batch", EPISODES, "--concurrency", EPISODES]
    args = train_arm.slime_args(train_arm.option_parser().parse_args([str(flag) for flag in flags]))
    SingletonMeta._instances.clear()
    init_http_client(args)
    source = RolloutDataSourceWithBuffer(args)
    results, turns = [], []
    for _ in range(1 + options.rollouts):
        Student.spans.clear()
        Teacher.spans.clear()
        started = time.monotonic()
        output = tcod_rollout.generate_rollout(args, 0, source)  # always at the first depth
        results.append(evaluate(started, time.monotonic()))
        turns += [len(sample.metadata["tcod"]["turns"]) for group in output.samples for sample in group]
    medians = {key: median(result[key] for result in results[1:]) for key in results[0]}
    return {"turns": sum(turns) / len(turns), **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests in flight during a rollout.")
    parser.add_argument("--rollouts", type=int, default=3, help="timed rollouts per set")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "overlap", help="games, models and logs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["SMOKE_GAMES"] = str(options.out)
    make_games.make_games(options.out, EPISODES, 1)
    weak = options.out / "student"
    if not (weak / "model.safetensors").exists():
        make_models.make_student(make_models.SHIPPED, weak, seed=1)
    tcod_rollout.SGLangClient, tcod_teacher.SGLangClient = Student, Teacher
    rows = []
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="warning", log_to_driver=False)
    with ExitStack() as stack:
        student = stack.enter_context(SGLangServer("student server", weak, options.out / "student.log"))
        teacher = stack.enter_context(SGLangServer("teacher server", make_models.SHIPPED, options.out / "teacher.log"))
        student.wait_ready()
        teacher.wait_ready()
        for name, (settings, strong) in SETS.items():
            train_arm.push_weights(student.port, make_models.SHIPPED if strong else weak, version=name)
            rows.append({"rollouts": name, **measure(options, settings, student, teacher)})
    print(report.table(rows))
    print(f"written to {report.write('overlap', rows, episodes=EPISODES)}")


if __name__ == "__main__":
    main()
