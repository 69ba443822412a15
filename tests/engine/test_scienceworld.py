"""The ScienceWorld environment on the real engine, and the rows that are prepared from it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.tcod.environments import scienceworld
from examples.tcod.environments.protocol import checked_observation
from examples.tcod.environments.scienceworld import ScienceworldEnvironment
from smoke import hooks

NUM_GPUS = 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("java") is None, reason="needs Java, such as default-jre-headless"),
]
TASK = {"task": "find-animal", "variation": 0, "simplifications": "easy"}


@pytest.fixture(scope="module")
def environment() -> Iterator[ScienceworldEnvironment]:
    with pytest.MonkeyPatch.context() as patch:  # a Turkish user's
        patch.setattr(scienceworld, "_USERS_JAVA_OPTIONS", "-Duser.language=tr -Dmine=kept")
        engine = ScienceworldEnvironment()
    yield engine
    engine.close()


def test_the_locale_is_pinned_and_the_users_options_are_kept(environment):
    assert " -Dmine=kept " in os.environ["JAVA_TOOL_OPTIONS"]
    environment.reset(TASK)
    assert environment.step("INVENTORY").text.startswith("In your inventory, you see:")


def test_the_first_observation_has_room_and_task(environment):
    first = checked_observation(environment.reset(TASK), "reset")
    assert first.text.startswith("This room is called the hallway. In it, you see:")
    assert first.text.endswith("\n\n" + first.text.rpartition("\n\n")[2]) and "Your task is to find a" in first.text
    assert {"kitchen", "picture", "door to kitchen"} < set(first.admissible)
    assert not (first.won or first.done or first.refused)
    shown = ScienceworldEnvironment.render(first, True, True)
    assert len(shown) < 1500 and "You can name: agent, air, art studio" in shown  # 115 actions are valid
    assert ScienceworldEnvironment.render(first, True, False) == first.text


def test_success_is_the_full_score_and_a_wrong_focus_the_end(environment):
    environment.reset(TASK)
    environment.game.load("find-animal", 0, "easy", generateGoldPath=True)
    gold = environment.game.get_gold_action_sequence()
    environment.reset(TASK)
    said = [environment.step(action) for action in gold]
    assert [observation.won for observation in said] == [False] * (len(gold) - 1) + [True]
    assert said[-1].done and said[-1].reward == 1.0 and not any(observation.refused for observation in said)
    assert 0 <= said[0].reward < 0.2  # it may begin above 0
    environment.reset(TASK)
    wrong = environment.step("focus on agent")
    assert (wrong.won, wrong.done, wrong.reward) == (False, True, -1.0)
    assert not environment.reset(TASK).done


def test_what_is_no_action_is_refused_and_an_ambiguous_one_asked_back(environment):
    environment.reset(TASK)
    for text in ["", "fly to the moon", "look " * 5000, "żółw 龟 🐢", "{OBJ}", "\x00"]:
        observation = environment.step(text)
        assert observation.refused and observation.text == "No known action matches that input."
    assert not environment.step("go to kitchen").refused
    asked = environment.step("open door")
    assert asked.text.startswith("Ambiguous request") and not asked.refused
    assert environment.step("0").text == "The door is already open."


@pytest.mark.parametrize(
    "task, said",
    [
        ({"task": "use-thermometer", "variation": 540}, "has no variation 540: they are 0 to 539"),
        ({"simplifications": "openDoors,easy"}, "Unknown simplification label: easy"),
    ],
)
def test_an_error_of_the_engines_is_no_observation(environment, task, said):
    with pytest.raises(ValueError, match=said):
        environment.reset({**TASK, **task})
    assert "Your task is to find a" in environment.reset(TASK).text


def test_rows_are_made_of_variations_and_gold_sequences(tmp_path):
    done = _prepare(tmp_path, "--tasks", "lifespan-longest-lived", "--variations", "2", "--processes", "1")
    assert done.returncode == 0, done.stderr
    assert "demonstrations by source: gold 2" in done.stdout and "nothing is left out" in done.stdout
    rows = {name: _rows(tmp_path / f"{name}.jsonl") for name in ("train", "dev", "test")}
    assert [len(found) for found in rows.values()] == [2, 2, 2]
    for row in rows["train"]:
        assert row["label"] == "lifespan-longest-lived" and row["prompt"].startswith("Your task is to find the animal")
        assert row["metadata"]["demo"]["actions"][-1].startswith("focus on")  # the gold sequence goes on after it
    tasks = [(row["metadata"]["task"], row["metadata"]["variation"]) for found in rows.values() for row in found]
    assert len(set(tasks)) == 6


def test_an_unknown_task_is_named(tmp_path):
    done = _prepare(tmp_path, "--tasks", "fly")
    assert done.returncode == 1
    said = "prepare_scienceworld: ScienceWorld has no task fly: --tasks are of boil, "
    assert done.stderr.splitlines()[-1].startswith(said)


def _prepare(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "examples.tcod.tools.prepare_scienceworld", "--out", folder, *flags]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(hooks.ROOT)}, capture_output=True, text=True)


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
