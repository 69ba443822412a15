"""collect_demos.py and evaluate.py on a scripted engine; kill and resume with real processes."""

import argparse
import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray
import yaml
from aiohttp import web
from transformers import AutoTokenizer

from examples.tcod import ConfigError, Failure
from examples.tcod.curriculum import EpisodePlan
from examples.tcod.episode import loop as episode
from examples.tcod.episode.demonstration import Demonstration
from examples.tcod.episode.loop import Assignment
from examples.tcod.episode.record import EpisodeRecord
from examples.tcod.episode.rows import Row
from examples.tcod.model.chat_tokens import ChatTokens
from examples.tcod.model.client import SGLangClient
from examples.tcod.tools import collect_demos, evaluate
from examples.tcod.tools import play as play_tool
from examples.tcod.tools import show_rollouts
from examples.tcod.tools.collect_demos import Journal
from tests.support.fake_sglang import FakeSGLang, generated, scored
from tests.support.toys import LocalPool

NUM_GPUS = 0
HORIZON = 5
RIGHT, LEFT = "<action>right</action>", "<action>left</action>"
ODD = "<|im_start|>"
# collect_demos.py in a process of its own, with the environments in it too: Ray takes long to start.
DRIVER = """
import ray
from examples.tcod.episode import loop as episode
from examples.tcod.tools import collect_demos
from tests.support.toys import LocalPool
ray.init, episode.EnvironmentPool = (lambda *_, **__: None), LocalPool
collect_demos.main()
"""


@pytest.fixture
def in_process(monkeypatch):
    """Scripts run by their main(), without Ray and worker processes."""
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: None)
    monkeypatch.setattr(episode, "EnvironmentPool", LocalPool)


class Rig:
    """A scripted model: the n-th episode of a goal begins with openings[goal][n], every later turn says RIGHT."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.openings: dict[int, list[str]] = defaultdict(lambda: [RIGHT])
        self.begun: Counter[int] = Counter()
        self.delay_s = 0.0
        self.server = FakeSGLang(self.reply)
        self.server.pages["/server_info"] = {"max_req_input_len": 4000}
        self.config = folder / "tcod.yaml"
        settings = {"tcod_variant": "b2f", "tcod_horizon": HORIZON, "tcod_environment": "tests.support.toys.Corridor"}
        settings |= {"tcod_data_root": str(folder), "tcod_admissible": "never", "tcod_env_workers": 1}
        self.config.write_text(yaml.safe_dump(settings))

    async def reply(self, payload: dict) -> dict | web.Response:
        if "text" in payload:  # the launch check
            return scored(
                {**payload, "input_ids": self.tokenizer.encode(payload["text"])}, lambda position, token: -1.0
            )
        await asyncio.sleep(self.delay_s)
        context = self.tokenizer.decode(payload["input_ids"])
        text = RIGHT
        if context.count("<|im_start|>assistant") == 1:
            goal = int(context.split("Goal: door ")[1].split(".")[0])
            text = self.openings[goal][self.begun[goal] % len(self.openings[goal])]
            self.begun[goal] += 1
        ids = self.tokenizer.encode(text, add_special_tokens=False) + [self.tokenizer.eos_token_id]
        return generated(ids, [-0.1] * len(ids), prompt_tokens=len(payload["input_ids"]))

    def rows(self, *goals: int, **more: object) -> Path:
        path = self.folder / "rows.jsonl"
        rows = [{"prompt": "walk", "label": f"walk {goal}", "metadata": {"goal": goal, **more}} for goal in goals]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def command(self, rows: Path, out: str, *more: str) -> list[str]:
        return [
            *("--rows", str(rows), "--out", str(self.folder / out), "--url", self.server.url),
            *("--model", str(self.checkpoint), "--config", str(self.config), "--max-turn-len", "64"),
            *("--max-context-len", "2000", "--concurrency", "4", *more),
        ]

    def run(self, script: ModuleType, monkeypatch, *command: Any) -> None:
        monkeypatch.setattr(sys, "argv", [script.__name__, *self.command(*command)])
        script.main()


@pytest.fixture
def rig(tmp_path, checkpoint):
    rig = Rig(tmp_path, checkpoint)
    with rig.server:
        yield rig


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------------------------- demonstrations


def test_the_shortest_replayable_solution_is_kept_with_its_responses(in_process, rig, monkeypatch, capsys):
    rig.openings[2] = [LEFT, "Right it is. " + RIGHT, RIGHT]  # 4 turns, 2, 2
    rig.openings[3] = ["jump", "<action>jump</action>", LEFT]  # shorter, but with an action that no replay accepts
    rig.openings[1] = [ODD + RIGHT, LEFT, ODD + RIGHT]  # a control token is characters when the text is replayed
    rig.openings[4] = [ODD + RIGHT]
    rig.run(collect_demos, monkeypatch, rig.rows(1, 2, 3, 4, 9), "demos.jsonl", "--samples", "3")
    one, two, three, four, never = read(rig.folder / "demos.jsonl")
    demo = two["metadata"].pop("demo")
    assert two == {"prompt": "walk", "label": "walk 2", "metadata": {"goal": 2}}
    assert demo["actions"] == ["right", "right"] and demo["responses"] == ["Right it is. " + RIGHT, RIGHT]
    tokenizer = AutoTokenizer.from_pretrained(rig.checkpoint)
    assert [tokenizer.decode(ids) for ids in demo["ids"]] == [f"{text}<|im_end|>" for text in demo["responses"]]
    assert demo["vocabulary"] == ChatTokens(tokenizer, {"enable_thinking": False}).vocabulary
    assert one["metadata"]["demo"]["actions"] == ["left", "right", "right"]
    assert three["metadata"]["demo"]["actions"] == ["left"] + ["right"] * 4
    assert four["metadata"]["demo"]["responses"] == [ODD + RIGHT] + [RIGHT] * 3
    assert never["metadata"] == {"goal": 9, "demo": {"actions": []}}
    table = {line[:31].strip(): line[31:].split() for line in capsys.readouterr().out.splitlines()}
    assert table["task type"] == ["games", "solved", "success", "length", "inexact"]
    assert table["walk 4"] == ["1", "1", "1.00", "4", "1"] and table["walk 9"] == ["1", "0", "0.00", "-", "0"]
    assert table["all"] == ["5", "4", "0.80", "4", "1"]


def test_what_replays_is_what_was_sampled(in_process, rig, monkeypatch):
    """B2F's prompt out of a collected demonstration has, token for token, the context of the teacher's episode."""
    rig.openings[3] = ["Look, a door! " + RIGHT]
    rig.run(collect_demos, monkeypatch, rig.rows(3), "demos.jsonl", "--samples", "1")
    taught = rig.server.payloads()[-1]["input_ids"]
    [row] = read(rig.folder / "demos.jsonl")
    parser = argparse.ArgumentParser()
    play_tool.add_options(parser, temperature=1.0)
    player = play_tool.start(parser.parse_args(rig.command(Path(), "")[4:]))
    task = Assignment(
        metadata=row["metadata"],
        plan=EpisodePlan(replayed=2, budget=3),
        demo=Demonstration.of(row["metadata"]),
        sampling_params=player.sampling_params,
        max_context_len=2000,
        session="",
    )
    record = EpisodeRecord()
    history = asyncio.run(episode.play_episode(player.runtime, task, record))
    assert record.won and [turn.action for turn in record.replay] == ["right"] * 2 and len(record.turns) == 1
    assert history.prompt == taught


def test_games_that_are_neither_solved_nor_done_are_named(in_process, rig, monkeypatch, capsys):
    rig.openings[2] = ["<action>jump</action>"]
    rig.run(collect_demos, monkeypatch, rig.rows(2), "demos.jsonl", "--samples", "2")
    assert "left out of" in (out := capsys.readouterr().out) and "invalid or inadmissible" in out
    assert read(rig.folder / "demos.jsonl") == []
    rig.openings[3] = [LEFT]
    with pytest.raises(SystemExit, match=r"2 episodes failed \(\{'env_error': 2\}\): run it again"):
        rig.run(collect_demos, monkeypatch, rig.rows(3, explode=2), "others.jsonl", "--samples", "2")
    assert "only 0 of 2 episodes were played" in capsys.readouterr().out
    assert len(read(rig.folder / "others.journal.jsonl")) == 1  # its settings: failures are played again


def test_a_second_run_plays_only_what_is_missing(in_process, rig, monkeypatch):
    for samples, wanted in (("2", 4), ("2", 4), ("3", 6)):
        rig.run(collect_demos, monkeypatch, rig.rows(1, 2), "demos.jsonl", "--samples", samples)
        assert rig.begun.total() == wanted
    with pytest.raises(SystemExit, match="was begun with another temperature: choose another --out"):
        rig.run(collect_demos, monkeypatch, rig.rows(1, 2), "demos.jsonl", "--temperature", "0.5")


def test_a_killed_run_goes_on_without_redoing_or_losing_anything(rig):
    """A real process and SIGKILL."""
    rig.delay_s = 0.05
    rows, journal = rig.rows(1, 2, 3, 9), rig.folder / "demos.journal.jsonl"
    command = [sys.executable, "-c", DRIVER, *rig.command(rows, "demos.jsonl", "--samples", "6")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 90
    while not journal.exists() or journal.read_bytes().count(b"\n") < 6:
        assert first.poll() is None and time.monotonic() < deadline, first.stderr.read()
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = journal.read_bytes()
    assert 6 <= before.count(b"\n") < 25
    with journal.open("ab") as file:
        file.write(b'{"task": {"goal": 9}, "atte')
    time.sleep(0.3)  # for what the first run still had in flight
    rig.begun.clear()
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert journal.read_bytes().startswith(before)
    entries = read(journal)[1:]
    assert rig.begun.total() == 24 - (before.count(b"\n") - 1)
    played = {(entry["task"]["goal"], entry["attempt"]) for entry in entries}
    assert len(entries) == 24 and played == set(itertools.product((1, 2, 3, 9), range(6)))
    assert [row["metadata"]["demo"]["actions"] for row in read(rig.folder / "demos.jsonl")] == [
        ["right"],
        ["right"] * 2,
        ["right"] * 3,
        [],
    ]
    assert "success 0.75, failed 0" in done.stderr and "24/24" in done.stderr


def test_a_journal_is_cut_at_its_torn_line_and_locked(tmp_path):
    row = Row("", "", {"goal": 1, "demo": {"actions": ["right"]}})
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path, {"temperature": 1.0})
    journal.add({"task": {"goal": 1}, "attempt": 0})
    with pytest.raises(ConfigError, match="another process writes"):
        Journal(path, {"temperature": 1.0})
    del journal
    whole = path.read_bytes()
    for torn in (b'{"ta', b"{}", b""):
        path.write_bytes(whole + torn)
        journal = Journal(path, {"temperature": 1.0})
        assert journal.of(row) == [{"task": {"goal": 1}, "attempt": 0}] and path.read_bytes() == whole
        del journal
    path.write_bytes(whole[:5])
    assert Journal(path, {"temperature": 1.0}).of(row) == []
    path.write_bytes(whole.replace(b"{", b"x", 2))
    with pytest.raises(ConfigError, match="is damaged"):
        Journal(path, {"temperature": 1.0})


# ------------------------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_counts_success_and_turns_by_task_type(in_process, rig, monkeypatch, capsys):
    rig.openings[3] = [LEFT]
    rig.run(evaluate, monkeypatch, rig.rows(1, 9, 3), "new/result.json")
    result = json.loads((rig.folder / "new/result.json").read_text())
    assert [(episode["task"]["goal"], episode["won"], episode["turns"]) for episode in result["episodes"]] == [
        (1, True, 1),
        (9, False, HORIZON),
        (3, True, 5),
    ]
    assert result["settings"]["temperature"] == 0.4 and result["settings"]["horizon"] == HORIZON
    assert result["success"]["all"] == {
        **{"episodes": 3, "won": 2, "success": 2 / 3, "turns": 11 / 3},
        "interval": [pytest.approx(0.2077, abs=1e-4), pytest.approx(0.9385, abs=1e-4)],
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["all", "3", "0.667", "[0.208,", "0.939]", "3.7"] and len(lines) == 5
    payload = next(payload for payload in rig.server.payloads() if "input_ids" in payload)
    assert payload["sampling_params"]["temperature"] == 0.4 and payload["sampling_params"]["top_p"] == 1.0


def test_a_failed_episode_is_no_loss(in_process, rig, monkeypatch, capsys):
    path = rig.rows(2)
    with path.open("a") as file:
        for goal in (3, 4):
            file.write(json.dumps({"prompt": "", "label": "x", "metadata": {"goal": goal, "explode": 2}}) + "\n")
    rig.run(evaluate, monkeypatch, path, "result.json")
    result = json.loads((rig.folder / "result.json").read_text())
    assert result["success"]["all"]["episodes"] == 1 and result["failed"] == {"env_error": 2}
    assert "2 episodes failed and are not counted: {'env_error': 2}" in capsys.readouterr().out


def test_an_evaluation_saves_its_episodes_for_the_page(in_process, rig, monkeypatch, capsys):
    path = rig.rows(2, 9)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "", "label": "x", "metadata": {"goal": 3, "explode": 2}}) + "\n")
    rig.run(evaluate, monkeypatch, path, "result.json", "--episodes", str(rig.folder))
    [run] = show_rollouts.read_runs([rig.folder])
    won, lost, failed = sorted(run.episodes, key=lambda episode: episode["index"])
    assert (won["won"], lost["won"], failed["failure"]) == (True, False, "env_error")
    assert won["dataset"] == "rows" and won["arm"] == rig.checkpoint.name and won["kl"] is None
    assert won["turns"][1]["response"] == f"{RIGHT}<|im_end|>" and won["spans"][1]["student"][0] == -0.1
    assert [turn["action"] for turn in failed["turns"]] == ["right", "right"] and failed["spans"] == []


def test_nothing_is_written_where_all_failed(in_process, rig, monkeypatch):
    with pytest.raises(SystemExit, match=r"all 1 episodes failed \(\{'env_error': 1\}\)"):
        rig.run(evaluate, monkeypatch, rig.rows(3, explode=1), "result.json")
    assert not (rig.folder / "result.json").exists()


def test_a_broken_server_ends_the_run(in_process, rig, monkeypatch):
    async def broken(*args, **kwargs):
        raise Failure("unavailable", "connection refused")

    monkeypatch.setattr(SGLangClient, "post", broken)
    with pytest.raises(SystemExit, match=r"the last 32 episodes failed \(\{'engine_unavailable': 32\}\)"):
        rig.run(evaluate, monkeypatch, rig.rows(*range(1, 50)), "result.json")


def test_the_context_bounds_an_evaluation_too(in_process, rig, monkeypatch, capsys):
    rig.run(evaluate, monkeypatch, rig.rows(9), "result.json", "--max-context-len", "250")
    assert "1 episodes ended because --max-context-len was reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--url", "http://127.0.0.1:9"], "no SGLang server answers at --url http://127.0.0.1:9 "),
        (["--url", "127.0.0.1"], "--url must be http://HOST:PORT"),
        (["--model", "/nowhere"], "--model /nowhere: .*; name the checkpoint"),
        (["--config", "/nowhere"], "/nowhere cannot be read .*: name a YAML file of tcod_. settings"),
        (["--max-context-len", "5000"], "at most 3999 tokens, less than --max-context-len 5000"),
        (["--max-turn-len", "2000"], "--max-turn-len 2000 bounds one turn"),
        (["--concurrency", "0"], "--concurrency must be >= 1"),
        (["--rows", "/nowhere"], "/nowhere cannot be read"),
    ],
)
def test_wrong_options_stop_at_once_with_the_fix(in_process, rig, monkeypatch, more, message):
    with pytest.raises(SystemExit, match=message) as error:
        rig.run(evaluate, monkeypatch, rig.rows(1), "result.json", *more)
    assert "\n" not in str(error.value) and not rig.begun


def test_a_server_with_another_tokenizer_is_refused(in_process, rig, monkeypatch):
    rig.server.reply = lambda payload: scored({**payload, "input_ids": [5, 6, 7]}, lambda position, token: -1.0)
    with pytest.raises(SystemExit, match="the server at --url does not encode text as --model"):
        rig.run(evaluate, monkeypatch, rig.rows(1), "result.json")


@pytest.mark.parametrize(
    "rows, message",
    [
        (["no row"], "line 1 of .* is no row"),
        ([{"metadata": {"goal": 1}}], "line 1 of .* is no row .*prompt"),
        ([{"prompt": "", "label": "", "metadata": {}}], "row 1 of .* cannot be played: .*no goal"),
        (
            [{"prompt": "", "label": "", "metadata": {"goal": 1, "demo": {"actions": ["right"] * n}}} for n in (1, 2)],
            "lines 1 and 2 of .* same",
        ),
        ([], "has no rows"),
    ],
)
def test_rows_that_cannot_be_played_are_named(in_process, rig, monkeypatch, rows, message):
    path = rig.rows()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=message):
        rig.run(evaluate, monkeypatch, path, "result.json")


# -------------------------------------------------------------------------------------------- turns and thoughts

THOUGHT = "<think>\nIt is on the right.\n</think>\n\n"


@pytest.fixture
def thinking(rig):
    """The rig with a student that thinks, and a history of turns."""
    settings = yaml.safe_load(rig.config.read_text())
    rig.config.write_text(yaml.safe_dump({**settings, "tcod_history": "turns", "tcod_thoughts": "keep"}))
    rig.openings[2] = [THOUGHT + RIGHT]  # then RIGHT, without a thought
    return rig


def test_a_thinking_teachers_demonstrations_keep_or_drop_its_thoughts(in_process, thinking, monkeypatch):
    rig = thinking
    rig.run(collect_demos, monkeypatch, rig.rows(2), "demos.jsonl", "--samples", "1")
    [kept] = read(rig.folder / "demos.jsonl")
    demo = kept["metadata"]["demo"]
    assert demo["responses"] == [THOUGHT + RIGHT, RIGHT] and len(demo["ids"]) == 2
    rig.run(collect_demos, monkeypatch, rig.rows(2), "demos.jsonl", "--samples", "1", "--drop-thoughts")
    [dropped] = read(rig.folder / "demos.jsonl")
    assert dropped["metadata"]["demo"] == {"actions": ["right"] * 2, "responses": [RIGHT] * 2}
    settings = read(rig.folder / "demos.journal.jsonl")[0]["settings"]
    assert (settings["history"], settings["thoughts"], settings["window"]) == ("turns", "keep", None)


def test_an_evaluation_of_turns_saves_what_each_turn_was_shown(in_process, thinking, monkeypatch):
    rig = thinking
    rig.run(evaluate, monkeypatch, rig.rows(2), "result.json", "--episodes", str(rig.folder))
    [run] = show_rollouts.read_runs([rig.folder])
    [won] = run.episodes
    assert won["won"] and [turn["response"] for turn in won["turns"]] == [
        f"{THOUGHT}{RIGHT}<|im_end|>",
        f"{RIGHT}<|im_end|>",
    ]
    assert [span["role"] for span in won["spans"]] == ["prompt", "sampled", "context", "sampled"]
    shown = won["spans"][2]["text"]
    assert shown.startswith("<|im_start|>system") and "You are at door 1." in shown
