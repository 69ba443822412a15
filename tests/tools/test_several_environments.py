"""The tools, and the run script's, with a YAML of several environments."""

import json
import sys

import pytest
import yaml

from examples.tcod import ConfigError
from examples.tcod.settings import build
from examples.tcod.settings.config import TcodConfig
from examples.tcod.tools import check_environment, evaluate, show_rollouts
from examples.tcod.tools.common import prepare
from examples.tcod.tools.common.jsonl import read_rows
from examples.tcod.tools.launch import __main__ as launch
from examples.tcod.tools.launch import folder, preflight
from examples.tcod.tools.launch.variables import read_tcod, teacher_context
from tests.support.run_script import checkpoint
from tests.support.toys import LocalPool

CORRIDOR = {"tcod_environment": "tests.support.corridor.Corridor"}


def write(path, *rows):
    lines = [{"prompt": "walk", "label": "walk", "metadata": row} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def demo(actions):
    return {"demo": {"actions": ["right"] * actions}}


@pytest.fixture
def config(tmp_path):
    entries = {"far": {}, "near": {"tcod_horizon": 2, "tcod_data_root": "$NEAR"}}
    settings = {**CORRIDOR, "tcod_variant": "b2f", "tcod_horizon": 5, "tcod_environments": entries}
    path = tmp_path / "mixed.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(autouse=True)
def in_process(monkeypatch, tmp_path):
    monkeypatch.setenv("NEAR", str(tmp_path))
    monkeypatch.setattr(build, "EnvironmentPool", LocalPool)
    for module in (check_environment, prepare, preflight):
        monkeypatch.setattr(module, "start_ray", lambda workers: None)


def test_an_evaluation_plays_each_row_to_its_own_horizon(rig, config, tmp_path, capsys):
    rig.config = config
    rows = write(tmp_path / "rows.jsonl", *({"goal": 3, "environment": name} for name in ("far", "near")))
    rig.run(evaluate, rows, "result.json", "--save-episodes", str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(one["task"]["environment"], one["turns"], one["won"]) for one in result["episodes"]] == [
        ("far", 3, True),
        ("near", 2, False),
    ]
    assert [result["settings"]["environments"][name]["horizon"] for name in ("far", "near")] == [5, 2]
    [run] = show_rollouts.read_runs([tmp_path])
    assert {episode["environment"] for episode in run.episodes} == {"far", "near"}


def test_the_checker_plays_rows_of_each_and_records_them(config, tmp_path, monkeypatch, capsys):
    rows = [{"goal": goal, "environment": name, **demo(goal)} for name, goal in [("near", 1), ("far", 5), ("near", 2)]]
    options = ["--config", str(config), "--rows", str(write(tmp_path / "rows.jsonl", *rows))]
    monkeypatch.setattr(sys, "argv", ["check_environment", *options, "--record", str(tmp_path / "recorded.jsonl")])
    check_environment.main()
    said = capsys.readouterr().out
    assert "1 of 1 rows of far play, 1 demonstrations replay" in said
    assert "2 of 2 rows of near play, 2 demonstrations replay" in said
    recorded = {row.metadata["goal"]: row.metadata for row in read_rows(tmp_path / "recorded.jsonl")}
    assert {goal: one["environment"] for goal, one in recorded.items()} == {1: "near", 2: "near", 5: "far"}
    assert [len(one["demo"]["seen"]) for one in recorded.values()] == [
        len(one["demo"]["actions"]) for one in recorded.values()
    ]
    write(tmp_path / "rows.jsonl", rows[0], {"goal": 3, "environment": "near", **demo(3)})
    with pytest.raises(SystemExit, match=r"1 of 2 rows .*demo_too_long.* line 2 of .* 1 to 2 \(tcod_horizon\)"):
        check_environment.main()
    write(tmp_path / "rows.jsonl", rows[0], {"goal": 3})
    with pytest.raises(SystemExit, match="line 2 of .* cannot be played: its metadata.environment is None: name one"):
        check_environment.main()


def test_rows_are_prepared_for_one_of_them(config, tmp_path, monkeypatch):
    tasks = [
        prepare.Task("train", "walk", {"goal": goal}, [("steps", prepare.Demonstration(("right",) * goal))])
        for goal in (2, 3)
    ]

    def run(*more):
        options = ["--config", str(config), "--out", str(tmp_path / "out"), *more]
        parsed = prepare.option_parser("", "alfworld.yaml").parse_args(options)
        prepare.prepare("prepare", lambda options, config: tasks, parsed)

    for wrong in ((), ("--environment", "nearby")):
        with pytest.raises(SystemExit, match=r"--environment .* is not in .*mixed.yaml: name one of .*'far', 'near'"):
            run(*wrong)
    run("--environment", "near")
    [row] = read_rows(tmp_path / "out/train.jsonl")  # the other one is too long here
    assert (row.metadata["environment"], row.metadata["goal"]) == ("near", 2)
    config.write_text(yaml.safe_dump({**CORRIDOR, "tcod_horizon": 2}))
    with pytest.raises(SystemExit, match=r"--environment near is not in .*: name one of \[None\]"):
        run("--environment", "near")


@pytest.fixture
def mixed(settings, config, tmp_path):
    """mixed(**variables) -> the launcher's Settings of a run with rows of both."""
    rows = [{"goal": 1, "environment": name, **demo(1)} for name in ("far", "near")]
    write(tmp_path / "data/train.jsonl", *rows)
    return lambda **variables: settings(CONFIG=str(config), EVAL_SETS="", VARIANT="b2f", **variables)


def check_run(s, path):
    config = TcodConfig.read(path)
    return preflight.check_run(
        s, config, preflight.student_chat(config, s.student, s.chat_template_kwargs, "STUDENT"), ""
    )


def test_the_preflight_plays_rows_of_each(mixed, config, tmp_path, capsys):
    def check(**variables):
        s = mixed(**variables)
        check_run(s, config)
        return capsys.readouterr().err

    assert check() == ""
    said = check(MAX_CONTEXT_LEN="1500")  # a horizon of 2 fits
    assert "horizon's 5 x MAX_TURN_LEN" in said and "as in the first game of far, do not fit" in said
    assert "of near" not in said
    write(tmp_path / "data/train.jsonl", {"goal": 1, "explode": 1, "environment": "near", **demo(1)})
    with pytest.raises(ConfigError, match="does not play line 1 of .* env_error: .*the corridor collapsed"):
        check()


def test_the_preflight_asks_all_teachers(mixed, config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(preflight, "check_run", lambda *_: [])
    monkeypatch.setattr(preflight, "check_teacher_scores", lambda url, *_: asked.append(url))
    settings = yaml.safe_load(config.read_text())
    settings["tcod_environments"]["near"]["tcod_teacher_url"] = "http://expert:1"
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/tcod.yaml").write_text(yaml.safe_dump(settings))
    s = mixed(TEACHER_URL="http://teacher:1")
    monkeypatch.setattr(preflight.Settings, "read", lambda variables: s)
    monkeypatch.setattr(preflight.ray, "shutdown", lambda: None)
    monkeypatch.setattr(sys, "argv", ["preflight", str(tmp_path / "nodes"), ""])
    preflight.main()
    assert sorted(asked) == sorted(["http://expert:1", s.teacher_address])


def test_the_launcher_reads_entries(mixed, config, tmp_path, monkeypatch):
    s, recipe = mixed(), read_tcod(mixed(), {})
    assert launch.worker_variables(s, recipe)["NEAR"] == str(tmp_path)
    monkeypatch.delenv("NEAR")
    assert teacher_context(s, recipe) == s.max_context_len + 7  # a dry run elsewhere
    with pytest.raises(ConfigError, match="HORIZON would be that of some environments alone: set it in CONFIG's"):
        read_tcod(s, {"HORIZON": "9"})


def test_a_run_goes_on_where_an_environments_data_and_teacher_have_moved(mixed, config, tmp_path, monkeypatch):
    def begin(**changes):
        settings = yaml.safe_load(config.read_text())
        settings["tcod_environments"]["near"] |= changes
        config.write_text(yaml.safe_dump(settings))
        folder.begin(mixed(), read_tcod(mixed(), {}), "")

    begin()
    checkpoint(tmp_path / "run", 24)
    begin(tcod_data_root=str(tmp_path / "data"), tcod_teacher_url="http://elsewhere:1")
    with pytest.raises(ConfigError, match="has a run with another tcod_environments: take it back"):
        begin(tcod_horizon=3)


def test_every_node_of_a_cluster_resets_a_game_of_each(mixed, config, monkeypatch):
    checked = []
    s = mixed(RAY_ADDRESS="10.0.0.9:6379")
    monkeypatch.setattr(preflight, "check_cluster", lambda s, gpus, games: checked.extend(games) or ["here"])
    assert check_run(s, config) == ["here"]
    assert [(one.name, row.metadata["environment"]) for one, row in checked] == [("far", "far"), ("near", "near")]
