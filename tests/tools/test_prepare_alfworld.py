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
from examples.tcod.settings.build import text_side_factory
from examples.tcod.settings.config import TcodConfig
from examples.tcod.tools import prepare_alfworld
from examples.tcod.tools.common.prepare import Task, check_task, write_sets
from examples.tcod.tools.prepare_alfworld import make_task, read_source, rebase
from smoke.make_games import make_game
from tests.support.toys import LocalPool

NUM_GPUS = 0
HORIZON = 12
FOREIGN = "/somewhere/else/alfworld/"
GAME = "json_2.1.1/train/pick_and_place_simple-Mug-None-Desk-308/trial_T1/game.tw-pddl"


SIMPLE, CLEAN = "pick_and_place_simple", "pick_clean_then_place_in_recep"


class Games(LocalPool):
    """Games in the layout of alfworld-download, and one engine for all of them: each new one would map 33 MB.

    train, seen and unseen are the rows that the generator makes of them.
    """

    def __init__(self, root: Path) -> None:
        self.root, engine = root, AlfworldEnvironment(str(root))
        self._make = lambda: engine
        train = [*((SIMPLE, variant) for variant in range(4)), (CLEAN, 0), (CLEAN, 1)]
        self.train = sorted((self._row("train", *one) for one in train), key=game_file)
        self.seen, self.unseen = [self._row("valid_seen", SIMPLE, 4)], [self._row("valid_unseen", CLEAN, 2)]

    def _row(self, split: str, task_type: str, variant: int) -> dict:
        return make_game(self.root, split, task_type, variant, 40 + variant)

    def check(self, task: Task, horizon: int = HORIZON) -> Task:
        side = text_side_factory(TcodConfig(tcod_variant="opd", tcod_horizon=horizon))(task.metadata)
        asyncio.run(check_task(self, side, task, horizon))
        return task

    def prepare(self, out: Path, *demos: str, horizon: int = HORIZON, root: Path | None = None) -> None:
        """What the tool does, without worker processes, whose start takes seconds."""
        config = TcodConfig(tcod_variant="opd", tcod_horizon=horizon, tcod_data_root=str(root or self.root))
        tasks = prepare_alfworld.find_tasks(Namespace(demos=demos), config)
        write_sets(out, [self.check(task, horizon) for task in tasks])

    def answered(self, row: dict) -> dict:
        """A row whose demonstration has the engine's answers, too."""
        engine = self._make()
        seen = [engine.reset(row["metadata"]), *map(engine.step, actions(row))]
        demo = {"actions": actions(row), "observations": [one.text for one in seen[1:]]}
        demo["seen"] = [{"text": one.text, "admissible": list(one.admissible)} for one in seen[:-1]]
        return {**row, "metadata": {**row["metadata"], "demo": demo}}


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Games:
    return Games(tmp_path_factory.mktemp("alfworld"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *lines: dict | str) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return str(path)


def without_demo(row: dict) -> dict:
    return {**row, "metadata": {key: value for key, value in row["metadata"].items() if key != "demo"}}


def game_file(row: dict) -> str:
    return row["metadata"]["game_file"]


def actions(row: dict) -> list[str]:
    return list(row["metadata"]["demo"]["actions"])


def published(row: dict, actions: list[str]) -> dict:
    return {"game_file": FOREIGN + game_file(row), "target": "", "actions": actions}


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_download_and_its_walkthroughs_are_enough(games, tmp_path, capsys):
    games.prepare(tmp_path, "walkthrough")
    assert read(tmp_path / "train.jsonl") == [games.answered(row) for row in games.train]
    assert read(tmp_path / "valid_seen.jsonl") == [*map(without_demo, games.seen)]
    assert read(tmp_path / "valid_unseen.jsonl") == [*map(without_demo, games.unseen)]
    assert {path.stem for path in tmp_path.iterdir()} == {"train", "valid_seen", "valid_unseen"}
    lengths, said = sorted(len(actions(row)) for row in games.train), capsys.readouterr().out
    assert "nothing is left out" in said and "walkthrough 6" in said
    [counts] = [line.split()[1:] for line in said.splitlines() if line.startswith("all ")]
    assert counts[:5] == ["6", "1", "1", "0", f"{lengths[0]}"] and counts[-1] == f"{lengths[-1]}"


def test_a_published_list_is_rebased_replayed_and_completed(games, tmp_path, capsys):
    never, broken, longer, shorter, good, unlisted = games.train
    train = write(
        tmp_path / "train_expert.jsonl",
        published(never, []),
        published(broken, ["put mug 1 in/on desk 1"]),
        published(longer, actions(longer) + ["look"]),
        published(shorter, actions(shorter)[:-1]),
        published(good, ["look", *actions(good)]),
        published(good, actions(good)),
        {"game_file": FOREIGN + GAME, "target": "", "actions": ["look"]},
    )
    seen = write(tmp_path / "test.jsonl", {"game_file": FOREIGN + game_file(games.seen[0]), "target": ""})

    games.prepare(tmp_path / "a", train, seen)
    assert [game_file(row) for row in read(tmp_path / "a/train.jsonl")] == [game_file(good)]
    assert actions(read(tmp_path / "a/train.jsonl")[0]) == ["look", *actions(good)]
    assert read(tmp_path / "a/hard.jsonl") == [without_demo(never)]
    left_out = read(tmp_path / "a/left_out.jsonl")
    assert {(line["task"]["game_file"], line["source"], line["reason"]) for line in left_out} == {
        (game_file(good), train, "duplicate"),
        (GAME, train, "missing"),
        (game_file(broken), train, "demo_inadmissible"),
        (game_file(longer), train, "demo_won_early"),
        (game_file(shorter), train, "demo_not_won"),
        *((game_file(row), "", "no demonstration") for row in (broken, longer, shorter, unlisted)),
    }
    out = capsys.readouterr().out
    assert "and this ALFWorld 'move X to Y'" in out and "4 tasks: no demonstration" in out

    # Another source steps in where the first has nothing usable; what the first calls unsolved stays so.
    games.prepare(tmp_path / "a", train, "walkthrough")
    assert [*map(game_file, read(tmp_path / "a/train.jsonl"))] == [*map(game_file, games.train[1:])]
    assert read(tmp_path / "a/hard.jsonl") == [without_demo(never)]
    reasons = [line["reason"] for line in read(tmp_path / "a/left_out.jsonl")]
    assert sorted(reasons) == ["demo_inadmissible", "demo_not_won", "demo_won_early", "duplicate", "missing"]
    assert "walkthrough 4" in capsys.readouterr().out


def test_a_set_that_cannot_train_is_refused(games, tmp_path):
    with pytest.raises(ConfigError, match="no task is left for train: see .*left_out.jsonl, raise tcod_horizon, or"):
        games.prepare(tmp_path, "walkthrough", horizon=2)
    assert [path.name for path in tmp_path.iterdir()] == ["left_out.jsonl"]
    assert "demo_too_long" in {line["reason"] for line in read(tmp_path / "left_out.jsonl")}


# ----------------------------------------------------------------------------------------------------- single games


@pytest.fixture
def changed(games):
    """changed(**changes, task=..) -> the name of a copy of the first game with these changes."""
    original, made = games.root / game_file(games.train[0]), []

    def make(task: str = "pick_and_place_simple-A-None-B-1", length: int | None = None, **changes) -> str:
        made.append(games.root / f"json_2.1.1/train/{task}/trial_T1/game.tw-pddl")
        made[-1].parent.mkdir(parents=True)
        game = json.loads(original.read_text())
        changes = {name: change(game[name]) if callable(change) else change for name, change in changes.items()}
        made[-1].write_text(json.dumps(game | changes)[:length])
        return made[-1].relative_to(games.root).as_posix()

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
        # ALFWorld's translator calls sys.exit on such an object.
        (
            {"pddl_problem": lambda text: text.replace("agent1 - agent", "agent1 - agent\n agent1 - agent")},
            "env_error",
        ),
    ],
)
def test_what_the_engine_cannot_play_is_left_out(games, changed, changes, reason):
    task = games.check(make_task(games.root, changed(**changes), ["walkthrough"], {}))
    [left_out] = task.left_out
    assert task.set is None and (left_out["reason"], left_out["source"]) == (reason, "")
    assert "\n" not in left_out["detail"]


def test_games_of_an_old_alfworld_are_refused(games, changed):
    name = changed(grammar=lambda text: text.replace("move {o} to {r}", "put {o} in/on {r}"))
    with pytest.raises(ConfigError, match="before 0.4, .* replace the games with alfworld-download -f"):
        make_task(games.root, name, ["walkthrough"], {})


def test_a_game_without_a_walkthrough_has_no_such_demonstration(games, changed):
    name, right = changed(walkthrough=None), tuple(actions(games.train[0]))
    task = games.check(make_task(games.root, name, ["walkthrough", "b"], {"b": {name: Demonstration(right)}}))
    assert task.source == "b" and task.demo.actions == right
    assert [line["reason"] for line in task.left_out] == ["no walkthrough"]


def test_a_demonstration_gives_its_actions_within_the_horizon_and_wins_by_the_last(games):
    row = without_demo(games.train[0])
    right = tuple(actions(games.train[0]))
    said = [f"Now I {action}. <action>{action}</action>" for action in right]
    ids, after = [[n] for n in range(len(right) + 2)], ("look", "look")
    longer = Demonstration(right + after, [*said, "<action>look</action>", "look"], ids, "v")
    played = games.answered(games.train[0])["metadata"]["demo"]
    answers = tuple(played["observations"])
    seen = tuple({**one, "admissible": tuple(one["admissible"])} for one in played["seen"])
    kept = Demonstration(right, said, ids[:-2], "v", answers, seen)
    for demo, cut, horizon, result in (
        (kept, False, len(right), kept),
        (kept, False, len(right) - 1, "demo_too_long"),
        (Demonstration(right, said[:-1]), True, HORIZON, "demo_mismatch"),
        (Demonstration(right, ["<action>look</action>", *said[1:]]), False, HORIZON, "demo_mismatch"),
        (Demonstration(("jump", *right)), False, HORIZON, "demo_inadmissible"),
        (longer, False, HORIZON, "demo_won_early"),
        (longer, True, len(right), kept),  # all of its parts are cut at the success
        (longer, True, len(right) - 1, "demo_too_long"),
        (Demonstration(right + after), True, len(right), Demonstration(right, observations=answers, seen=seen)),
        (Demonstration(right, observations=answers[::-1]), False, HORIZON, "demo_mismatch"),
        (Demonstration(right, observations=answers[1:]), False, HORIZON, "demo_mismatch"),
    ):
        task = games.check(Task("train", "t", row["metadata"], [("a", demo)], cut), horizon)
        assert (task.demo if task.set else task.left_out[0]["reason"]) == result


# ---------------------------------------------------------------------------------------------------------- sources


def test_rows_of_this_recipe_are_a_source_too(tmp_path):
    metadata = {"game_file": GAME, "task_type": "t", "demo": {"actions": [" go  to desk 1"], "responses": ["x"]}}
    named = {"prompt": "p", "metadata": {"game_file": FOREIGN + GAME.replace("T1", "T2")}}
    file = write(tmp_path / "demos.jsonl", "", {"prompt": "a\u2028b", "label": "t", "metadata": metadata}, named)
    demo, second = Demonstration(("go to desk 1",), ["x"]), GAME.replace("T1", "T2")
    assert [*read_source(file)] == [(2, GAME, demo), (3, second, None)]


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
    file = write(tmp_path / "list.jsonl", {"game_file": GAME, "actions": ["look"]}, line)
    with pytest.raises(ConfigError, match=f"^line 2 of {file} (has no game_file and|is no JSON object)") as error:
        list(read_source(file))
    assert "\n" not in str(error.value) and "Error" not in str(error.value)


def test_missing_files_are_named_with_the_fix(games, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no games below .*/json_2.1.1/train: run alfworld-download"):
        games.prepare(tmp_path / "out", "walkthrough", root=tmp_path)
    with pytest.raises(ConfigError, match="^nowhere.jsonl cannot be read .*: name a JSONL file"):
        games.prepare(tmp_path / "out", "nowhere.jsonl")
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
