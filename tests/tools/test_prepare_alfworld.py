"""prepare_alfworld.py on real games in the layout of alfworld-download."""

import asyncio
import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from examples.tcod import ConfigError, Failure
from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.episode.demonstration import Demonstration
from examples.tcod.settings.config import TcodConfig
from examples.tcod.tools import prepare as prepare_module
from examples.tcod.tools import prepare_alfworld
from examples.tcod.tools.prepare import Candidate, Checked, Task, check_task
from examples.tcod.tools.prepare_alfworld import make_task, read_source, rebase
from smoke.make_games import make_game
from tests.support.toys import LocalPool

NUM_GPUS = 0
HORIZON = 12
FOREIGN = "/somewhere/else/alfworld/"
GAME = "json_2.1.1/train/pick_and_place_simple-Mug-None-Desk-308/trial_T1/game.tw-pddl"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("alfworld")


@pytest.fixture(scope="module")
def rows(root) -> dict[str, list[dict]]:
    """The rows that the generator makes of its own games, by split."""
    simple, clean = "pick_and_place_simple", "pick_clean_then_place_in_recep"
    games = {
        "train": [(simple, 0), (simple, 1), (simple, 2), (simple, 3), (clean, 0), (clean, 1)],
        "valid_seen": [(simple, 4)],
        "valid_unseen": [(clean, 2)],
    }
    return {
        split: sorted(
            (make_game(root, split, task_type, variant, 40 + variant) for task_type, variant in jobs),
            key=lambda row: row["metadata"]["game_file"],
        )
        for split, jobs in games.items()
    }


class OneEngine(LocalPool):
    """The same engine for every borrower: each new one would map 33 MB."""

    def __init__(self, root: Path) -> None:
        engine = AlfworldEnvironment(str(root))
        self._make = lambda: engine


@pytest.fixture(scope="module")
def pool(root, rows) -> OneEngine:
    return OneEngine(root)


@pytest.fixture
def in_process(pool, monkeypatch):
    """Without worker processes, whose start takes seconds."""

    def check_tasks(config, tasks, goal, processes):
        return [check(pool, task, config.tcod_horizon) for task in tasks]

    monkeypatch.setattr(prepare_alfworld, "check_tasks", check_tasks)


def check(pool: OneEngine, task: Task, horizon: int = HORIZON) -> Checked:
    return asyncio.run(check_task(pool, AlfworldEnvironment, task, horizon, prepare_alfworld.goal))


def prepare(root: Path, out: Path, demos: list[str], horizon: int = HORIZON) -> None:
    config = TcodConfig(tcod_variant="opd", tcod_horizon=horizon, tcod_data_root=str(root))
    prepare_alfworld.prepare(Namespace(out=out, demos=demos, processes=1), config)


def replay(pool: OneEngine, row: dict, demo: dict, horizon: int = HORIZON) -> Demonstration:
    async def main():
        async with pool.borrow() as engine:
            candidate = Candidate("a", Demonstration.of({"demo": demo}))
            task = Task("train", row["label"], without_demo(row)["metadata"])
            return await prepare_module.replay(engine, AlfworldEnvironment, task, candidate, horizon)

    return asyncio.run(main())


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def without_demo(row: dict) -> dict:
    return {**row, "metadata": {key: value for key, value in row["metadata"].items() if key != "demo"}}


def game_file(row: dict) -> str:
    return row["metadata"]["game_file"]


def actions(row: dict) -> list[str]:
    return list(row["metadata"]["demo"]["actions"])


def published(row: dict, actions: list[str]) -> dict:
    return {"game_file": FOREIGN + game_file(row), "target": "", "actions": actions}


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_download_and_its_walkthroughs_are_enough(root, rows, tmp_path):
    command = [sys.executable, "-m", prepare_alfworld.__name__, "--out", str(tmp_path / "out"), "--processes", "2"]
    env = {**os.environ, "ALFWORLD_DATA": str(root)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out/train.jsonl") == rows["train"]
    for split in ("valid_seen", "valid_unseen"):
        assert read(tmp_path / f"out/{split}.jsonl") == [without_demo(row) for row in rows[split]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "train.jsonl",
        "valid_seen.jsonl",
        "valid_unseen.jsonl",
    ]
    lengths = sorted(len(actions(row)) for row in rows["train"])
    assert "nothing is left out" in done.stdout and "walkthrough 6" in done.stdout
    assert f"{lengths[0]:>14}" in done.stdout.splitlines()[-3] and f"{lengths[-1]:>14}" in done.stdout.splitlines()[-3]
    assert "8/8" in done.stderr  # the progress bar


def test_a_published_list_is_rebased_replayed_and_completed(in_process, root, rows, tmp_path, capsys):
    never, broken, longer, shorter, good, unlisted = rows["train"]
    put = actions(broken)[:-1] + [actions(broken)[-1].replace("move", "put").replace(" to ", " in/on ")]
    train = write(
        tmp_path / "train_expert.jsonl",
        [
            published(never, []),
            published(broken, put),
            published(longer, actions(longer) + ["look"]),
            published(shorter, actions(shorter)[:-1]),
            published(good, ["look", *actions(good)]),
            published(good, actions(good)),
            {"game_file": FOREIGN + GAME, "target": "", "actions": ["look"]},
        ],
    )
    seen = write(tmp_path / "test.jsonl", [{"game_file": FOREIGN + game_file(rows["valid_seen"][0]), "target": ""}])

    prepare(root, tmp_path / "a", [str(train), str(seen)], HORIZON)
    assert [game_file(row) for row in read(tmp_path / "a/train.jsonl")] == [game_file(good)]
    assert actions(read(tmp_path / "a/train.jsonl")[0]) == ["look", *actions(good)]
    assert read(tmp_path / "a/hard.jsonl") == [without_demo(never)]
    left_out = [
        (line["task"]["game_file"], line["source"], line["reason"]) for line in read(tmp_path / "a/left_out.jsonl")
    ]
    assert sorted(left_out) == sorted(
        [
            (game_file(good), str(train), "duplicate"),
            (GAME, str(train), "missing"),
            (game_file(broken), str(train), "demo_inadmissible"),
            (game_file(longer), str(train), "demo_won_early"),
            (game_file(shorter), str(train), "demo_not_won"),
            *((game_file(row), "", "no demonstration") for row in (broken, longer, shorter, unlisted)),
        ]
    )
    out = capsys.readouterr().out
    assert "this ALFWorld says 'move X to Y'" in out and "4 tasks: no demonstration" in out

    # Another source steps in where the first has nothing usable; what the first calls unsolved stays so.
    prepare(root, tmp_path / "a", [str(train), "walkthrough"], HORIZON)
    assert [game_file(row) for row in read(tmp_path / "a/train.jsonl")] == [
        game_file(row) for row in rows["train"][1:]
    ]
    assert read(tmp_path / "a/hard.jsonl") == [without_demo(never)]
    reasons = [line["reason"] for line in read(tmp_path / "a/left_out.jsonl")]
    assert sorted(reasons) == ["demo_inadmissible", "demo_not_won", "demo_won_early", "duplicate", "missing"]
    assert "walkthrough 4" in capsys.readouterr().out


@pytest.mark.parametrize("horizon, demos, reason", [(2, ["walkthrough"], "demo_too_long"), (HORIZON, None, "missing")])
def test_a_set_that_cannot_train_is_refused(in_process, root, rows, tmp_path, horizon, demos, reason):
    nothing = write(tmp_path / "list.jsonl", [{"game_file": FOREIGN + GAME, "actions": ["look"]}])
    with pytest.raises(
        ConfigError, match="no training task has a usable demonstration: see .*left_out.jsonl"
    ) as error:
        prepare(root, tmp_path / "out", demos or [str(nothing)], horizon)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["left_out.jsonl"]
    assert reason in {line["reason"] for line in read(tmp_path / "out/left_out.jsonl")}


# ----------------------------------------------------------------------------------------------------- single games


def test_what_the_engine_cannot_play_is_left_out(pool, root, rows):
    def reason(task: str, content: str) -> str:
        name = f"json_2.1.1/train/{task}/trial_T1/game.tw-pddl"
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(content)
        checked = check(pool, make_task(root, name, ["walkthrough"], {}))
        (root / name).unlink()
        assert not checked.playable and checked.source is None
        [left_out] = checked.left_out
        assert left_out.source == "" and "\n" not in left_out.detail
        return left_out.reason

    game = json.loads((root / game_file(rows["train"][0])).read_text())
    assert reason("pick_and_place_with_movable_recep-Pen-Mug-Desk-1", json.dumps(game)) == "unsupported"
    assert reason("pick_and_place_simple-AppleSliced-None-Desk-1", json.dumps(game)) == "unsupported"
    assert reason("pick_and_place_simple-A-None-B-1", json.dumps({**game, "solvable": False})) == "unsolvable"
    assert reason("pick_and_place_simple-A-None-B-2", json.dumps(game)[:5000]) == "damaged"
    assert reason("pick_and_place_simple-A-None-B-3", json.dumps({**game, "pddl_problem": "(define"})) == "env_error"
    twice = game["pddl_problem"].replace("agent1 - agent", "agent1 - agent\n agent1 - agent")
    # ALFWorld's translator calls sys.exit on an object that is declared twice.
    assert reason("pick_and_place_simple-A-None-B-4", json.dumps({**game, "pddl_problem": twice})) == "env_error"


def test_games_of_an_old_alfworld_are_refused(root, rows):
    row = rows["train"][0]
    game = json.loads((root / game_file(row)).read_text())
    name = game_file(row).replace("trial_", "trial_old_")
    (root / name).parent.mkdir()
    old = game["grammar"].replace("move {o} to {r}", "put {o} in/on {r}")
    (root / name).write_text(json.dumps({**game, "grammar": old}))
    with pytest.raises(ConfigError, match="before 0.4, .* replace the games with alfworld-download -f"):
        make_task(root, name, ["walkthrough"], {})
    (root / name).unlink()


def test_a_game_without_a_walkthrough_has_no_such_demonstration(pool, root, rows):
    row = rows["train"][0]
    game = json.loads((root / game_file(row)).read_text())
    name = game_file(row).replace("trial_", "trial_without_")
    (root / name).parent.mkdir()
    (root / name).write_text(json.dumps({**game, "walkthrough": None}))
    listed = {"b": {name: Demonstration(tuple(actions(row)))}}
    checked = check(pool, make_task(root, name, ["walkthrough", "b"], listed))
    (root / name).unlink()
    assert checked.source == "b" and list(checked.demo.actions) == actions(row)
    assert [entry.reason for entry in checked.left_out] == ["no walkthrough"]


def test_recorded_responses_must_give_their_actions(pool, rows):
    row = rows["train"][0]
    said = [f"Now I {action}. <action>{action}</action>" for action in actions(row)]
    replay(pool, row, {"actions": actions(row), "responses": said})
    for responses in (said[:-1], ["<action>look</action>", *said[1:]], [actions(row)[0], *said[1:]]):
        with pytest.raises(Failure) as error:
            replay(pool, row, {"actions": actions(row), "responses": responses})
        assert error.value.reason == "demo_mismatch"


def test_the_horizon_bounds_a_demonstration(pool, rows):
    row = rows["train"][0]
    replay(pool, row, {"actions": actions(row)}, len(actions(row)))
    with pytest.raises(Failure, match="the horizon is"):
        replay(pool, row, {"actions": actions(row)}, len(actions(row)) - 1)


def test_what_comes_after_the_success_is_cut_off_on_request(pool, rows):
    row = rows["train"][0]
    long = Task("train", "t", without_demo(row)["metadata"])
    for cut, kept in ((False, None), (True, actions(row))):
        candidate = Candidate("gold", Demonstration((*actions(row), "look", "look")), cut)
        checked = check(pool, replace(long, candidates=[candidate]))
        assert (checked.demo and list(checked.demo.actions)) == kept


# ---------------------------------------------------------------------------------------------------------- sources


def test_rows_of_this_recipe_are_a_source_too(tmp_path):
    metadata = {"game_file": GAME, "task_type": "t", "demo": {"actions": [" go  to desk 1"], "responses": ["x"]}}
    other = GAME.replace("T1", "T2")
    file = write(
        tmp_path / "demos.jsonl",
        [{"prompt": "p", "label": "t", "metadata": metadata}, {"prompt": "p", "metadata": {"game_file": other}}],
    )
    demos, repeated = read_source(str(file))
    assert demos == {GAME: Demonstration(("go to desk 1",), ("x",))} and not repeated


@pytest.mark.parametrize(
    "path", ["game.tw-pddl", GAME.replace("train", "test"), GAME + "x", GAME.replace("json", "j")]
)
def test_only_paths_of_games_are_rebased(path):
    assert rebase(FOREIGN + GAME) == rebase(GAME) == GAME
    with pytest.raises(ValueError, match="does not end in json_2.1.1/SPLIT/TASK/TRIAL/game.tw-pddl"):
        rebase(path)


@pytest.mark.parametrize(
    "line",
    ['{"game_file": ', "[]", "{}", '{"game_file": 3}', json.dumps({"game_file": GAME, "actions": [1]})]
    + [json.dumps({"game_file": GAME, "actions": None}), json.dumps({"metadata": {"game_file": "x"}})],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line):
    file = write(tmp_path / "list.jsonl", [{"game_file": GAME, "actions": ["look"]}, line])
    with pytest.raises(ConfigError, match=f"^line 2 of {file} is no row") as error:
        read_source(str(file))
    assert "\n" not in str(error.value)


def test_missing_files_are_named_with_the_fix(root, rows, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no games below .*/json_2.1.1/train: run alfworld-download"):
        prepare(tmp_path, tmp_path / "out", ["walkthrough"])
    with pytest.raises(ConfigError, match="--demos nowhere.jsonl cannot be read"):
        prepare(root, tmp_path / "out", ["nowhere.jsonl"])
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["prepare_alfworld.py", "--out", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"tcod_data_root is \$ALFWORLD_DATA, but that variable is not set: export it"
    ):
        prepare_alfworld.main()
