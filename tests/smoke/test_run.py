"""What a smoke run plays, what its files are called, and what it says at its end."""

import random
from argparse import Namespace

import pytest

from examples.tcod.settings.config import TcodConfig
from examples.tcod.tools.common.jsonl import read_rows
from smoke import plays, run, servers, train_arm

ROW = '{"prompt": "x", "label": "x", "metadata": {"goal": 1, "demo": {"actions": ["right"]}}}\n'
SETTINGS = "tcod_horizon: 4\ntcod_environment: tests.support.toys.Corridor\ntcod_variant: opd\n"


@pytest.fixture
def play(tmp_path, monkeypatch):
    """play(**options) -> the options and what they choose; no games are made and no tool is run."""
    monkeypatch.setattr(plays, "make_games", lambda *args, **kwargs: None)
    monkeypatch.setattr(plays.subprocess, "run", lambda command, check: None)
    monkeypatch.setattr(plays.shutil, "which", lambda name: name)
    for folder in ("out/data/alfworld", "out/data/scienceworld", "out/data/sqlite", "mine", "other"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("train", "dev", "heldout"):
            (tmp_path / folder / f"{name}.jsonl").write_text(ROW)

    def choose(config=None, data=None, **given):
        paths = {"out": tmp_path / "out", "config": config, "data": data and tmp_path / data}
        options = {"environment": "alfworld", "thoughts": False, "variant": None, "seed": 1}
        options = Namespace(**options | paths | given, train_games=4, heldout_games=2)
        return options, plays.choose(options)

    return choose


def test_no_two_plays_share_a_file_and_each_says_what_was_run(play, tmp_path):
    (config := tmp_path / "env.yaml").write_text(SETTINGS)
    chosen = [
        play(),
        play(thoughts=True),
        play(environment="scienceworld"),
        play(environment="sqlite"),
        play(config, "mine"),
        play(config, "other"),
    ]
    folders = [run.run_dir(*one, arm).name for one in chosen for arm in one[1].arms]
    assert folders[:2] == ["alfworld-f2b-1", "alfworld-b2f-1"] and folders[-2:] == [
        "env-mine-opd-1",
        "env-other-opd-1",
    ]
    assert len(set(folders)) == len(folders) == 10
    lines = [{"kind": "eval", "n": n, run.SUCCESS: n / 8, run.KL: 9.0 - n} for n in (0, 4)]
    said = [run.summary({"opd": lines}, one) for _, one in chosen]
    assert said[0].startswith(
        "alfworld, recovery of a perturbed teacher: OPD, 4 updates: held-out success 0.00 -> 0.50"
    )
    assert not any("recovery" in text for text in said[2:])
    assert list(play(config, "mine", variant=["f2b", "reopd"])[1].arms) == ["f2b", "reopd"]


def test_a_mixed_play_has_rows_and_settings_of_each_environment(play):
    _, mixed = play(environment="mixed", variant=["b2f"])
    config = TcodConfig.from_mapping(mixed.arms["b2f"], "mixed")
    for split in ("train", "heldout"):
        rows = read_rows(mixed.data / f"{split}.jsonl")
        assert [row.metadata["environment"] for row in rows] == ["alfworld", "sqlite", "scienceworld"]
        of_each = [config.for_row(row.metadata) for row in rows]
        assert [one.tcod_horizon for one in of_each] == [20, 6, 10]
        assert [one.tcod_tool_parser for one in of_each] == [None, "qwen", None]
        assert [bool(one.tcod_data_root) for one in of_each] == [True, True, False]


@pytest.fixture
def flags(tmp_path):
    """flags(arm, more options) -> slime's arguments of an arm of the smoke run."""

    def read(arm, *more):
        given = ["--config", str(plays.write_settings(tmp_path / "tcod.yaml", arm)), "--student", "s", "--data", "d"]
        given += ["--student-port", "1", "--teacher-port", "2", "--run-dir", "r"]
        return train_arm.run_flags(train_arm.option_parser().parse_args([*given, *more]))

    return read


@pytest.mark.parametrize("thoughts", [False, True])
def test_the_models_think_where_the_settings_say_so(play, flags, thoughts):
    for arm in play(thoughts=thoughts)[1].arms.values():
        assert flags(arm)["apply_chat_template_kwargs"] == {"enable_thinking": thoughts}


def test_without_a_teacher_none_is_asked_whatever_the_reward(play, flags):
    """With no reward either, the recipe's own check refuses the run."""
    arm = play()[1].arms["f2b"]
    assert flags(arm, "--no-teacher")["use_opd"] is False and flags(arm)["use_opd"] is True


def test_runs_with_the_same_seed_have_ports_of_their_own():
    chosen = []
    for _ in range(2):
        random.seed(1)
        chosen.append([servers.free_port() for _ in range(8)])
    assert chosen[0] != chosen[1]
