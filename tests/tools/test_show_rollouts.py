"""Saved episodes as the page's data, and as text for a terminal."""

import json
import os
import re
import subprocess
import sys

import pytest

from examples.tcod.tools import show_rollouts
from examples.tcod.tools.show_rollouts import printable, rollout_text, shortest_won
from tests.support.episodes import HOSTILE, made_up, save

NUM_GPUS = 0


def read(*folders):
    return show_rollouts.read_runs(folders)


def embedded(page, name):
    return json.loads(re.search(f'id="{name}">(.*)</script>', page)[1])


def test_the_page_has_a_row_for_each_episode_and_all_of_its_data(tmp_path):
    lost = made_up(1, n=1, turns=4, replayed=1, arm="b2f", reward=0.25)
    lost["turns"][2]["refused"] = True
    failed = made_up(2, failure="env_timeout", detail="no reply in 120 s", kl=None)
    save(tmp_path / "b2f-1", [made_up(0, turns=2), lost], "train_000001")
    (tmp_path / "b2f-1" / "about.json").write_text('{"launches": [{"recipe": "4f<2a"}]}')
    runs = read(tmp_path / "b2f-1", save(tmp_path / "b" / "b2f-1", [failed]))
    assert [(run.name, len(run.episodes)) for run in runs] == [("b2f-1", 2), ("b/b2f-1", 1)]  # told apart
    page = show_rollouts.make_page(runs)
    first, second, third = embedded(page, "index")
    row = {"run": "b2f-1", "arm": "b2f", "dataset": "train", "n": 1, "k": 3, "replayed": 1, "kl": lost["kl"]}
    row |= {"reward": 0.25, "ending": "lost", "turns": 3, "task": "game_file: games/1.tw-pddl", "task_type": "heat"}
    assert second == {**row, "goal": lost["goal"]}
    assert (first["ending"], first["reward"], third["ending"]) == ("won", None, "failed: env_timeout")
    assert embedded(page, "e1") == {**lost, "source": "train_000001:2"}
    assert "4f&lt;2a" in page and page.count("It has no about.json.") == 1


def test_rows_are_told_apart_by_what_differs_in_their_metadata(tmp_path):
    tasks = [{"task": "boil", "variation": 3, "easy": True}, {"task": "melt", "variation": 3, "easy": True}, {"x": 1}]
    episodes = [{**made_up(i), "task": json.dumps(task)} for i, task in enumerate(tasks)]
    episodes.append({**made_up(3), "task": '{"cut [... 9 characters'})
    index = embedded(show_rollouts.make_page(read(save(tmp_path, episodes[:2]))), "index")
    assert [row["task"] for row in index] == ["task: boil", "task: melt"]
    index = embedded(show_rollouts.make_page(read(save(tmp_path, episodes))), "index")
    assert [row["task"] for row in index][1:] == ["task: melt, variation: 3, easy: True", "x: 1", episodes[3]["task"]]


def test_nothing_in_a_text_is_markup(tmp_path):
    hostile = made_up(0, goal=HOSTILE, outcome=HOSTILE)
    hostile["task"] = json.dumps({"x": HOSTILE})
    hostile["turns"][0] |= {"observation": HOSTILE, "action": HOSTILE}
    page = show_rollouts.make_page(read(save(tmp_path, [hostile])))
    assert page.isascii() and page.count("</script>") == 3 and "<img" not in page
    assert embedded(page, "e0")["goal"] == HOSTILE.replace("\ud800", "?")


@pytest.mark.parametrize(
    "change, why",
    [
        ('{"half": ', "Expecting value: line 1 column 9 (char 8)"),
        ("[17]", "it is [17]"),
        ('{"foreign": 1}', "it has no 'failure'"),
        ({"n": None}, "a value in it cannot be used (unsupported format string passed to NoneType.__format__)"),
        ({"kl": float("nan")}, "a value in it cannot be used (Out of range float values are not JSON compliant"),
        ({"kl": "KL"}, "a value in it cannot be used (Unknown format code 'f' for object of type 'str')"),
        ({"goal": 17}, "a value in it cannot be used (Unknown format code 's' for object of type 'int')"),
        ({"turns": [{"turn": 0, "role": "student", "action": "go"}]}, "it has no 'observation'"),
    ],
)
def test_a_line_that_is_no_transcript_is_left_out_and_named(tmp_path, caplog, change, why):
    line = change if isinstance(change, str) else json.dumps({**made_up(2), **change})
    save(tmp_path, [made_up(0), made_up(1)])
    file = tmp_path / "rollouts" / "train_000000.jsonl"
    first, second, _ = file.read_text().split("\n")
    file.write_text("\n".join([first, "", line, second]))
    [run] = read(tmp_path)
    assert [episode["source"] for episode in run.episodes] == ["train_000000:1", "train_000000:4"]
    [message] = caplog.messages
    assert message.startswith(f"line 3 of {file} is no transcript: {why}") and message.endswith("; it is left out")


def test_the_command_writes_the_page_or_prints_an_episode(tmp_path, monkeypatch, capsys):
    save(tmp_path, [made_up(0), made_up(1, failure="env_timeout")])
    save(tmp_path, [made_up(2, n=1, turns=6), made_up(4, n=1, turns=3), made_up(5, n=1, turns=2)], "train_000001")

    def call(*options, folder=tmp_path):
        monkeypatch.setattr("sys.argv", ["show_rollouts", str(folder), *options])
        show_rollouts.main()
        return capsys.readouterr().out

    assert call() == f"{tmp_path}/rollouts.html: 5 episodes, 3 won, 1 failed, 1 lost\n"
    assert len(embedded((tmp_path / "rollouts.html").read_text(), "index")) == 5
    assert call("--text").startswith("f2b, train, step 1, depth k = 3: put a clean plate in shelf 2 (4).\n")
    assert call("--text", "train_000000").count("--- student, turn 1") == 2
    assert "env_timeout" in call("--text", "train_000000:2")
    with pytest.raises(SystemExit, match="there is no eval_x: name one of train_000000, train_000001"):
        call("--text", "eval_x")
    (tmp_path / "odd" / "rollouts").mkdir(parents=True)
    (tmp_path / "odd" / "rollouts" / "train_000000.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="has no episodes in rollouts/.*jsonl: name a run directory"):
        call(folder=tmp_path / "odd")


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    folder = save(tmp_path, [])
    line = json.dumps(made_up(0, goal="put the \N{TURTLE} in"), ensure_ascii=False)
    (folder / "rollouts" / "train_000000.jsonl").write_text(f"{line}\n", "utf-8")
    (folder / "about.json").write_text('{"recipe": "\N{TURTLE}"}', "utf-8")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for options in (["--text"], []):
        command = [sys.executable, "-m", "examples.tcod.tools.show_rollouts", str(folder), *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "" and (not options or "put the \\U0001f422 in" in done.stdout)
    assert "&#128034;" in (folder / "rollouts.html").read_text()


def test_the_text_shows_every_turn_with_its_numbers():
    episode = made_up(0, turns=2, replayed=1, reward=0.5)
    replayed, played = episode["turns"]
    played |= {"valid": False, "refused": True, "cut": True}
    text = rollout_text(episode)
    assert text.startswith(
        "f2b, train, step 0, depth k = 1: put a clean plate in cabinet 1 (0).\n"
        '{"game_file": "games/0.tw-pddl"}\n'
        "1 turns replayed, 1 of at most 1 played, won, reward 0.5\n"
        "--- context, 40 tokens, not trained\n<|im_start|>system\nYou are in a house.<|im_end|>\n<|im_start|>user\n"
        f"{replayed['observation']}<|im_end|>\n<|im_start|>assistant\n\n--- replayed, turn 1, 4 tokens, not trained\n"
    )
    kl = f"KL {played['kl']:+.2f} nats"
    assert (
        f"\n--- student, turn 2, 4 tokens sampled, {kl}, no valid format, refused by the environment, cut by" in text
    )
    assert text.endswith(f"--- 4 of 88 tokens sampled, trajectory {kl}\n")
    kept = ("turn", "role", "observation", "action")
    broken = [{name: turn[name] for name in kept} for turn in episode["turns"]]
    failed = {**episode, "failure": "env_timeout", "detail": "no reply", "kl": None, "turns": broken}
    text = rollout_text(failed)
    assert "failed: env_timeout: no reply" in text and f"> {replayed['action']}\n" in text
    assert shortest_won([failed, episode]) is episode and shortest_won([failed]) is failed


def test_text_cannot_command_a_terminal():
    shown = printable(f"a\n{HOSTILE}")
    assert "\x1b" not in shown and "\\x1b[31m" in shown and "\\ud800" in shown and "\\u202e" in shown and "🐢" in shown
    shown.encode()
