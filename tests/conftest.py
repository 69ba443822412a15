"""slime, or its stand-in, for every test module to import, and the rig that whole episodes are played on."""

import os

import pytest

from smoke import hooks

SLIME = hooks.find_slime()
# Ray's workers and other child processes import from where this process does.
os.environ["PYTHONPATH"] = hooks.python_path()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# slime's GPU tests are programs, and their names no module names.
collect_ignore_glob = ["test_qwen*"]


def pytest_report_header() -> str:
    return f"slime: {SLIME}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tokenizer with one token per byte."""
    from tests.support.toys import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def rig(tmp_path, checkpoint, tokenizer, monkeypatch):
    """A scripted student and a scripted teacher, up for one test. Nothing is asked twice."""
    from examples.tcod.model import client as sglang_client
    from examples.tcod.model import student
    from tests.support.rig import Rig

    monkeypatch.setattr(sglang_client, "RETRIES", 0)
    monkeypatch.setattr(student, "FIRST_PAUSE_S", 0.001)

    rig = Rig(tmp_path, checkpoint, tokenizer)
    with rig.student, rig.teacher:
        yield rig


@pytest.fixture
def over_sampling(monkeypatch):
    """Lets slime abort surplus episodes, which a run may not do: it would train on the fastest ones."""
    from examples.tcod.settings import checks

    monkeypatch.setattr(checks, "_check_over_sampling", lambda args: None)


@pytest.fixture
def local_pool(monkeypatch):
    """Episodes without worker processes; the pool has tests of its own."""
    from examples.tcod.settings import build
    from tests.support.toys import LocalPool

    monkeypatch.setattr(build, "EnvironmentPool", LocalPool)
