"""Episodes that a run saves for people to read, where writing fails too, and about.json."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from examples.tcod.episode.episode import Episode, EpisodeRecord, ReplayedTurn, Span, TokenSequence, TurnRecord
from examples.tcod.records import run_folder, saved_episodes
from examples.tcod.records.saved_episodes import MAX_TEXT, MAX_TOKENS, choose_to_save, clip, token_texts, transcript
from tests.episode.test_evaluation import evaluation
from tests.support.fake_sglang import generated, scored
from tests.support.rig import LEFT, RIGHT, teacher_value


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The run directory of a process that has played nothing yet."""
    monkeypatch.setenv("TCOD_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(run_folder, "_rollout_played", False)
    monkeypatch.setattr(run_folder, "_warned", set())
    return tmp_path / "run"


def saved(folder, name):
    lines = (folder / "rollouts" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line, object_hook=lambda fields: SimpleNamespace(**fields)) for line in lines]


def test_a_rollout_saves_what_was_shown_said_and_done_with_its_numbers(rig, folder):
    rig.script = ["hm", RIGHT, LEFT, "hm", RIGHT]
    row = {"goal": 3, "demo": {"actions": ["right"] * 3}}
    [sample], metrics = rig.rollout([row], n=12, tcod_variant="b2f", tcod_eta=100)
    assert metrics["rollout/tcod/unsaved_episodes"] == 0
    [line] = saved(folder, "train_000012")
    assert (folder / "rollouts" / "train_000012.jsonl").read_text().count("Goal: door 3.") == 1  # each text once
    plan = (line.arm, line.dataset, line.n, line.k, line.replayed, line.budget, line.won, line.failure)
    assert plan == ("b2f", "train", 12, 1, 2, 2, False, None)
    assert (line.task, line.goal, line.task_type, line.outcome) == ('{"goal": 3}', "walk", "walk", "Nothing happens.")
    assert [turn.role for turn in line.turns] == ["replayed"] * 2 + ["student"] * 2
    replayed, _, first, second = line.turns
    assert (replayed.observation, replayed.action) == ("Goal: door 3. You are at door 0.", "right")
    assert replayed.response == f"{RIGHT}<|im_end|>" and not hasattr(replayed, "kl")
    assert ("".join(first.tokens), first.action, first.valid) == (f"{LEFT}<|im_end|>", "left", True)
    assert ("".join(second.tokens), second.action, second.valid) == ("hm<|im_end|>", "hm", False)
    whole = [(turn.observation.join(turn.context), turn.response or "".join(turn.tokens)) for turn in line.turns]
    assert "".join(text for pair in whole for text in pair) == rig.tokenizer.decode(sample.tokens)
    assert sum(turn.context_tokens + turn.response_tokens for turn in line.turns) == len(sample.tokens)
    sampled = [i for i, trained in enumerate(sample.loss_mask) if trained]
    for ours, slimes in (("student", sample.rollout_log_probs), ("teacher", sample.teacher_log_probs)):
        numbers = getattr(first, ours) + getattr(second, ours)
        assert numbers == pytest.approx([slimes[i] for i in sampled], abs=1e-4)
    assert first.kl == pytest.approx(sum(first.student) - sum(first.teacher), abs=1e-2)
    assert line.kl == pytest.approx(first.kl + second.kl, abs=1e-3)


def test_won_lost_and_failed_episodes_are_saved_with_their_reasons(rig, folder, over_sampling):
    calls = iter(range(100))
    rig.teacher_reply = lambda payload: {"error": "?"} if next(calls) == 0 else scored(payload, teacher_value)
    rows = [{"goal": goal} for goal in (1, 2, 3, 9, 8)] + [{"goal": 3, "explode": 2}]
    rig.rollout(rows, n=3, rollout_batch_size=4, over_sampling_batch_size=6, tcod_save_episodes=4)
    won, lost, broken, unscored = saved(folder, "train_000003")
    assert (won.won, lost.won, lost.failure) == (True, False, None)
    assert broken.failure == "env_error" and "collapsed" in broken.detail
    assert [turn.action for turn in broken.turns] == ["right"] * 2 and not hasattr(broken.turns[0], "tokens")
    assert [turn.response for turn in broken.turns] == ["", ""]  # the page shows them
    assert unscored.failure == "teacher_invalid" and unscored.kl is None
    assert unscored.turns[0].tokens and unscored.turns[0].teacher is None


def test_an_evaluation_saves_its_data_sets_under_the_n_of_the_metrics(rig, folder):
    output = evaluation(rig, temperatures=(0.4, 1.0), tcod_eval_kl=True)
    assert [line.won for line in saved(folder, "eval_t0.4_000000")] == [True, False]
    assert output.metrics["eval/tcod/t1/unsaved_episodes"] == 0
    rig.rollout([{"goal": 2}])
    evaluation(rig, temperatures=(0.4, 1.0), tcod_eval_kl=True)  # slime gives it the id of the one before
    lines = saved(folder, "eval_t1_000001")
    assert {line.n for line in lines} == {1} and all(line.kl is not None for line in lines)
    assert all(line.kl is None for line in saved(folder, "eval_t0.4_000001"))
    rig.student.reply = lambda payload: generated([], [], finish="abort")
    evaluation(rig)
    assert {line.failure for line in saved(folder, "eval_t0.4_000001")} == {"engine_aborted"}


def sample_of(goal, ending="lost", index=0):
    record = EpisodeRecord(won=ending == "won", failure=None if ending in ("won", "lost") else ending)
    status = SimpleNamespace(value="aborted" if ending == "aborted" else "completed")
    metadata = {"goal": goal, "demo": {"actions": [index]}, "tcod": Episode(record)}
    return SimpleNamespace(metadata=metadata, status=status)


def test_the_choice_prefers_the_same_tasks_and_takes_every_ending():
    steps = [[sample_of(goal) for goal in order] for order in (range(50), range(49, -1, -1))]
    first, second = ([sample.metadata["goal"] for sample in choose_to_save(step, 8)] for step in steps)
    assert first == second and len(set(first)) == 8
    rare = [sample_of(51, "won"), sample_of(52, "env_error"), sample_of(53, "aborted")]
    chosen = choose_to_save(steps[0] + rare, 8)
    assert [sample.metadata["goal"] for sample in chosen[1::-1]] == [first[0], 51]
    assert {sample.metadata["goal"] for sample in chosen[2:]} == {52, *first[1:6]}
    group = [sample_of(1, index=i) for i in range(4)] + [sample_of(2)]
    assert {sample.metadata["goal"] for sample in choose_to_save(group, 2)} == {1, 2}
    assert len(choose_to_save(group, sys.maxsize)) == 5


def test_nothing_is_saved_without_a_run_directory_or_where_none_is_wanted(rig, folder, monkeypatch):
    rig.rollout([{"goal": 2}], tcod_save_episodes=0)
    monkeypatch.delenv("TCOD_RUN_DIR")
    _, metrics = rig.rollout([{"goal": 2}])
    assert not (folder / "rollouts").exists() and metrics["rollout/tcod/unsaved_episodes"] == 0


# -------------------------------------------------------------------------------------------- any text, any numbers


class Characters:
    """A tokenizer: one token per character."""

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


def made_of(text, turns, tokens, score):
    """An episode in which every text is this one: a replayed turn, then the student's."""
    ids, span = [ord("x")] * tokens, Span(list(map(ord, text)))
    played = {"observation": text, "action": text, "valid": True, "admissible": True, "cut": False}
    record = EpisodeRecord(replayed_turns=[ReplayedTurn(text, text, text)], reward=score, failure=text, outcome=text)
    record.turns = [TurnRecord(turn, refused=True, **played) for turn in range(1, turns)]
    sequence = TokenSequence([span, Span(span.ids, 0)])
    for turn in range(1, turns):
        sequence.spans += [span, Span(ids, turn, [score] * tokens, {})]
    sequence.teacher_log_probs = [-1.0] * sum(len(one.ids) for one in sequence.after_prompt)
    row = SimpleNamespace(prompt=text, label=None, metadata={"key": text, "number": score})
    return transcript(Episode(record, [sequence]), row, Characters(), arm="f2b", dataset="train", n=0, index=0)


def test_any_text_and_any_number_gives_a_line_that_can_be_read():
    text = "</script><!-- \u2028 \ud800 \x1b[31m 🐢"
    one = made_of(text, turns=2, tokens=5, score=float("nan"))
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    assert (one["kl"], one["reward"], one["turns"][1]["student"]) == (None, None, [None] * 5)
    assert one["goal"] == one["outcome"] == one["turns"][0]["response"] == text.replace("\ud800", "\\ud800")
    assert json.loads(one["task"])["key"] == text


def test_how_long_a_line_gets_is_bounded():
    one = made_of("a" * 9000 + "z", turns=30, tokens=200, score=-12.3456)
    assert sum(len(turn.get("tokens", ())) for turn in one["turns"]) == MAX_TOKENS // 200 * 200
    assert one["turns"][-1]["response"] == "x" * 200 and one["turns"][-1]["kl"] == pytest.approx(-11.3456 * 200)
    assert len(json.dumps(one)) < 0.8e6


def test_long_texts_are_cut_in_the_middle_and_characters_stand_at_their_last_token(tokenizer):
    text = "a" * 9000 + "z"
    assert len(clip(text)) <= MAX_TEXT and clip(text)[-1] == "z" and "characters left out" in clip(text)
    assert clip(clip(text)) == clip(text)
    ids = tokenizer.encode("a🐢ż", add_special_tokens=False)
    assert token_texts(ids, tokenizer) == ["a", "", "", "", "🐢", "", "ż"]
    assert "".join(token_texts(ids[:3], tokenizer)) == tokenizer.decode(ids[:3])


# ---------------------------------------------------------------------------------------------- where writing fails


@pytest.fixture
def small_disk(folder):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: that takes root, and a container that allows it")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_no_run_and_leaves_no_half_file_or_line(rig, small_disk, caplog):
    (small_disk / "ballast").write_bytes(b"x" * 65_536)
    for n in range(2):
        _, metrics = rig.rollout([{"goal": 2}], n=n)
        assert metrics["rollout/tcod/unsaved_episodes"] == 1
    assert not list((small_disk / "rollouts").iterdir())
    assert sum(message.startswith("rollouts is not written") for message in caplog.messages) == 1
    (small_disk / "ballast").unlink()
    _, metrics = rig.rollout([{"goal": 2}], n=2)
    assert metrics["rollout/tcod/unsaved_episodes"] == 0 and len(saved(small_disk, "train_000002")) == 1
    before = (small_disk / "metrics.jsonl").stat().st_size
    while run_folder.write("metrics.jsonl", "x" * 999 + "\n", append=True):
        pass
    assert ((small_disk / "metrics.jsonl").stat().st_size - before) % 1000 == 0


def test_a_folder_that_cannot_be_written_and_a_mistake_stop_no_run(rig, folder, monkeypatch, caplog):
    folder.write_text("a file, where a folder should be")
    _, metrics = rig.rollout([{"goal": 2}])
    output = evaluation(rig)
    assert metrics["rollout/tcod/unsaved_episodes"] == 1 and output.metrics["eval/tcod/t0.4/unsaved_episodes"] == 2
    assert sum(message.startswith("rollouts is not written") for message in caplog.messages) == 1
    monkeypatch.setattr(saved_episodes, "transcript", lambda *args, **about: 1 / 0)
    _, metrics = rig.rollout([{"goal": 2}])
    assert metrics["rollout/tcod/unsaved_episodes"] == 1 and "episodes are not saved" in caplog.text


def test_every_launch_adds_its_commits_and_versions(rig, folder):
    folder.mkdir()
    (folder / "about.json").write_text("{torn")
    for _ in range(2):
        rig.rollout([{"goal": 2}])
    _, launch = json.loads((folder / "about.json").read_text())["launches"]
    assert launch["versions"]["python"] and launch["versions"]["torch"] and "slime" in launch
    assert launch["recipe"].split("-")[0] == subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
