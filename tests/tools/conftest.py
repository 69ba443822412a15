"""The run script in a place of its own."""

import os
import signal
from contextlib import suppress

import pytest

from tests.support import run_script
from tests.support.fake_cluster import processes_of


@pytest.fixture
def place(tmp_path):
    """(folder, the script's environment)"""
    return tmp_path, run_script.build(tmp_path)


@pytest.fixture
def script(place):
    """script(hangup=what SIGHUP does, **variables) -> Running"""
    folder, env = place
    started = []

    def begin(hangup=signal.SIG_DFL, **variables):
        started.append(run_script.Running(folder, {**env, **variables}, hangup))
        return started[-1]

    yield begin
    for running in started:
        running.popen.kill()
    for pid, _ in processes_of(folder / "run"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def handed_on(tmp_path_factory):
    """(folder, the variables that the script hands to the launcher in that place)"""
    place = tmp_path_factory.mktemp("place")
    return place, run_script.commands((place, run_script.build(place))).env


@pytest.fixture
def settings(place, handed_on):
    """settings(**changes): the launcher's Settings, as the script gives them, with these variables instead."""
    from examples.tcod.tools.launch.variables import Settings

    other, env = handed_on
    env = {name: text.replace(str(other), str(place[0])) for name, text in env.items()}
    return lambda **changes: Settings.read({**env, **changes})


@pytest.fixture
def rig(tmp_path, checkpoint, monkeypatch):
    """A scripted model on a server, for collect_demos and evaluate."""
    import ray

    from examples.tcod.model import client
    from examples.tcod.settings import build
    from tests.support.served_model import Rig
    from tests.support.toys import LocalPool

    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: None)
    monkeypatch.setattr(build, "EnvironmentPool", LocalPool)
    monkeypatch.setattr(client, "RETRIES", 0)
    rig = Rig(tmp_path, checkpoint)
    rig.monkeypatch = monkeypatch
    with rig.server:
        yield rig
