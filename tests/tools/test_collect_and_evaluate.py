"""collect_demos.py and evaluate.py on a scripted engine: results, journals, and what is refused at once."""

import fcntl
import gc
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest
import ray
import yaml
from aiohttp import web
from transformers import AutoTokenizer

from examples.tcod import ConfigError
from examples.tcod.episode.demonstration import Demonstration
from examples.tcod.episode.rows import Row
from examples.tcod.model import client
from examples.tcod.model.chat_tokens import ChatTokens
from examples.tcod.settings import build
from examples.tcod.tools import collect_demos, evaluate, show_rollouts
from examples.tcod.tools.common.journal import Journal
from tests.support.fake_sglang import FakeSGLang, generated, scored
from tests.support.toys import LocalPool

NUM_GPUS = 0
HORIZON = 5
RIGHT, LEFT = "<action>right</action>", "<action>left</action>"
ODD = "<|im_start|>"
THOUGHT = "<think>\nIt is on the right.\n</think>\n\n"


class Rig:
    """A scripted model: the n-th episode of a goal begins with openings[goal][n], every later turn says RIGHT."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.openings: dict[int, list[str]] = defaultdict(lambda: [RIGHT])
        self.begun: Counter[int] = Counter()
        self.answers = 10**6  # then the server is gone
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
        self.answers -= 1
        if self.answers < 0:
            return web.Response(status=503)
        context = self.tokenizer.decode(payload["input_ids"])
        text = RIGHT
        if context.count("<|im_start|>assistant") == 1:
            goal = int(context.split("Goal: door ")[1].split(".")[0])
            text = self.openings[goal][self.begun[goal] % len(self.openings[goal])]
            self.begun[goal] += 1
        ids = self.tokenizer.encode(text, add_special_tokens=False) + [self.tokenizer.eos_token_id]
        return generated(ids, [-0.1] * len(ids), prompt_tokens=len(payload["input_ids"]))

    def rows(self, *goals: int, add: bool = False, **more: object) -> Path:
        path = self.folder / "rows.jsonl"
        rows = [{"prompt": "walk", "label": f"walk {goal}", "metadata": {"goal": goal, **more}} for goal in goals]
        with path.open("a" if add else "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return path

    def command(self, rows: Path, out: str, *more: str) -> list[str]:
        return [
            *("--rows", str(rows), "--out", str(self.folder / out), "--url", self.server.url),
            *("--model", str(self.checkpoint), "--config", str(self.config), "--max-turn-len", "64"),
            *("--max-context-len", "2000", "--concurrency", "4", *more),
        ]

    def run(self, script: ModuleType, rows: Path, out: str, *more: str) -> None:
        """The script's main(), without Ray and worker processes."""
        gc.collect()  # the process of the run before has ended, and its lock
        self.monkeypatch.setattr(sys, "argv", [script.__name__, *self.command(rows, out, *more)])
        script.main()

    def refusal(self, script: ModuleType, rows: Path, out: str, *more: str) -> str:
        with pytest.raises(SystemExit) as error:
            self.run(script, rows, out, *more)
        assert "\n" not in str(error.value)
        return str(error.value)


@pytest.fixture
def rig(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: None)
    monkeypatch.setattr(build, "EnvironmentPool", LocalPool)
    monkeypatch.setattr(client, "RETRIES", 0)
    rig = Rig(tmp_path, checkpoint)
    rig.monkeypatch = monkeypatch
    with rig.server:
        yield rig


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------------------------- demonstrations


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
    assert (demo.actions, demo.responses) == ((action("right", "right"),), (said,))
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
    assert len(Journal(path, {"temperature": 1.0}).of(row)) == 1


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(rig, caplog):
    rows, result, journal = rig.rows(1, 2, 3, 4), rig.folder / "f2b.json", rig.folder / "f2b.journal.jsonl"
    rig.answers = 6  # of 10
    more = ["--concurrency", "1", "--episodes", str(rig.folder)]
    said = rig.refusal(evaluate, rows, "f2b.json", *more)
    assert said.startswith("evaluate: the server at --url is gone (") and said.endswith("the same command goes on")
    assert [entry["task"]["goal"] for entry in read(journal)[1:]] == [1, 2, 3]
    assert not result.exists() and not list(rig.folder.glob("*.partial"))
    rig.answers = 10**6
    rig.run(evaluate, rows, "f2b.json", *more)
    assert rig.begun == {1: 1, 2: 1, 3: 1, 4: 1}
    assert [episode["turns"] for episode in json.loads(result.read_text())["episodes"]] == [1, 2, 3, 4]
    assert not journal.exists() and f"3 of 4 episodes are in {journal}: remove it to play all anew" in caplog.text
    [run] = show_rollouts.read_runs([rig.folder])
    assert sorted(episode["index"] for episode in run.episodes if not episode["failure"]) == [1, 2, 3, 4]
    rig.run(evaluate, rows, "f2b.json", *more)  # what is in a result is played anew
    assert rig.begun.total() == 8


def test_a_disk_that_is_full_is_told_of_at_once(rig, monkeypatch):
    write, room = Journal._write, [2]

    def fill(self, line):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        write(self, line)

    monkeypatch.setattr(Journal, "_write", fill)
    said = rig.refusal(evaluate, rig.rows(1, 2, 3), "f2b.json", "--concurrency", "1")
    assert said.endswith("f2b.json cannot be written (No space left on device): make room, or name another")
    assert len(read(rig.folder / "f2b.journal.jsonl")) == 2


# ------------------------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_counts_success_and_turns_by_task_type(rig, capsys):
    rig.openings[3] = [LEFT]
    path = rig.rows(1, 9, 3)
    rows = path.read_text().replace("walk 1", "all")
    path.write_text("\n" + rows)
    rig.rows(4, add=True, explode=2)
    rig.run(evaluate, path, "new/result.json", "--episodes", str(rig.folder))
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
    rig.answers = 10
    assert rig.refusal(evaluate, rows, "r.json", *more).endswith("the same command goes on")
    assert [entry["attempt"] for entry in read(rig.folder / "r.journal.jsonl")[1:]] == [0, 0]
    rig.answers = 10**6
    rig.begun[2] -= 1  # the episode that was broken off
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
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all")]
    assert line.split()[-6:] == ["0.289", "1.000", "0.867", "3.8", "3.2", "5.0"]


def test_episodes_that_the_context_ends_count_and_failed_ones_do_not(rig, capsys):
    rig.run(evaluate, rig.rows(9), "limited.json", "--max-context-len", "250")
    assert "1 episodes ended because --max-context-len was reached" in capsys.readouterr().out
    said = rig.refusal(evaluate, rig.rows(3, explode=1), "result.json")
    assert said == "evaluate: all 1 episodes failed ({'env_error': 1}): see the warnings above"
    said = rig.refusal(evaluate, rig.rows(*range(1, 50), explode=1), "result.json")
    assert said == "evaluate: 32 episodes in a row failed ({'env_error': 32}): see the warnings above"
    assert not (rig.folder / "result.json").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--url", "http://127.0.0.1:9"], "no SGLang server answers at --url http://127.0.0.1:9 ([Errno 111]"),
        (["--url", "127.0.0.1"], "no SGLang server answers at --url 127.0.0.1 (Request URL is missing"),
        (["--model", "/nowhere"], "--model /nowhere: "),
        (["--apply-chat-template-kwargs", "3"], "--apply-chat-template-kwargs must be a JSON object, got 3"),
        (["--config", "/nowhere"], "/nowhere cannot be read "),
        (["--max-context-len", "5000"], "at most 3999 tokens, less than --max-context-len 5000"),
        (["--max-turn-len", "2000"], "--max-turn-len 2000 bounds one turn"),
        (["--temperature", "nan"], "--temperature must be a number >= 0, got nan"),
        (["--rows", "/nowhere"], "/nowhere cannot be read (No such file or directory): name a JSONL file"),
        (["--out", "/"], "/ is no file: name one for the result"),
        (["--out", "/dev/null/result.json"], "/dev/null cannot be written (File exists): make room, or name another"),
        (["--episodes", "/dev/null"], "/dev/null/rollouts cannot be written (Not a directory): make room, or name "),
    ],
)
def test_wrong_options_stop_at_once_with_the_fix(rig, more, message):
    assert message in rig.refusal(evaluate, rig.rows(1), "result.json", *more)
    assert not rig.begun and not (rig.folder / "result.json").exists()


@pytest.mark.parametrize(
    "reply, says",
    [
        (lambda payload: scored({**payload, "input_ids": [5, 6]}, lambda *_: -1.0), "does not encode text as --model"),
        (lambda payload: {"generated_text": "x"}, "is not SGLang's, or does not encode text as --model"),
        (lambda payload: web.Response(text="<html>"), "no SGLang server answers at --url"),
        (lambda payload: web.Response(status=404), "no SGLang server answers at --url"),
    ],
)
def test_another_server_is_refused(rig, reply, says):
    rig.server.reply = reply
    assert says in rig.refusal(evaluate, rig.rows(1), "result.json")


@pytest.mark.parametrize("script", [collect_demos, evaluate])
def test_rows_that_cannot_be_played_are_named(rig, script):
    row = {"prompt": "", "label": "", "metadata": {"goal": 1}}
    for rows, says in (
        ([{**row, "label": None}], "rows.jsonl is no row {"),
        ([{**row, "metadata": {}}], "rows.jsonl cannot be played: its metadata has no goal"),
        ([row, {**row, "metadata": {"goal": 1, "demo": {"actions": []}}}], "lines 1 and 2 of "),
        ([], "has no rows"),
    ):
        path = rig.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        assert says in rig.refusal(script, path, "result.json")
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
    rig.run(evaluate, rig.rows(2), "result.json", "--episodes", str(rig.folder))
    [won] = show_rollouts.read_runs([rig.folder])[0].episodes
    said = ["".join(turn["tokens"]) for turn in won["turns"]]
    assert said == [f"{THOUGHT}{RIGHT}<|im_end|>", f"{RIGHT}<|im_end|>"]
    assert won["turns"][1]["context"][0].startswith("<|im_start|>system")
    assert "You are at door 1." in won["turns"][1]["observation"]
