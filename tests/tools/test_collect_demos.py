"""collect_demos.py and journals, on a scripted engine."""

import fcntl
import json
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoTokenizer

from examples.tcod import ConfigError
from examples.tcod.episode.demonstration import Demonstration
from examples.tcod.episode.rows import Row
from examples.tcod.model.chat_tokens import ChatTokens
from examples.tcod.tools import collect_demos, evaluate, show_rollouts
from examples.tcod.tools.common.journal import Journal
from tests.support.served_model import LEFT, ODD, RIGHT, read

NUM_GPUS = 0


def test_the_shortest_replayable_solution_is_kept_with_its_responses(rig, capsys):
    rig.openings[2] = [LEFT, "Right it is. " + RIGHT, RIGHT]  # 4 turns, 2, 2
    rig.openings[3] = ["jump", "<action>jump</action>", LEFT]  # shorter, but with an action that no replay accepts
    rig.openings[1] = [ODD + RIGHT, LEFT, ODD + RIGHT]  # a control token is characters when the text is replayed
    rig.openings[4] = [ODD + RIGHT]
    rig.run(collect_demos, rig.rows(1, 2, 3, 4, 9), "demos.jsonl", "--samples", "3")
    one, two, three, four, never = read(rig.folder / "demos.jsonl")
    demo = two["metadata"].pop("demo")
    assert two == {"prompt": "walk", "label": "walk 2", "metadata": {"goal": 2}}
    assert demo["observations"] == ["You are at door 1.", "You are at door 2."]
    assert demo["actions"] == ["right", "right"] and demo["responses"] == ["Right it is. " + RIGHT, RIGHT]
    tokenizer = AutoTokenizer.from_pretrained(rig.checkpoint)
    assert [tokenizer.decode(ids) for ids in demo["ids"]] == [f"{text}<|im_end|>" for text in demo["responses"]]
    assert demo["vocabulary"] == ChatTokens(tokenizer, {"enable_thinking": False}).vocabulary
    assert one["metadata"]["demo"]["actions"] == ["left", "right", "right"]
    assert three["metadata"]["demo"]["actions"] == ["left"] + ["right"] * 4
    assert four["metadata"]["demo"]["responses"] == [ODD + RIGHT] + [RIGHT] * 3
    assert never["metadata"] == {"goal": 9, "demo": {"actions": []}}
    table = {line[:9].strip(): line[9:].split() for line in capsys.readouterr().out.splitlines()}
    assert table["task type"] == ["games", "solved", "success", "length", "inexact"]
    assert table["walk 4"] == ["1", "1", "1.00", "4", "1"] and table["walk 9"] == ["1", "0", "0.00", "-", "0"]
    assert table["all"] == ["5", "4", "0.80", "4", "1"]


def test_calls_of_tools_are_collected_with_their_tokens_and_evaluated(rig):
    from tests.episode.test_tools import TOOLS, action, call, with_tools

    with_tools(rig, rig.folder / "tools")
    settings = yaml.safe_load(rig.config.read_text()) | {key: TOOLS[key] for key in TOOLS if key.startswith("tcod_")}
    rig.config.write_text(yaml.safe_dump(settings))
    rig.openings[2] = [said := call("right", "right")]
    rig.run(collect_demos, rig.rows(2), "demos.jsonl", "--samples", "1", "--max-turn-len", "250")
    (row,) = read(rig.folder / "demos.jsonl")
    demo = Demonstration.of(row["metadata"])
    assert (demo.actions, demo.responses) == ([action("right", "right")], [said])
    chat = ChatTokens(rig.tokenizer, {}, tools=True)
    assert demo.sampled_ids(0, chat) == demo.ids[0] == chat.assistant(said) and len(demo.ids[0]) < len(said)
    rig.run(evaluate, rig.rows(2), "result.json", "--max-turn-len", "250")
    assert json.loads((rig.folder / "result.json").read_text())["success"]["all"]["success"] == 1.0


def test_games_that_are_neither_solved_nor_done_are_named(rig, capsys):
    rig.openings[2] = ["<action>jump</action>"]
    rig.run(collect_demos, rig.rows(2), "demos.jsonl", "--samples", "2")
    assert "left out of" in (out := capsys.readouterr().out) and "invalid or inadmissible" in out
    assert read(rig.folder / "demos.jsonl") == []
    said = rig.refusal(collect_demos, rig.rows(3, explode=2), "others.jsonl", "--samples", "2")
    assert said == "collect_demos: 2 episodes failed ({'env_error': 2}): run it again to play them"
    assert "only 0 of 2 episodes were played" in capsys.readouterr().out
    assert len(read(rig.folder / "others.journal.jsonl")) == 1  # its settings: failures are played again


def test_a_second_run_plays_only_what_is_missing(rig):
    for samples, wanted in (("2", 4), ("2", 4), ("3", 6)):
        rig.run(collect_demos, rig.rows(1, 2), "demos.jsonl", "--samples", samples)
        assert rig.begun.total() == wanted
    said = rig.refusal(collect_demos, rig.rows(1, 2), "demos.jsonl", "--temperature", "0.5")
    assert said.endswith("demos.journal.jsonl was begun with another temperature: choose another --out")
    said = rig.refusal(evaluate, rig.rows(1, 2), "demos.json", "--temperature", "1")
    assert said.endswith("was begun with another tool: choose another --out")


# -------------------------------------------------------------------------------------------------------- journals


def test_a_journal_is_cut_at_its_torn_line_and_locked(tmp_path, monkeypatch):
    row = Row("", "", {"goal": 1, "demo": {"actions": ["right"]}})
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path, {"temperature": 1.0})
    journal.add({"task": {"goal": 1}, "attempt": 0, "said": "\u2028"})
    whole = path.read_bytes()  # at once: the process may be killed
    with pytest.raises(ConfigError, match="another process writes"):
        Journal(path, {"temperature": 1.0})
    del journal
    for torn in (b'{"ta', b"{}", b""):
        path.write_bytes(whole + torn)
        journal = Journal(path, {"temperature": 1.0, "newer": 1})
        assert (
            journal.of(row) == [{"task": {"goal": 1}, "attempt": 0, "said": "\u2028"}] and path.read_bytes() == whole
        )
        del journal
    path.write_bytes(whole[:5])
    assert Journal(path, {"temperature": 1.0}).of(row) == []
    Journal(path, {"temperature": 0.5})  # nothing was played under the other one
    no_task = whole + b"{}\n", "it has no 'task'"
    for damaged, said in ((whole.replace(b"{", b"x", 2), "line 1 of "), no_task, (b"[]\n", "line 1 of ")):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"is damaged .{said}.*: repair or remove it"):
            Journal(path, {"temperature": 1.0})

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path.write_bytes(whole)
    journal = Journal(path, {"temperature": 1.0})
    assert len(journal.of(row)) == 1
    journal._file = SimpleNamespace(write=lambda data: len(data) - 1)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        journal.add({"task": {"goal": 2}})


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(rig, caplog):
    rows, result, journal = rig.rows(1, 2, 3, 4), rig.folder / "f2b.json", rig.folder / "f2b.journal.jsonl"
    rig.answers = 6  # of 10
    more = ["--concurrency", "1", "--save-episodes", str(rig.folder)]
    said = rig.refusal(evaluate, rows, "f2b.json", *more)
    assert said.startswith("evaluate: the server at --url is gone (") and said.endswith("the same command goes on")
    assert [entry["task"]["goal"] for entry in read(journal)[1:]] == [1, 2, 3]
    assert not result.exists() and not list(rig.folder.glob("*.partial"))
    rig.answers = 10**6
    rig.run(evaluate, rows, "f2b.json", *more)
    assert rig.begun == {1: 1, 2: 1, 3: 1, 4: 1}
    assert [episode["turns"] for episode in json.loads(result.read_text())["episodes"]] == [1, 2, 3, 4]
    assert not journal.exists() and f"3 of 4 episodes are in {journal}: remove it to play anew" in caplog.text
    [run] = show_rollouts.read_runs([rig.folder])
    assert sorted(episode["index"] for episode in run.episodes if not episode["failure"]) == [1, 2, 3, 4]
    rig.run(evaluate, rows, "f2b.json", *more)  # what is in a result is played anew
    assert rig.begun.total() == 8
