"""Thousands of episodes with one percent of every fault mixed in: is anything lost, counted twice, or kept in memory?

tests/soak.py is the command, tests/engine/test_soak.py its short form.

Every task is drawn once. Episodes run through slime's rollout loop with environments in Ray's worker processes, a
scripted engine and a scripted teacher behind proxies that fail. What each task must come to is known beforehand, so
the accounting is exact: `soak` returns its figures, or fails if an episode is lost, played twice or miscounted.
"""

import functools
import gc
import itertools
import json
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from statistics import linear_regression
from typing import Any
from unittest.mock import patch

from aiohttp import web
from transformers import AutoTokenizer

from examples.tcod import tcod_rollout
from examples.tcod.episode.record import Episode
from examples.tcod.model import client as sglang_client
from examples.tcod.model import student
from slime.utils.http_utils import init_http_client
from slime.utils.misc import SingletonMeta
from slime.utils.types import Sample
from tests.support.corridor import alive
from tests.support.fake_sglang import generated, hold, scored
from tests.support.fault_proxy import FaultProxy
from tests.support.rig import RecordingSource, Rig, check_invariants, teacher_value
from tests.support.toys import save_tokenizer

SHARE = 0.01  # of the tasks, for each fault
BATCH = 32
WORKERS, ENGINES = 2, 4

# fault -> what is counted for its task; None: healed, the task is trained on. Names with a hazard are corridor.py's.
HAZARDS = {
    "killed at reset": "env_worker_died",
    "killed at step": "env_worker_died",
    "hangs": "env_timeout",
    "raises": "env_error",
    "long at reset": "prompt_too_long",
    "long at step": None,
    "control tokens": None,
}
TEACHER = {
    "teacher resets": "teacher_unavailable",
    "teacher resets once": None,
    "teacher refuses": "teacher_refused",
    "teacher says NaN": "teacher_invalid",
}
ENGINE = {
    "engine resets once": None,
    "engine aborts": "engine_aborted",
    "engine says nothing": "nothing_sampled",
    "engine says inf": "engine_invalid",
    "engine hangs": "engine_timeout",
}
OUTCOMES = {**HAZARDS, **TEACHER, **ENGINE}
# A worker process that dies takes the episodes on its other engines with it.
COLLATERAL = "env_worker_died"


class Soak:
    """A rig whose tasks carry their faults, and the books about them."""

    def __init__(self, rig: Rig, episodes: int) -> None:
        each = max(1, round(SHARE * episodes))
        faults = list(OUTCOMES) * each
        if len(faults) > episodes:
            raise ValueError(f"one of every fault makes {len(faults)} episodes: --episodes must not be lower")
        self.rig, self.episodes = rig, episodes
        self.fault_of = {i * episodes // len(faults): fault for i, fault in enumerate(faults)}
        self.outcomes: dict[int, str] = {}
        self._seen: set[int] = set()

    def rows(self) -> list[dict]:
        """One row per episode and two spare batches: the last rollout's replacements."""
        return [
            {"goal": 2 + task % 3, "name": f"Task {task}.", "hazard": self.fault_of.get(task, "")}
            for task in range(self.episodes + 2 * BATCH)
        ]

    def fault(self, payload: dict, among: Collection[str]) -> str | None:
        """The fault of the task that a request is about, if it is among these; one that happens once is told once."""
        match = re.search(r"Task (\d+)\.", self.rig.tokenizer.decode(payload.get("input_ids", [])))
        fault = self.fault_of.get(int(match[1])) if match else None
        if fault not in among:
            return None
        if not fault.endswith(" once"):
            return fault
        first = int(match[1]) not in self._seen
        self._seen.add(int(match[1]))
        return fault if first else None

    def on_the_wire(self, among: Collection[str], body: bytes) -> str | None:
        among = {fault for fault in among if " resets" in fault}
        return "reset" if self.fault(json.loads(body), among) else None

    def teacher_reply(self, payload: dict) -> Any:
        reply = scored(payload, teacher_value)
        match self.fault(payload, {"teacher refuses", "teacher says NaN"}):
            case "teacher refuses":
                return web.Response(status=400)
            case "teacher says NaN":
                reply["meta_info"]["input_token_logprobs"][-1][0] = math.nan
        return reply

    def engine_reply(self, payload: dict) -> Any:
        match self.fault(payload, ENGINE.keys() - {"engine resets once"}):
            case "engine hangs":
                return hold()
            case "engine aborts":
                return generated([], [], finish="abort")
            case "engine says nothing":
                return generated([], [])
            case "engine says inf":
                return generated([5], [-math.inf])
        return self.rig.student_reply(payload)

    def enter(self, drawn: list[Sample], metrics: dict[str, float]) -> None:
        """Book what became of the drawn samples; the rollout's metrics must say the same."""
        counts: Counter[str] = Counter()
        for sample in drawn:
            task = int(sample.metadata["name"].split()[1].rstrip("."))
            assert task not in self.outcomes, f"task {task} was drawn twice"
            outcome = "aborted" if sample.status == Sample.Status.ABORTED else "trained"
            if sample.status == Sample.Status.FAILED:
                outcome = Episode.of(sample).record.failure
            self.outcomes[task] = outcome
            counts[outcome] += 1
        assert counts.pop("trained") == BATCH
        assert metrics["rollout/tcod/aborted"] == counts.pop("aborted", 0)
        assert metrics["rollout/tcod/failed"] == sum(counts.values())
        assert all(metrics[f"rollout/tcod/failed/{reason}"] == count for reason, count in counts.items())

    def collateral(self) -> int:
        """Every task came to what it had to; but a dying worker may have taken it along. How many were taken."""
        taken = 0
        for task, outcome in self.outcomes.items():
            expected = OUTCOMES.get(self.fault_of.get(task)) or "trained"
            assert outcome in (expected, COLLATERAL), f"task {task}: {outcome}, not {expected}"
            taken += outcome != expected
        deaths = sum(fault in ("killed at reset", "killed at step", "hangs") for fault in self.fault_of.values())
        assert taken <= deaths * (ENGINES - 1)
        return taken


def soak(episodes: int, folder: Path) -> dict[str, Any]:
    """Play the episodes and return the figures. Needs Ray. Raises AssertionError if the books do not balance."""
    checkpoint = save_tokenizer(folder)
    rig = Rig(folder, checkpoint, AutoTokenizer.from_pretrained(checkpoint))
    run = Soak(rig, episodes)
    rig.teacher_reply, rig.student.reply = run.teacher_reply, run.engine_reply
    samples: list[dict[str, float]] = []
    started = time.monotonic()
    with (
        rig.student,
        rig.teacher,
        FaultProxy(rig.student.port) as engine,
        FaultProxy(rig.teacher.port) as teacher,
        patch.object(sglang_client, "FIRST_PAUSE_S", 0.1),
        patch.object(sglang_client, "RETRIES", 2),
        patch.object(student, "FIRST_PAUSE_S", 0.01),
    ):
        engine.fault = functools.partial(run.on_the_wire, ENGINE.keys())
        teacher.fault = functools.partial(run.on_the_wire, TEACHER.keys())
        args = rig.args(
            run.rows(),
            rollout_batch_size=BATCH,
            rm_url=f"{teacher.url}/generate",
            sglang_router_port=engine.port,
            tcod_environment="tests.support.corridor.HazardousCorridor",
            tcod_env_workers=WORKERS,
            tcod_engines_per_worker=ENGINES,
            tcod_env_timeout_s=5.0,
            tcod_engine_timeout_s=5.0,
        )
        SingletonMeta._instances.clear()
        init_http_client(args)
        source = RecordingSource(args)
        for n in itertools.count():
            output = tcod_rollout.generate_rollout(args, n, source)
            check_invariants(args, [sample for group in output.samples for sample in group])
            run.enter(source.drawn, output.metrics)
            taken = run.collateral()
            for recorded in (source.drawn, rig.student.requests, rig.teacher.requests):
                recorded.clear()
            del output
            gc.collect()
            samples.append({"episodes": len(run.outcomes), **resources()})
            if len(run.outcomes) >= episodes:
                break
    assert sorted(run.outcomes) == list(range(len(run.outcomes))), "a task was skipped"
    warm = samples[len(samples) // 3 :]
    slope = linear_regression([sample["episodes"] for sample in warm], [sample["memory_mb"] for sample in warm]).slope
    return {
        "episodes": len(run.outcomes),
        "rollouts": len(samples),
        "seconds": round(time.monotonic() - started, 1),
        "outcomes": dict(Counter(run.outcomes.values()).most_common()),
        "taken along by a dying worker": taken,
        **{
            f"{name}, warm and at the end": [warm[0][name], warm[-1][name]]
            for name in ("memory_mb", "files", "threads")
        },
        "memory slope in MB per 1,000 episodes": round(1000 * slope, 2),
        "worker processes at the end": len(alive(folder)),
    }


def resources() -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory_mb = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    return {"memory_mb": memory_mb, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}
