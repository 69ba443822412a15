"""The driver killed with -9, between rollouts and in the middle of one: the resumed run is the uninterrupted one."""

import json
import multiprocessing
import os
import signal
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import resume_driver
from tests.support.fake_sglang import hold, scored

NUM_GPUS = 0


@dataclass(frozen=True)
class Kill:
    fault: str
    then: str
    rollout: int
    played: int  # episodes of this rollout that go on before the kill


KILLS = [
    Kill(
        "kill -9 during a rollout",
        "the rollout is played again: the same depth, the same tasks, none skipped, none repeated",
        rollout=3,
        played=2,
    ),
    Kill(
        "kill -9 between two rollouts",
        "the run goes on with the next rollout, as if nothing had happened",
        rollout=4,
        played=0,
    ),
]


@pytest.fixture
def driver(rig, tmp_path):
    """driver(first) -> the process of a run from that rollout on."""
    rows = [{"prompt": "walk", "label": "walk", "metadata": {"goal": 5 + i}} for i in range(resume_driver.TASKS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import is imported once; conftest finds slime.
    context.set_forkserver_preload(["tests.conftest", "tests.support.resume_driver"])
    processes = []

    def start(first: int, **settings: Any) -> multiprocessing.Process:
        ports = {"student_port": rig.student.port, "teacher_port": rig.teacher.port}
        given = {"checkpoint": str(rig.checkpoint), "folder": str(tmp_path), "first": first, **ports, **settings}
        processes.append(context.Process(target=resume_driver.main, kwargs=given))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def score_by_task(payload: dict) -> dict:
    """Teacher scores that depend on the task alone, so that every rollout has another KL."""
    noise = zlib.crc32(str(payload["input_ids"][:64]).encode()) / 2**32
    return scored(payload, lambda position, token: -0.5 - noise)


def test_a_killed_run_resumes_where_it_was(rig, driver, tmp_path):
    rig.teacher_reply = score_by_task
    kills, victims = list(KILLS), []

    async def reply(payload: dict) -> dict:
        """Hold the next rollout to be killed after its first episodes, and kill its process."""
        file = tmp_path / "rollouts.jsonl"
        done = len(file.read_text().splitlines()) if file.exists() else 0
        if kills and done == kills[0].rollout:
            kills[0] = Kill(kills[0].fault, kills[0].then, kills[0].rollout, kills[0].played - 1)
            if kills[0].played < 0:
                os.kill(victims[-1].pid, signal.SIGKILL)
                await hold()
        return rig.student_reply(payload)

    rig.student.reply = reply
    first = 0
    while True:
        victims.append(driver(first))
        victims[-1].join(timeout=120)
        if victims[-1].exitcode == 0:
            break
        assert victims[-1].exitcode == -signal.SIGKILL
        kills.pop(0)
        first = len(records(tmp_path))
    assert len(victims) == 1 + len(KILLS)

    (tmp_path / "rollouts.jsonl").rename(tmp_path / "resumed.jsonl")
    uninterrupted = driver(0)
    uninterrupted.join(timeout=120)
    assert uninterrupted.exitcode == 0
    resumed = [json.loads(line) for line in (tmp_path / "resumed.jsonl").read_text().splitlines()]
    assert resumed == records(tmp_path)
    assert [record["k"] for record in resumed] == [1, 1, 2, 2, 3, 3]
    drawn = [task for record in resumed for task in record["tasks"]]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(5, 15))


def test_a_run_that_cannot_go_on_ends_with_an_error(rig, driver, tmp_path):
    rig.teacher_reply = lambda payload: {"error": "?"}
    process = driver(0)
    process.join(timeout=120)
    assert process.exitcode == 1
    lines = (tmp_path / "errors").read_text().splitlines()
    stops = [line for line in lines if line.startswith("RuntimeError: rollout 0 stops: ")]
    assert stops and "'teacher_invalid': " in stops[-1]
