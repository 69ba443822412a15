"""The TextArena environment on the real package, and the state that its engines share."""

import json
import random
import re

import numpy as np
import pytest
import yaml

from examples.tcod.environments import textarena
from examples.tcod.environments.protocol import Observation, checked_observation
from examples.tcod.environments.textarena import TextArenaEnvironment
from examples.tcod.settings.config import TcodConfig
from smoke import hooks

NUM_GPUS = 0
pytest.importorskip("textarena", reason="needs textarena")
NUMBER = {"game": "GuessTheNumber-v0", "seed": 3}


@pytest.fixture
def engine() -> TextArenaEnvironment:
    return TextArenaEnvironment()


def play(engine: TextArenaEnvironment, task: dict, actions: list[str]) -> list[Observation]:
    return [engine.reset(task), *(engine.step(action) for action in actions)]


def test_a_game_is_played_to_its_success(engine):
    first = checked_observation(engine.reset(NUMBER), "reset")
    assert first.text.startswith("You are Player 0. You are playing Guess The Number.") and not first.done
    answers = {guess: engine.step(f"[{guess}]") for guess in (10, 5, 7, 8)}
    assert [answer.text for answer in answers.values()][:2] == [
        "The target number is lower.",
        "The target number is higher.",
    ]
    last = checked_observation(answers[8], "step")
    assert (last.won, last.done, last.reward) == (True, True, 1.0)
    assert last.text == "Congratulations! You guessed the correct number."
    assert engine.reset(NUMBER) == first


def test_two_impossible_moves_in_a_row_end_a_game_unsolved(engine):
    engine.reset(NUMBER)
    asked, lost = engine.step("no such action"), engine.step("[99]")
    assert asked.refused and not asked.done and "did not respond with valid '[number]'" in asked.text
    assert (lost.refused, lost.done, lost.won) == (True, True, False)
    assert lost.text.startswith("Invalid Move: ") and lost.reward == 0.0


def test_a_turn_has_what_is_new_and_not_the_students_own_move(engine):
    """TextArena's own wrappers tell the whole game again; its Tower of Hanoi repeats a move in the game's name."""
    engine.reset({"game": "TowerOfHanoi-v0", "seed": 0})
    assert engine.step("[A C]").text.count("A:") == 1 and "[A C]" not in engine.step("[A B]").text


DRAWS = {
    "2048-v0": ["[down]", "[left]", "[down]", "[left]"],  # at every move
    "Minesweeper-v0-small": ["[1 1]"],  # at the first
    "Sokoban-v0": ["[down]", "[left]"],  # when a game begins, as most do
}


@pytest.mark.parametrize("game, actions", DRAWS.items())
def test_engines_of_one_process_play_as_they_do_alone(game, actions, engine, monkeypatch):
    tasks = [{"game": game, "seed": seed} for seed in (3, 4)]
    alone = [play(engine, task, actions) for task in tasks]
    assert alone[0] != alone[1] and alone == [play(engine, task, actions) for task in tasks]

    def together() -> list[list[Observation]]:
        engines = [TextArenaEnvironment() for _ in tasks]
        told = [[one.reset(task)] for one, task in zip(engines, tasks, strict=True)]
        for action in actions:
            for one, said in zip(engines, told, strict=True):
                said.append(one.step(action))
        return told

    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), np.random.RandomState(1).rand()
    assert together() == alone
    assert (random.random(), np.random.rand()) == expected  # nor do they move what others draw
    monkeypatch.setattr(textarena, "_exchange", lambda states: states)
    assert (together() == alone) == (game == "Sokoban-v0")


@pytest.mark.parametrize(
    "task, said",
    [
        ({**NUMBER, "game": "Guess-v0"}, "Environment Guess-v0 not found in registry"),
        ({**NUMBER, "game": "TicTacToe-v0"}, "The number of players has to be 2, received 1"),
    ],
)
def test_what_is_no_game_for_one_is_an_error(engine, task, said):
    with pytest.raises((ValueError, AssertionError), match=said):
        engine.reset(task)


@pytest.mark.parametrize("row", [{}, {"seed": 1}, {"game": 3, "seed": 1}])
def test_a_row_without_a_game_is_refused(row):
    with pytest.raises(ValueError, match='no game, a name of TextArena\'s such as "Mastermind-v0"'):
        TextArenaEnvironment.check_row(row, "")


@pytest.mark.parametrize("seed", [None, True, -1, 2**32, "7"])
def test_a_row_without_a_seed_is_refused(seed):
    with pytest.raises(ValueError, match="no seed that is an integer from 0"):
        TextArenaEnvironment.check_row({**NUMBER, "seed": seed}, "")


def test_the_rows_of_the_document_are_solved(engine, tmp_path, monkeypatch):
    text = (hooks.ROOT / "examples" / "tcod" / "docs" / "HUBS.md").read_text("utf-8")
    recipe, settings = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("python", "yaml"))
    monkeypatch.chdir(tmp_path)
    exec(recipe, {})
    horizon = TcodConfig(tcod_variant="b2f", **yaml.safe_load(settings)).tcod_horizon
    rows = [json.loads(line) for name in ("train", "heldout") for line in (tmp_path / f"{name}.jsonl").open()]
    assert len(rows) == 64
    for row in rows:
        actions = row["metadata"].pop("demo")["actions"]
        TextArenaEnvironment.check_row(row["metadata"], "")
        assert play(engine, row["metadata"], actions)[-1].won and len(actions) <= horizon
