"""What each fault costs: one table of cases, each played through slime's whole rollout loop on a batch of three tasks.

One task, the one of door 3, is hit. Whatever happens to it, the batch has its three groups and every number in it is
what the engine and the teacher said. The table is tests/support/fault_cases.py.
"""

import functools
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable

import pytest

from examples.tcod import ConfigError
from examples.tcod.environments.pool import EnvironmentPool
from examples.tcod.model import client as sglang_client
from smoke import hooks
from tests.support.corridor import alive
from tests.support.fault_cases import CASES
from tests.support.faults import Scene


@pytest.fixture(scope="module", autouse=True)
def nothing_leaks(real_ray, tmp_path_factory):
    """Far fewer file descriptors, threads and ports are left over than cases were played, and no temporary file."""
    folder = tmp_path_factory.mktemp("temporary")
    before = used()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield
    assert list(folder.iterdir()) == []
    assert {name: count - before[name] for name, count in used().items() if count - before[name] > SPARE} == {}


SPARE = 15  # threads and connections that slime, Ray and the event loop keep for good


def used() -> dict[str, int]:
    return {"files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """One pool of three worker processes for all cases that need them: the next one finds whole what one broke."""
    folder = tmp_path_factory.mktemp("data")
    pools = []

    def make() -> EnvironmentPool:
        if not pools:
            environment = "tests.support.corridor.HazardousCorridor"
            pools.append(EnvironmentPool(environment, str(folder), workers=3, envs_per_worker=1, timeout_s=5.0))
        return pools[0]

    yield make
    if pools:
        wait_until(lambda: len(alive(folder)) <= 3)


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def scene(rig, monkeypatch, pool):
    monkeypatch.setattr(sglang_client, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(sglang_client, "RETRIES", 2)
    return Scene(rig, monkeypatch, pool)


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{part}: {c.fault}") for part in CASES for c in CASES[part]])
def test_fault(case, scene, caplog):
    rows = [{"goal": goal, "demo": {"actions": ["right"] * goal}} for goal in (2, 3, 2)]
    rows[1] |= case.row
    case.inject(scene)
    play = functools.partial(scene.rig.rollout, rows, **case.changes)
    if case.outcome == "stops":
        with pytest.raises((ConfigError, RuntimeError), match=re.escape(case.says)) as stop:
            play()
        assert "\n" not in str(stop.value)
        return

    trained, metrics = play()  # asserts that masks and log-probs are aligned and finite
    drawn = scene.rig.drawn
    [hit] = [sample for sample in drawn if sample.metadata["goal"] == 3]
    count = {name: metrics[f"rollout/tcod/{name}"] for name in ("failed", "aborted")}
    assert case.says in caplog.text
    assert len(trained) == len(rows) and len(drawn) == len(trained) + sum(count.values())
    assert not case.counted or metrics[f"rollout/tcod/{case.counted}"] > 0
    if case.outcome == "trained":
        assert hit in trained and sum(count.values()) == 0
        case.check(scene, hit)
        return
    assert case.outcome == "dropped" and hit not in trained and sum(count.values()) == 1
    assert metrics[f"rollout/dynamic_filter/drop_{case.counted.removeprefix('failed/')}"] == 1
    assert hit.teacher_log_probs is None and hit.reward in (0.0, None)
    if not case.counted.startswith("failed/teacher"):  # what the student played stays for reading
        assert hit.tokens == [] and hit.response == "" and hit.response_length == 0
        assert hit.loss_mask is hit.rollout_log_probs is None


def test_the_document_explains_every_reason():
    """Reasons in the code are string literals; teacher_ and engine_ are put before those of the HTTP client."""
    recipe = hooks.ROOT / "examples" / "tcod"
    text = "".join(file.read_text() for file in recipe.rglob("*.py") if file.parent.name != "tools")
    raised = set(re.findall(r'Failure\(\s*"(\w+)"', text)) - {"unavailable", "timeout", "refused"}
    raised |= {case.counted.removeprefix("failed/") for part in CASES.values() for case in part if case.counted}
    document = (recipe / "docs" / "FAULTS.md").read_text()
    assert len(raised) > 15 and [reason for reason in raised if f"`{reason}`" not in document] == []


def test_the_default_retries_outlast_a_minute():
    """Even where every pause is as short as chance makes it, which is half of its length."""
    first, longest = sglang_client.FIRST_PAUSE_S, sglang_client.LONGEST_PAUSE_S
    pauses = [min(first * 2**i, longest) / 2 for i in range(sglang_client.RETRIES)]
    assert sum(pauses) >= 60
