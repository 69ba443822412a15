"""The ALFWorld environment on the real engine: observations, actions, success, speed-up and memory."""

import json
import multiprocessing
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from textworld.envs.pddl import textgen

from examples.tcod import env_alfworld
from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.environments import textworld_speedup
from examples.tcod.environments.protocol import Observation
from smoke.make_games import TASKS, make_game

NUM_GPUS = 0
NOT_ACTIONS = [
    "",
    "go to moon 1",
    "Look",
    "take",
    "look " * 500,
    "go to \x00",
    "äß 鏡 🪞",
    "{r}",
    "#intro#",
    "<action>",
]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("games")


@pytest.fixture(scope="module")
def rows(data_root) -> list[dict]:
    """One game of each of the six task types."""
    return [make_game(data_root, "train", task_type, variant, 7 + variant) for variant, task_type in enumerate(TASKS)]


@pytest.fixture(scope="module")
def environment(data_root) -> AlfworldEnvironment:
    return AlfworldEnvironment(str(data_root))


def transcripts(data_root: str, metadata: list[dict], speed_up: bool) -> list[Observation]:
    """What the engine says to random admissible actions, demonstrations and nonsense, in this process."""
    if not speed_up:
        env_alfworld.speed_up_textworld = lambda: None
    environment, said = AlfworldEnvironment(data_root), []
    for game in metadata:
        rng = random.Random(game["game_file"])
        said.append(environment.reset(game))
        for _ in range(8):
            action = rng.choice(said[-1].admissible) if rng.random() < 0.8 else rng.choice(NOT_ACTIONS)
            said.append(environment.step(action))
        said.append(environment.reset(game))
        said += [environment.step(action) for action in ["inventory", "help", *game["demo"]["actions"], "look"]]
    return said


def test_the_speed_up_changes_no_word(data_root, rows):
    """Two fresh processes with hash seeds of their own, so this also shows that no order depends on hashing."""
    metadata = [row["metadata"] for row in rows]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        plain = processes.submit(transcripts, str(data_root), metadata, False)
        # Playing everything twice compares remembered results as well as fresh ones.
        fast = processes.submit(transcripts, str(data_root), metadata + metadata, True)
        assert fast.result() == plain.result() + plain.result()
    assert sum(observation.won for observation in plain.result()) >= len(rows)
    assert len({observation.text for observation in plain.result()}) > 50


def test_the_grammar_finds_its_variables_without_locals(environment, monkeypatch):
    """Since Python 3.13 what is added to locals() is lost (PEP 667)."""
    monkeypatch.setattr(textgen, "locals", dict, raising=False)
    thing = SimpleNamespace(name="", id="desk 1")
    [said] = textgen.EvalSymbol("r.name or r.id").derive({"variables": {"r": thing}})
    assert said.symbol == "desk 1"


def test_another_textworld_is_left_alone_loudly(monkeypatch):
    parse = textgen._parse_and_convert
    monkeypatch.setattr(textworld_speedup.importlib.metadata, "version", lambda _: "9.9")
    with pytest.warns(UserWarning, match="textworld 9.9 runs unpatched: each environment step takes"):
        textworld_speedup.speed_up_textworld.__wrapped__()
    assert textgen._parse_and_convert is parse


def test_the_first_observation_has_room_and_goal_and_the_demonstration_wins_with_its_last_action(environment, rows):
    for row in rows:
        observation = environment.reset(row["metadata"])
        assert observation.text.startswith("You are in the middle of a room. Looking quickly around you, you see ")
        assert observation.text.endswith(f"\n\nYour task is to: {row['prompt'].rstrip('.')}.")
        assert not observation.done
        assert {"look", "inventory"} < set(observation.admissible)
        assert "help" not in observation.admissible  # its answer costs 205 tokens
        assert sum(action.startswith("go to ") for action in observation.admissible) >= 5
        won = []
        for action in row["metadata"]["demo"]["actions"]:
            assert action in observation.admissible
            observation = environment.step(action)
            assert observation.text == observation.text.strip() and not observation.refused
            assert all(action == " ".join(action.split()) for action in observation.admissible)
            won.append((observation.won, observation.done))
        assert won == [(False, False)] * (len(won) - 1) + [(True, True)]


def test_what_is_no_action_does_nothing(environment, rows):
    first = environment.reset(rows[0]["metadata"])
    for text in NOT_ACTIONS:
        observation = environment.step(text)
        assert observation == Observation("Nothing happens.", admissible=first.admissible, refused=True)
    assert not any(environment.step("look").done for _ in range(60))  # the engine's usual limit is 50


@pytest.mark.parametrize(
    "metadata, error",
    [({}, KeyError), ({"game_file": "none"}, OSError), ({"game_file": "broken.tw-pddl"}, ValueError)],
)
def test_a_bad_row_raises_and_the_engine_plays_on(environment, data_root, rows, metadata, error):
    (data_root / "broken.tw-pddl").write_text("{")
    with pytest.raises(error):
        environment.reset(metadata)
    assert rows[0]["prompt"] in environment.reset(rows[0]["metadata"]).text


def test_the_command_line_survives_a_reset(environment, data_root, rows, monkeypatch):
    game = json.loads((data_root / rows[0]["metadata"]["game_file"]).read_text())
    game["pddl_problem"] += "\n; not translated before\n"
    (data_root / "new.tw-pddl").write_text(json.dumps(game))
    monkeypatch.setattr(sys, "argv", arguments := ["train.py", "--rollout-batch-size", "8"])
    environment.reset({"game_file": "new.tw-pddl"})
    assert sys.argv is arguments


def mapped_libraries() -> int:
    """How many copies of the planner's library this process has mapped."""
    mapped = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    return len({fields[4] for fields in mapped if len(fields) > 5 and "libdownward" in fields[5]})


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_memory_stays_flat_over_episodes(data_root, rows):
    before, warm = mapped_libraries(), 0.0
    environment = AlfworldEnvironment(str(data_root))
    for episode in range(90):
        warm = resident_mb() if episode == 20 else warm
        observation = environment.reset(rows[episode % len(rows)]["metadata"])
        for _ in range(3):
            observation = environment.step(random.Random(episode).choice(observation.admissible))
    assert mapped_libraries() == before + 1
    assert resident_mb() - warm < 30  # one leaked engine would be 33
