"""prepare_alfworld.py on real games in the layout of alfworld-download."""

import asyncio
import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from examples.tcod import ConfigError
from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.episode.demonstration import Demonstration
from examples.tcod.settings.build import text_side_of
from examples.tcod.settings.config import TcodConfig
from examples.tcod.tools import prepare_alfworld
from examples.tcod.tools.common.prepare import Task, check_task
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
        for task in tasks:
            check(pool, task, config.tcod_horizon)

    monkeypatch.setattr(prepare_alfworld, "check_tasks", check_tasks)


def check(pool: OneEngine, task: Task, horizon: int = HORIZON) -> Task:
    side = text_side_of(TcodConfig(tcod_variant="opd", tcod_horizon=horizon))(task.metadata)
    asyncio.run(check_task(pool, side, task, horizon, prepare_alfworld.goal))
    return task


def prepare(root: Path, out: Path, demos: list[str], horizon: int = HORIZON) -> None:
    config = TcodConfig(tcod_variant="opd", tcod_horizon=horizon, tcod_data_root=str(root))
    prepare_alfworld.prepare(Namespace(out=out, demos=demos, processes=1), config)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, lines: list) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    )
    return path


def without_demo(row: dict) -> dict:
    return {**row, "metadata": {key: value for key, value in row["metadata"].items() if key != "demo"}}


def game_file(row: dict) -> str:
    return row["metadata"]["game_file"]


def actions(row: dict) -> list[str]:
    return list(row["metadata"]["demo"]["actions"])


def answered(pool: OneEngine, row: dict) -> dict:
    """A row whose demonstration has the engine's answers, too."""
    engine = pool._make()
    seen = [engine.reset(row["metadata"]), *map(engine.step, actions(row))]
    demo = {"actions": actions(row), "observations": [one.text for one in seen[1:]]}
    demo["seen"] = [{"text": one.text, "admissible": list(one.admissible)} for one in seen[:-1]]
    return {**row, "metadata": {**row["metadata"], "demo": demo}}


def published(row: dict, actions: list[str]) -> dict:
    return {"game_file": FOREIGN + game_file(row), "target": "", "actions": actions}


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_download_and_its_walkthroughs_are_enough(in_process, pool, root, rows, tmp_path, capsys):
    prepare(root, tmp_path, ["walkthrough"])
    assert read(tmp_path / "train.jsonl") == [answered(pool, row) for row in rows["train"]]
    for split in ("valid_seen", "valid_unseen"):
        assert read(tmp_path / f"{split}.jsonl") == [without_demo(row) for row in rows[split]]
    assert {path.stem for path in tmp_path.iterdir()} == {"train", "valid_seen", "valid_unseen"}
    lengths, said = sorted(len(actions(row)) for row in rows["train"]), capsys.readouterr().out
    assert "nothing is left out" in said and "walkthrough 6" in said
    [counts] = [line.split()[1:] for line in said.splitlines() if line.startswith("all ")]
    assert counts[:5] == ["6", "1", "1", "0", f"{lengths[0]}"] and counts[-1] == f"{lengths[-1]}"


def test_a_published_list_is_rebased_replayed_and_completed(in_process, root, rows, tmp_path, capsys):
    never, broken, longer, shorter, good, unlisted = rows["train"]
    put = actions(broken)[:-1] + [actions(broken)[-1].replace("move", "put").replace(" to ", " in/on ")]
    lines = [
        published(never, []),
        published(broken, put),
        published(longer, actions(longer) + ["look"]),
        published(shorter, actions(shorter)[:-1]),
        published(good, ["look", *actions(good)]),
        published(good, actions(good)),
        {"game_file": FOREIGN + GAME, "target": "", "actions": ["look"]},
    ]
    train = write(tmp_path / "train_expert.jsonl", lines)
    seen = write(tmp_path / "test.jsonl", [{"game_file": FOREIGN + game_file(rows["valid_seen"][0]), "target": ""}])

    prepare(root, tmp_path / "a", [str(train), str(seen)], HORIZON)
    assert [game_file(row) for row in read(tmp_path / "a/train.jsonl")] == [game_file(good)]
    assert actions(read(tmp_path / "a/train.jsonl")[0]) == ["look", *actions(good)]
    assert read(tmp_path / "a/hard.jsonl") == [without_demo(never)]
    left_out = read(tmp_path / "a/left_out.jsonl")
    assert {(line["task"]["game_file"], line["source"], line["reason"]) for line in left_out} == {
        (game_file(good), str(train), "duplicate"),
        (GAME, str(train), "missing"),
        (game_file(broken), str(train), "demo_inadmissible"),
        (game_file(longer), str(train), "demo_won_early"),
        (game_file(shorter), str(train), "demo_not_won"),
        *((game_file(row), "", "no demonstration") for row in (broken, longer, shorter, unlisted)),
    }
    out = capsys.readouterr().out
    assert "this ALFWorld says 'move X to Y'" in out and "4 tasks: no demonstration" in out

    # Another source steps in where the first has nothing usable; what the first calls unsolved stays so.
    prepare(root, tmp_path / "a", [str(train), "walkthrough"], HORIZON)
    assert [*map(game_file, read(tmp_path / "a/train.jsonl"))] == [*map(game_file, rows["train"][1:])]
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


@pytest.fixture
def changed(root, rows):
    """changed(**changes, task=..) -> the name of a copy of the first game with these changes."""
    original, made = root / game_file(rows["train"][0]), []

    def make(task: str = "pick_and_place_simple-A-None-B-1", length: int | None = None, **changes) -> str:
        made.append(root / f"json_2.1.1/train/{task}/trial_T1/game.tw-pddl")
        made[-1].parent.mkdir(parents=True)
        made[-1].write_text(json.dumps({**json.loads(original.read_text()), **changes})[:length])
        return made[-1].relative_to(root).as_posix()

    yield make
    for path in made:
        shutil.rmtree(path.parents[1])


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"task": "pick_and_place_with_movable_recep-Pen-Mug-Desk-1"}, "unsupported"),
        ({"task": "pick_and_place_simple-AppleSliced-None-Desk-1"}, "unsupported"),
        ({"solvable": False}, "unsolvable"),
        ({"length": 5000}, "damaged"),
        ({"pddl_problem": "(define"}, "env_error"),
        ({"pddl_problem": "twice"}, "env_error"),
    ],
)
def test_what_the_engine_cannot_play_is_left_out(pool, root, rows, changed, changes, reason):
    if changes.get("pddl_problem") == "twice":  # ALFWorld's translator calls sys.exit on such an object
        problem = json.loads((root / game_file(rows["train"][0])).read_text())["pddl_problem"]
        changes = {"pddl_problem": problem.replace("agent1 - agent", "agent1 - agent\n agent1 - agent")}
    task = check(pool, make_task(root, changed(**changes), ["walkthrough"], {}))
    [left_out] = task.left_out
    assert task.set is None and (left_out["reason"], left_out["source"]) == (reason, "")
    assert "\n" not in left_out["detail"]


def test_games_of_an_old_alfworld_are_refused(root, changed):
    grammar = json.loads((root / changed()).read_text())["grammar"].replace("move {o} to {r}", "put {o} in/on {r}")
    with pytest.raises(ConfigError, match="before 0.4, .* replace the games with alfworld-download -f"):
        make_task(root, changed(task="pick_and_place_simple-B-None-B-1", grammar=grammar), ["walkthrough"], {})


def test_a_game_without_a_walkthrough_has_no_such_demonstration(pool, root, rows, changed):
    name = changed(walkthrough=None)
    listed = {"b": {name: Demonstration(tuple(actions(rows["train"][0])))}}
    task = check(pool, make_task(root, name, ["walkthrough", "b"], listed))
    assert task.source == "b" and list(task.demo.actions) == actions(rows["train"][0])
    assert [line["reason"] for line in task.left_out] == ["no walkthrough"]


def test_a_demonstration_gives_its_actions_within_the_horizon_and_wins_by_the_last(pool, rows):
    row = without_demo(rows["train"][0])
    right = tuple(actions(rows["train"][0]))
    said = [f"Now I {action}. <action>{action}</action>" for action in right]
    ids, after = [[n] for n in range(len(right) + 2)], ("look", "look")
    longer = Demonstration(right + after, [*said, "<action>look</action>", "look"], ids, "v")
    played = answered(pool, rows["train"][0])["metadata"]["demo"]
    answers, seen = tuple(played["observations"]), tuple(
        {**one, "admissible": (*one["admissible"],)} for one in played["seen"]
    )
    kept = Demonstration(right, said, ids[:-2], "v", answers, seen)
    for demo, cut, horizon, result in (
        (kept, False, len(right), kept),
        (kept, False, len(right) - 1, "demo_too_long"),
        (Demonstration(right, said[:-1]), True, HORIZON, "demo_mismatch"),
        (Demonstration(right, ["<action>look</action>", *said[1:]]), False, HORIZON, "demo_mismatch"),
        (Demonstration(right, [right[0], *said[1:]]), False, HORIZON, "demo_mismatch"),
        (longer, False, HORIZON, "demo_won_early"),
        (longer, True, len(right), kept),  # all of its parts are cut at the success
        (Demonstration(right + after), True, len(right), Demonstration(right, observations=answers, seen=seen)),
        (Demonstration(right, observations=answers[::-1]), False, HORIZON, "demo_mismatch"),
        (Demonstration(right, observations=answers[1:]), False, HORIZON, "demo_mismatch"),
    ):
        task = check(pool, Task("train", "t", row["metadata"], [("a", demo)], cut), horizon)
        assert (task.demo if task.set else task.left_out[0]["reason"]) == result


# ---------------------------------------------------------------------------------------------------------- sources


def test_rows_of_this_recipe_are_a_source_too(tmp_path):
    metadata = {"game_file": GAME, "task_type": "t", "demo": {"actions": [" go  to desk 1"], "responses": ["x"]}}
    named = {"prompt": "p", "metadata": {"game_file": GAME.replace("T1", "T2")}}
    file = write(tmp_path / "demos.jsonl", ["", {"prompt": "a\u2028b", "label": "t", "metadata": metadata}, named])
    assert read_source(str(file)) == ({GAME: Demonstration(("go to desk 1",), ("x",))}, [])


def test_only_paths_of_games_are_rebased():
    assert rebase(FOREIGN + GAME) == rebase(GAME) == GAME
    for path in ("game.tw-pddl", GAME.replace("train", "test"), GAME + "x", GAME.replace("json", "j")):
        with pytest.raises(ValueError, match="does not end in json_2.1.1/SPLIT/TASK/TRIAL/game.tw-pddl"):
            rebase(path)


@pytest.mark.parametrize(
    "line",
    ['{"game_file": ', "[]", "{}", '{"game_file": 3}', json.dumps({"game_file": GAME, "actions": [1]})]
    + [json.dumps({"game_file": GAME, "actions": None}), json.dumps({"metadata": {"game_file": "x"}})],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line):
    file = write(tmp_path / "list.jsonl", [{"game_file": GAME, "actions": ["look"]}, line])
    with pytest.raises(ConfigError, match=f"^line 2 of {file} (has no game_file and|is no JSON object)") as error:
        read_source(str(file))
    assert "\n" not in str(error.value) and "Error" not in str(error.value)


def test_missing_files_are_named_with_the_fix(root, rows, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no games below .*/json_2.1.1/train: run alfworld-download"):
        prepare(tmp_path, tmp_path / "out", ["walkthrough"])
    with pytest.raises(ConfigError, match="^nowhere.jsonl cannot be read .*: name a JSONL file"):
        prepare(root, tmp_path / "out", ["nowhere.jsonl"])
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    (tmp_path / "file").touch()
    for out, says in (
        (tmp_path, r"tcod_data_root is \$ALFWORLD_DATA, but that variable is not set: export it or write the path"),
        (tmp_path / "file", "file cannot be written .File exists"),  # before the engines take their time
        (tmp_path / "file" / "out", "out cannot be written .Not a directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["prepare_alfworld.py", "--out", str(out)])
        with pytest.raises(SystemExit, match=says):
            prepare_alfworld.main()
