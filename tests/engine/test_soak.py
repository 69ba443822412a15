"""Episodes with every fault mixed in, in Ray's worker processes: none is lost, played twice, miscounted or kept.

`TCOD_SOAK=2000 bash tests/run.sh -m slow tests/engine/test_soak.py` is the long form.
"""

import gc
import math
import os
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from examples.tcod import tcod_rollout
from examples.tcod.episode.episode import Episode
from examples.tcod.model import client as sglang_client
from slime.utils.types import Sample
from smoke import hooks
from tests.support.corridor import alive
from tests.support.fake_sglang import Broken, generated, hold, scored
from tests.support.rig import RecordingSource, Rig, check_invariants, teacher_value

NUM_GPUS = 0
EPISODES = int(os.environ.get("TCOD_SOAK", 100))
BATCH, WORKERS, ENGINES = 32, 2, 4
APART = 6  # every sixth task has a fault

# fault -> the reason for which its task fails; None: the task is trained on. The first ones are corridor.py's hazards.
REASONS = {
    **{"killed at reset": "env_worker_died", "killed at step": "env_worker_died", "hangs": "env_timeout"},
    **{"raises": "env_error", "long at reset": "prompt_too_long", "long at step": None, "control tokens": None},
    **{"teacher resets": "teacher_unavailable", "teacher resets once": None},
    **{"teacher refuses": "teacher_refused", "teacher says NaN": "teacher_invalid"},
    **{"engine resets once": None, "engine aborts": "engine_aborted", "engine says nothing": "nothing_sampled"},
    **{"engine says inf": "engine_invalid", "engine hangs": "engine_timeout"},
}
COLLATERAL = "env_worker_died"  # a worker that dies takes the episodes on its other engines with it


def fault_of(task: int) -> str:
    return list(REASONS)[task // APART % len(REASONS)] if task % APART == 0 else ""


class FaultyServers:
    """The replies of a rig's two servers, as the task's fault wants them."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.seen = rig, set[int]()
        rig.teacher_reply, rig.student.reply = self.teacher_reply, self.engine_reply

    def fault(self, payload: dict, whom: str) -> str:
        """What this server does to the task that a request is about; what happens once is told once."""
        task = int(re.search(r"Task (\d+)\.", self.rig.tokenizer.decode(payload["input_ids"]))[1])
        fault = fault_of(task)
        if not fault.startswith(whom) or task in self.seen:
            return ""
        if fault.endswith(" once"):
            self.seen.add(task)
        return fault

    def teacher_reply(self, payload: dict) -> Any:
        reply = scored(payload, teacher_value)
        match self.fault(payload, "teacher"):
            case "teacher resets" | "teacher resets once":
                return Broken(reply)
            case "teacher refuses":
                return web.Response(status=400)
            case "teacher says NaN":
                reply["meta_info"]["input_token_logprobs"][-1][0] = math.nan
        return reply

    def engine_reply(self, payload: dict) -> Any:
        reply = self.rig.student_reply(payload)
        match self.fault(payload, "engine"):
            case "engine resets once":
                return Broken(reply)
            case "engine hangs":
                return hold()
            case "engine aborts":
                return generated([], [], finish="abort")
            case "engine says nothing":
                return generated([], [])
            case "engine says inf":
                return generated([5], [-math.inf])
        return reply


def outcome(sample: Sample) -> str:
    if sample.status == Sample.Status.FAILED:
        return Episode.of(sample).record.failure
    return "aborted" if sample.status == Sample.Status.ABORTED else "trained"


def used() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory_mb = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return {"memory_mb": memory_mb, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


def enter(outcomes: dict[int, str], drawn: list[Sample], metrics: dict[str, float]) -> None:
    """Book what became of the drawn samples; the rollout's metrics must say the same."""
    counts: Counter[str] = Counter()
    for sample in drawn:
        task = int(sample.metadata["name"].removeprefix("Task ").rstrip("."))
        assert task not in outcomes, f"task {task} was drawn twice"
        outcomes[task] = outcome(sample)
        counts[outcomes[task]] += 1
    assert counts.pop("trained") == BATCH
    assert metrics["rollout/tcod/aborted"] == counts.pop("aborted", 0)
    assert metrics["rollout/tcod/failed"] == sum(counts.values())
    assert all(metrics[f"rollout/tcod/failed/{reason}"] == count for reason, count in counts.items())


def check_outcomes(outcomes: dict[int, str]) -> None:
    """Every task came to what it had to; but a dying worker may have taken it along."""
    assert sorted(outcomes) == list(range(len(outcomes))), "a task was skipped"
    expected = {task: REASONS.get(fault_of(task)) or "trained" for task in outcomes}
    others = {task: said for task, said in outcomes.items() if said != expected[task]}
    assert set(others.values()) <= {COLLATERAL}
    deaths = sum(fault_of(task) in ("killed at reset", "killed at step", "hangs") for task in outcomes)
    assert len(others) <= deaths * (ENGINES - 1)


@pytest.mark.slow
def test_no_episode_is_lost_or_counted_twice(rig, real_ray, monkeypatch):
    monkeypatch.setattr(sglang_client, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(sglang_client, "RETRIES", 2)
    FaultyServers(rig)
    tasks = range(EPISODES + 2 * BATCH)  # the last rollout's, and its replacements
    args = rig.args(
        [{"goal": 2 + task % 3, "name": f"Task {task}.", "hazard": fault_of(task)} for task in tasks],
        rollout_batch_size=BATCH,
        tcod_environment="tests.support.corridor.HazardousCorridor",
        tcod_env_workers=WORKERS,
        tcod_envs_per_worker=ENGINES,
        tcod_env_timeout_s=5.0,
        tcod_engine_timeout_s=5.0,
    )
    source, outcomes, kept = RecordingSource(args), {}, []
    while len(outcomes) < EPISODES:
        output = tcod_rollout.generate_rollout(args, len(kept), source)
        check_invariants(args, hooks.flat(output.samples))
        enter(outcomes, source.drawn, output.metrics)
        for recorded in (source.drawn, rig.student.requests, rig.teacher.requests):
            recorded.clear()
        del output
        gc.collect()
        kept.append(used())
    check_outcomes(outcomes)
    warm, end = kept[len(kept) // 3], kept[-1]
    assert all(end[name] - warm[name] < spare for name, spare in {"files": 20, "threads": 20, "memory_mb": 50}.items())
    assert len(alive(rig.folder)) <= WORKERS
