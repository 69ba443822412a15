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


# What not every machine has: its slow tests, or all in a folder, and what they need beside `-m slow`.
PARTS = {
    "slime": ("tests/slime/", "SLIME_DIR and MEGATRON_DIR, set or in ~/.config/tcod/tests.env"),
    "SGLang": ("tests/engine/test_sglang_contract.py", "-m slow"),
    "ScienceWorld": ("tests/engine/test_scienceworld.py", "-m slow and Java"),
    "OpenEnv's own server": ("tests/engine/test_openenv.py", "-m slow and openenv"),
    "page in a browser": ("tests/tools/test_show_rollouts.py", "-m slow and Chromium"),
}


def pytest_report_header() -> str:
    return f"slime: {SLIME}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A browser is slow. Of several processes of pytest one plays all tests that share Ray, or a module's fixture."""
    for item in items:
        scopes = {name: fixtures[-1].scope for name, fixtures in item._fixtureinfo.name2fixturedefs.items()}
        if "browser" in scopes:
            item.add_marker(pytest.mark.slow)
        if item.nodeid.startswith("tests/slime/"):  # whole clusters, with ports and most of the memory
            item.add_marker(pytest.mark.xdist_group("slime"))
        elif "module" in scopes.values():
            item.add_marker(pytest.mark.xdist_group("ray" if "real_ray" in scopes else item.module.__name__))


def pytest_terminal_summary(terminalreporter) -> None:
    """After a run of all tests: which parts ran, and which did not for want of what."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    if not reports or terminalreporter.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    terminalreporter.section(f"on {SLIME}")
    for part, (path, needs) in PARTS.items():
        ran = [report for report in reports if report.nodeid.startswith(path)]
        ran = [report for report in ran if path.endswith("/") or "slow" in report.keywords]
        terminalreporter.line(f"{part}: {f'{len(ran)} tests ran' if ran else f'did not run, needs {needs}'}")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tokenizer with one token per byte."""
    from tests.support.toys import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def real_ray():
    """Ray on this machine. The modules of a process share it: to start it takes 10 s of computing."""
    import ray

    if not ray.is_initialized():
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        ray.init(address="local", num_cpus=64, num_gpus=0, object_store_memory=80 * 2**20, **options)


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

    forbidden = checks._forbidden

    def allowing(args, config):
        return {name: why for name, why in forbidden(args, config).items() if name != "over_sampling_batch_size"}

    monkeypatch.setattr(checks, "_forbidden", allowing)


@pytest.fixture
def local_pool(monkeypatch):
    """Episodes without worker processes; the pool has tests of its own."""
    from examples.tcod.settings import build
    from tests.support.toys import LocalPool

    monkeypatch.setattr(build, "EnvironmentPool", LocalPool)
