"""evaluate.py on a scripted engine: results, repeats, and what is refused at once."""

import json

import pytest
import yaml
from aiohttp import web

from examples.tcod.tools import collect_demos, evaluate, show_rollouts
from tests.support.fake_sglang import scored
from tests.support.served_model import HORIZON, LEFT, RIGHT, THOUGHT, read

NUM_GPUS = 0


def test_an_evaluation_counts_success_and_turns_by_task_type(rig, capsys):
    rig.openings[3] = [LEFT]
    path = rig.rows(1, 9, 3)
    rows = path.read_text().replace("walk 1", "all")
    path.write_text("\n" + rows)
    rig.rows(4, add=True, explode=2)
    rig.run(evaluate, path, "new/result.json", "--save-episodes", str(rig.folder))
    result = json.loads((rig.folder / "new/result.json").read_text())
    assert [(episode["task"]["goal"], episode["won"], episode["turns"]) for episode in result["episodes"]] == [
        (1, True, 1),
        (9, False, HORIZON),
        (3, True, 5),
    ]
    assert result["settings"]["temperature"] == 0.4 and result["settings"]["horizon"] == HORIZON
    assert result["success"]["all"] == {
        **{"episodes": 3, "won": 2, "success": 2 / 3, "turns": 11 / 3, "turns_won": 3.0, "turns_lost": HORIZON},
        "interval": [pytest.approx(0.2077, abs=1e-4), pytest.approx(0.9385, abs=1e-4)],
    }
    assert {name: row["episodes"] for name, row in result["success"]["by_label"].items()} == {
        **{"all": 1, "walk 3": 1, "walk 9": 1}
    }
    assert result["failed"] == {"env_error": 1}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["all", "3", "0.667", "[0.208,", "0.939]", "3.7", "3.0", "5.0"] and len(lines) == 6
    assert lines[5] == "1 episodes failed and are not counted: {'env_error': 1}; run it again to play them"
    payload = next(payload for payload in rig.server.payloads() if "input_ids" in payload)
    assert payload["sampling_params"]["temperature"] == 0.4 and payload["sampling_params"]["top_p"] == 1.0
    [run] = show_rollouts.read_runs([rig.folder])
    won, lost, _, failed = sorted(run.episodes, key=lambda episode: episode["index"])
    assert (won["won"], lost["won"], failed["failure"]) == (True, False, "env_error")
    assert won["dataset"] == "rows" and won["arm"] == rig.checkpoint.name and won["kl"] is None and won["index"] == 2
    assert "".join(won["turns"][0]["tokens"]) == f"{RIGHT}<|im_end|>" and won["turns"][0]["student"][0] == -0.1
    assert [(turn["action"], "tokens" in turn) for turn in failed["turns"]] == [("right", False)] * 2


def test_repeats_of_an_evaluation_go_on_where_they_were(rig, capsys):
    """Goal 2 is won at once or by a detour, goal 5 only without one. The server goes away in the second repeat."""
    settings = yaml.safe_load(rig.config.read_text())
    settings["tcod_environment"] = "tests.support.corridor.GradedCorridor"
    rig.config.write_text(yaml.safe_dump(settings))
    rig.openings |= {2: [RIGHT, LEFT, RIGHT], 5: [RIGHT, LEFT, LEFT]}
    rows, more = rig.rows(2, 5), ["--repeats", "3", "--concurrency", "1"]
    rig.answers = 12
    assert rig.refusal(evaluate, rows, "r.json", *more).endswith("the same command goes on")
    assert [entry["attempt"] for entry in read(rig.folder / "r.journal.jsonl")[1:]] == [0, 0, 1]
    rig.answers = 10**6
    (rig.folder / "once.journal.jsonl").write_bytes((rig.folder / "r.journal.jsonl").read_bytes())
    rig.run(evaluate, rows, "once.json")
    assert [one["attempt"] for one in json.loads((rig.folder / "once.json").read_text())["episodes"]] == [0, 0]
    rig.begun[5] -= 1  # the episode that was broken off
    rig.run(evaluate, rows, "r.json", *more)
    result = json.loads((rig.folder / "r.json").read_text())
    assert [(one["task"]["goal"], one["attempt"], one["won"], one["turns"]) for one in result["episodes"]] == [
        *((2, 0, True, 2), (2, 1, True, 4), (2, 2, True, 2)),
        *((5, 0, True, 5), (5, 1, False, 5), (5, 2, False, 5)),
    ]
    numbers = result["success"]["all"]
    assert (numbers["repeats"], numbers["pass_at_k"], numbers["success"]) == (3, 1.0, 4 / 6)
    assert numbers["success_sd"] == pytest.approx((((1 - 2 / 3) ** 2 + 2 * (0.5 - 2 / 3) ** 2) / 2) ** 0.5)
    assert numbers["score"] == pytest.approx((1 + 1 + 1 + 1 + 0.6 + 0.6) / 6)
    *_, line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all")]
    assert line.split()[-6:] == ["0.289", "1.000", "0.867", "3.8", "3.2", "5.0"]


def test_episodes_that_the_context_ends_count_and_failed_ones_do_not(rig, capsys):
    rig.run(evaluate, rig.rows(9), "limited.json", "--max-context-len", "250")
    assert "1 episodes ended because --max-context-len was reached" in capsys.readouterr().out
    said = rig.refusal(evaluate, rig.rows(3, explode=1), "result.json")
    assert said == "evaluate: all 1 episodes failed ({'env_error': 1}): see the warnings above"
    said = rig.refusal(evaluate, rig.rows(*range(1, 50), explode=1), "result.json")
    assert said == "evaluate: 32 episodes in a row failed ({'env_error': 32}): see the warnings above"
    assert not (rig.folder / "result.json").exists()
    rows = [rig.rows(*range(10, 30), explode=1), rig.rows(1, add=True), rig.rows(*range(30, 50), add=True, explode=1)]
    rig.run(evaluate, rows[0], "result.json")  # one was played in between
    assert json.loads((rig.folder / "result.json").read_text())["failed"] == {"env_error": 40}


@pytest.mark.parametrize(
    "more, message",
    [
        (["--url", "http://me:w@127.0.0.1:9"], "the server at --url http://127.0.0.1:9 does not score ([Errno 111]"),
        (["--model", "/nowhere"], "--model /nowhere: "),
        (["--apply-chat-template-kwargs", "3"], "--apply-chat-template-kwargs must be a JSON object, got 3"),
        (["--config", "/nowhere"], "/nowhere cannot be read "),
        (["--max-context-len", "5000"], "at most 3999 tokens, less than --max-context-len 5000"),
        (["--max-turn-len", "2000"], "--max-turn-len 2000 bounds one turn"),
        (["--temperature", "nan"], "--temperature must be a number >= 0, got nan"),
        (["--rows", "/nowhere"], "/nowhere cannot be read (No such file or directory): name a JSONL file"),
        (["--out", "/"], "/ is no file: name one for the result"),
        (["--out", "/dev/null/result.json"], "/dev/null cannot be written (File exists): make room, or name another"),
        (
            ["--save-episodes", "/dev/null"],
            "/dev/null/rollouts cannot be written (Not a directory): make room, or name ",
        ),
    ],
)
def test_wrong_options_stop_at_once_with_the_fix(rig, more, message):
    assert message in rig.refusal(evaluate, rig.rows(1), "result.json", *more)
    assert not rig.begun and not (rig.folder / "result.json").exists()


def test_another_server_is_refused(rig):
    for reply, says in (
        (
            lambda payload: scored({**payload, "input_ids": [5, 6]}, lambda *_: -1.0),
            "does not score the student's tokens (",
        ),
        (lambda payload: web.Response(text="<html>"), "does not score (Expecting value"),
    ):
        rig.server.reply = reply
        assert says in rig.refusal(evaluate, rig.rows(1), "result.json")


def test_rows_that_cannot_be_played_are_named(rig):
    row = {"prompt": "", "label": "", "metadata": {"goal": 1}}
    for rows, says in (
        ([{**row, "metadata": {}}], "rows.jsonl cannot be played: its metadata has no goal"),
        ([row, {**row, "metadata": {"goal": 1, "demo": {"actions": []}}}], "lines 1 and 2 of "),
    ):
        path = rig.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        assert says in rig.refusal(evaluate, path, "result.json")
    assert not rig.server.requests


def test_a_student_that_thinks_in_turns(rig):
    settings = yaml.safe_load(rig.config.read_text())
    rig.config.write_text(yaml.safe_dump({**settings, "tcod_history": "turns", "tcod_thoughts": "keep"}))
    rig.openings[2] = [THOUGHT + RIGHT]  # then RIGHT, without a thought
    for more, demo in (
        ([], {"actions": ["right"] * 2, "responses": [THOUGHT + RIGHT, RIGHT]}),
        (["--drop-thoughts"], {"actions": ["right"] * 2, "responses": [RIGHT] * 2}),
    ):
        rig.run(collect_demos, rig.rows(2), "demos.jsonl", "--samples", "1", *more)
        [row] = read(rig.folder / "demos.jsonl")
        assert len(row["metadata"]["demo"].pop("ids", [1, 1])) == 2 and demo.items() <= row["metadata"]["demo"].items()
    assert set(row["metadata"]["demo"]) == {"actions", "observations", "responses", "seen"}
    settings = read(rig.folder / "demos.journal.jsonl")[0]["settings"]
    assert (settings["history"], settings["thoughts"], settings["window"]) == ("turns", "keep", None)
    rig.run(evaluate, rig.rows(2), "result.json", "--save-episodes", str(rig.folder))
    [won] = show_rollouts.read_runs([rig.folder])[0].episodes
    said = ["".join(turn["tokens"]) for turn in won["turns"]]
    assert said == [f"{THOUGHT}{RIGHT}<|im_end|>", f"{RIGHT}<|im_end|>"]
    assert won["turns"][1]["context"][0].startswith("<|im_start|>system")
    assert "You are at door 1." in won["turns"][1]["observation"]
