"""What must never happen in a rollout: a model's output in a shell or a path, a port beyond this machine."""

import subprocess
import sys

import pytest

from examples.tcod.env_alfworld import AlfworldEnvironment
from smoke.make_games import TASKS, make_game

MARK = "pwned"
HOSTILE = [
    f"$(touch {MARK})",
    f"`touch {MARK}`; touch {MARK} | sh -c 'touch {MARK}'",
    f"../../../{MARK}",
    f"/{MARK}",
    f"{MARK}\x00.tw-pddl",
    f"__import__('os').system('touch {MARK}')",
    "{" + MARK + ".__class__}" + f" #{MARK}# %({MARK})s",
]


class Watch:
    """Collects what this process opens, starts or imports whose name has the mark in it, while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)  # there is no way to take it off again

    def _hook(self, event: str, args: tuple) -> None:
        watched = (
            event == "open" or event == "import" or event.startswith(("os.", "subprocess.", "shutil.", "ctypes."))
        )
        if self.on and watched and MARK in repr(args):
            self.seen.append((event, repr(args)))


@pytest.fixture(scope="module")
def watched():
    return Watch()


@pytest.fixture
def watch(watched, tmp_path, monkeypatch):
    """On for the test, in an empty folder that stays empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    watched.seen.clear()
    watched.on = True
    yield watched
    watched.on = False
    assert watched.seen == [] and list(folder.iterdir()) == []


def test_the_watch_sees(watched, tmp_path):
    watched.on = True
    (tmp_path / MARK).touch()
    subprocess.run(["true", MARK], check=True)
    watched.on = False
    assert {event for event, _ in watched.seen} >= {"open", "subprocess.Popen"}


def test_a_response_reaches_no_shell_and_no_path(rig, watch):
    """Through the whole rollout; the toy environment echoes nothing, so what is watched is the recipe."""
    rig.script = [f"<action>{text}</action>" for text in HOSTILE]
    [sample], metrics = rig.rollout([{"goal": 1}], tcod_horizon=len(HOSTILE))
    assert metrics["rollout/tcod/turns/student"] == len(HOSTILE) and all(text in sample.response for text in HOSTILE)


def test_an_action_reaches_no_shell_and_no_path_in_alfworld(tmp_path, watch):
    watch.on = False
    row = make_game(tmp_path, "train", next(iter(TASKS)), 0, 5)["metadata"]
    environment = AlfworldEnvironment(str(tmp_path))
    watch.on = True
    environment.reset(row)
    for text in HOSTILE:
        assert environment.step(text).text == "Nothing happens."
