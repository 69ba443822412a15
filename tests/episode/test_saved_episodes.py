"""What a run leaves for people to read: some episodes of each rollout and evaluation, and about.json."""

import json
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest

from examples.tcod.records import episode_log, run_dir, run_log, tracker
from examples.tcod.records.transcript import MAX_TEXT, clip, token_texts, transcript
from smoke import hooks
from tests.episode.test_evaluation import evaluation
from tests.support.fake_sglang import generated, scored
from tests.support.rig import LEFT, RIGHT, teacher_value

NUM_GPUS = 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The run directory of a process that has played nothing yet."""
    monkeypatch.setenv("TCOD_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(run_log, "_rollout_played", False)
    monkeypatch.setattr(run_dir, "_warned", set())
    return tmp_path / "run"


def saved(folder, name):
    return [json.loads(line) for line in (folder / "rollouts" / f"{name}.jsonl").read_text().splitlines()]


def test_a_rollout_saves_what_was_shown_said_and_done(rig, folder):
    rig.script = ["hm", RIGHT, LEFT, RIGHT]
    demo = {"actions": ["right"] * 3}
    [sample], metrics = rig.rollout([{"goal": 3, "demo": demo}], n=12, tcod_variant="b2f", tcod_k_start=2)
    assert metrics["rollout/tcod/unsaved_episodes"] == 0
    [line] = saved(folder, "train_000012")
    plan = ("arm", "dataset", "n", "k", "replayed", "budget", "won", "failure", "task", "goal", "task_type")
    assert [line[key] for key in plan] == ["b2f", "train", 12, 4, 0, 4, False, None, {"goal": 3}, "walk", "walk"]
    first, second, *_ = line["turns"]
    assert (first["role"], first["observation"]) == ("student", "Goal: door 3. You are at door 0.")
    assert (first["response"], first["action"], first["valid"]) == ("hm<|im_end|>", "hm", False)
    assert (second["response"], second["action"], second["admissible"]) == (f"{RIGHT}<|im_end|>", "right", True)
    assert line["kl"] == pytest.approx(sum(turn["kl"] for turn in line["turns"]), abs=1e-3)
    assert line["outcome"] == "You are at door 1."


def test_the_spans_are_the_whole_sequence_with_its_numbers(rig, folder):
    demo = {"actions": ["right"] * 3}
    [sample], _ = rig.rollout([{"goal": 3, "demo": demo}], tcod_variant="b2f", tcod_k_start=1)
    [line] = saved(folder, "train_000000")
    assert [span["role"] for span in line["spans"]] == [
        "prompt",
        "replayed",
        "prompt",
        "replayed",
        "prompt",
        "sampled",
    ]
    assert "".join(span.get("text") or "".join(span["tokens"]) for span in line["spans"]) == rig.tokenizer.decode(
        sample.tokens
    )
    assert sum(span["count"] for span in line["spans"]) == len(sample.tokens)
    sampled = line["spans"][-1]
    assert sampled["student"] == pytest.approx(sample.rollout_log_probs, abs=1e-4)
    assert sampled["teacher"] == pytest.approx(sample.teacher_log_probs, abs=1e-4)
    assert [turn["role"] for turn in line["turns"]] == ["replayed", "replayed", "student"]
    assert line["turns"][1]["response"] == RIGHT


def test_won_lost_and_failed_episodes_are_saved_with_their_reasons(rig, folder, over_sampling):
    calls = iter(range(100))
    rig.teacher_reply = lambda payload: {"error": "?"} if next(calls) == 0 else scored(payload, teacher_value)
    rows = [{"goal": goal} for goal in (1, 2, 3, 9, 8)] + [{"goal": 3, "explode": 2}]
    rig.rollout(rows, n=3, rollout_batch_size=4, over_sampling_batch_size=6, tcod_save_episodes=4)
    lines = saved(folder, "train_000003")
    endings = [line["failure"] or ("won" if line["won"] else "lost") for line in lines]
    assert endings == ["won", "lost", "env_error", "teacher_invalid"]
    broken, unscored = lines[2:]
    assert [turn["action"] for turn in broken["turns"]] == ["right", "right"] and broken["spans"] == []
    assert "collapsed" in broken["detail"]
    assert unscored["turns"] and unscored["spans"][1]["teacher"] is None and unscored["kl"] is None


def test_an_evaluation_saves_its_data_sets_under_the_n_of_the_metrics(rig, folder):
    output = evaluation(rig, temperatures=(0.4, 1.0), tcod_eval_kl=True)
    assert [line["won"] for line in saved(folder, "eval_t0.4_000000")] == [True, False]
    assert output.metrics["eval/tcod/t1/unsaved_episodes"] == 0
    rig.rollout([{"goal": 2}])
    evaluation(rig, temperatures=(0.4, 1.0), tcod_eval_kl=True)  # slime gives it the id of the one before
    lines = saved(folder, "eval_t1_000001")
    assert {line["n"] for line in lines} == {1} and all(line["kl"] is not None for line in lines)
    assert all(line["kl"] is None for line in saved(folder, "eval_t0.4_000001"))


def sample_of(goal, ending="lost", index=0):
    record = {"won": ending == "won", "failure": None if ending in ("won", "lost") else ending}
    status = SimpleNamespace(value="aborted" if ending == "aborted" else "completed")
    return SimpleNamespace(metadata={"goal": goal, "demo": {"actions": [index]}, "tcod": record}, status=status)


def test_the_choice_prefers_the_same_tasks_and_takes_every_ending():
    steps = [[sample_of(goal) for goal in order] for order in (range(50), range(49, -1, -1))]
    first, second = ([sample.metadata["goal"] for sample in episode_log.choose(step, 8)] for step in steps)
    assert first == second and len(set(first)) == 8
    rare = [sample_of(51, "won"), sample_of(52, "env_error"), sample_of(53, "aborted")]
    chosen = episode_log.choose(steps[0] + rare, 8)
    assert [sample.metadata["goal"] for sample in chosen[1::-1]] == [first[0], 51]
    assert {sample.metadata["goal"] for sample in chosen[2:]} == {52, *first[1:6]}
    group = [sample_of(1, index=i) for i in range(4)] + [sample_of(2)]
    assert {sample.metadata["goal"] for sample in episode_log.choose(group, 2)} == {1, 2}
    assert len(episode_log.choose(group, "all")) == 5
    assert episode_log.choose([SimpleNamespace(metadata={})], 8) == []


def test_nothing_is_saved_without_a_run_directory_or_where_none_is_wanted(rig, folder, monkeypatch):
    rig.rollout([{"goal": 2}], tcod_save_episodes=0)
    assert not (folder / "rollouts").exists()
    monkeypatch.delenv("TCOD_RUN_DIR")
    _, metrics = rig.rollout([{"goal": 2}])
    assert not (folder / "rollouts").exists() and metrics["rollout/tcod/unsaved_episodes"] == 0


# ------------------------------------------------------------------------------------------------------ hostile text


HOSTILE = "</script><!-- \u2028 \ud800 \x1b[31m 🐢"


class Characters:
    """A tokenizer: one token per character."""

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


def test_broken_surrogates_and_numbers_that_are_none_do_not_break_a_line(folder):
    tokens = [ord(character) for character in HOSTILE]
    turn = {"turn": 0, "start": 0, "end": 5, "observation": HOSTILE, "action": HOSTILE}
    turn |= {"valid": True, "admissible": True, "cut": False}
    sample = SimpleNamespace(
        **{"index": 0, "prompt": HOSTILE, "label": None, "tokens": tokens, "response_length": 5, "loss_mask": [1] * 5},
        **{"rollout_log_probs": [float("nan")] * 5, "teacher_log_probs": [-1.0] * 5},
        metadata={"goal": HOSTILE, "tcod": {"turns": [turn]}},
    )
    line = transcript(sample, Characters())
    assert line["spans"][-1]["student"] == [None] * 5 and line["kl"] is None
    assert run_dir.write("a.jsonl", json.dumps(line), "episodes")
    assert json.loads((folder / "a.jsonl").read_text()) == line


def test_a_character_of_several_tokens_stands_at_the_last_of_them(tokenizer):
    ids = tokenizer.encode("a🐢ż", add_special_tokens=False)
    assert token_texts(ids, tokenizer) == ["a", "", "", "", "🐢", "", "ż"]
    assert "".join(token_texts(ids[:3], tokenizer)) == tokenizer.decode(ids[:3])


def test_long_texts_are_cut_in_the_middle():
    text = "a" * 9000 + "z"
    assert len(clip(text)) <= MAX_TEXT and clip(text)[-1] == "z" and "characters left out" in clip(text)


# ---------------------------------------------------------------------------------------------- where writing fails


@pytest.fixture
def small_disk(folder):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: that takes root, and a container that allows it")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_no_run(rig, small_disk, caplog):
    (small_disk / "ballast").write_bytes(b"x" * 65_536)
    for n in range(2):
        _, metrics = rig.rollout([{"goal": 2}], n=n)
        assert metrics["rollout/tcod/unsaved_episodes"] == 1
    assert not list((small_disk / "rollouts").iterdir())
    assert sum(message.startswith("episodes are not written") for message in caplog.messages) == 1
    (small_disk / "ballast").unlink()
    _, metrics = rig.rollout([{"goal": 2}], n=2)
    assert metrics["rollout/tcod/unsaved_episodes"] == 0 and len(saved(small_disk, "train_000002")) == 1


def test_a_line_that_does_not_fit_leaves_no_half(small_disk):
    with (small_disk / "metrics.jsonl").open("w") as file:
        while run_dir.write("metrics.jsonl", "x" * 999 + "\n", "metrics", append=True):
            pass
    assert (small_disk / "metrics.jsonl").stat().st_size % 1000 == 0
    assert file.closed


def test_a_folder_that_cannot_be_written_stops_no_run(rig, folder, caplog):
    folder.write_text("a file, where a folder should be")
    _, metrics = rig.rollout([{"goal": 2}])
    output = evaluation(rig)
    assert metrics["rollout/tcod/unsaved_episodes"] == 1 and output.metrics["eval/tcod/t0.4/unsaved_episodes"] == 2
    assert sum(message.startswith("episodes are not written") for message in caplog.messages) == 1


def test_a_mistake_while_saving_stops_no_run(rig, folder, monkeypatch, caplog):
    monkeypatch.setattr(episode_log, "transcript", lambda sample, tokenizer: 1 / 0)
    _, metrics = rig.rollout([{"goal": 2}])
    assert metrics["rollout/tcod/unsaved_episodes"] == 1 and "episodes are not saved" in caplog.text


# ------------------------------------------------------------------------------------------------ about.json, tracker


def test_every_launch_says_what_ran(rig, folder):
    changes = {"wandb_key": "hush", "rm_url": rig.teacher.url.replace("http://", "http://me:hush@") + "/generate"}
    for _ in range(2):
        rig.rollout([{"goal": 2}], wandb_key="hush")
    from examples.tcod.records.about import write_about

    write_about(rig.args([{"goal": 2}], **changes))
    text = (folder / "about.json").read_text()
    first, second, third = json.loads(text)["launches"]
    assert "hush" not in text and third["slime_arguments"]["rm_url"].startswith("http://SECRET@")
    assert second["settings"]["tcod_horizon"] == 4 and second["slime_arguments"]["rollout_batch_size"] == 1
    assert len(second["recipe"]["sha256"]) == 64 and second["versions"]["python"] and second["versions"]["torch"]
    assert "pytest" in second["command"]


def test_the_command_is_kept_without_its_secrets(monkeypatch):
    from examples.tcod.records import about

    monkeypatch.setattr(about, "_command", lambda: "python train.py --wandb-key hush --input-key prompt --lr 1")
    args = hooks.rollout_args(tcod_variant="opd", tcod_horizon=4, tcod_data_root="/")
    assert about.describe(args)["command"] == "python train.py --wandb-key SECRET --input-key prompt --lr 1"


def test_tensorboard_gets_the_first_episodes_as_a_table_of_harmless_text(monkeypatch):
    logged = []
    writer = SimpleNamespace(add_text=lambda *call: logged.append(call))
    modules = {
        "slime.observability.metric_utils": SimpleNamespace(compute_rollout_step=lambda args, n: n),
        "slime.observability.tensorboard_utils": SimpleNamespace(
            _TensorboardAdapter=lambda args: SimpleNamespace(_writer=writer)
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    one = {"goal": f"[x](http://y) {HOSTILE}", "failure": None, "won": True, "k": 1, "replayed": 0, "kl": 0.5}
    one |= {"turns": [{"role": "replayed", "action": "go | on"}], "outcome": "done"}
    tracker.show_table(Namespace(use_tensorboard=True), "train", 7, [one] * 9)
    [(name, text, step)] = logged
    assert (name, step, len(text.split("\n"))) == ("rollout/tcod/episodes", 7, 2 + tracker.ROWS)
    assert "](" not in text and "</script>" not in text and "go &#124; on<br>done" in text
    text.encode()


def test_wandb_gets_a_table_and_its_step_and_no_error_leaves(monkeypatch, caplog):
    logged = []
    table = lambda columns, data: (columns, data)  # noqa: E731
    modules = {
        "slime.observability.metric_utils": SimpleNamespace(compute_rollout_step=lambda args, n: n),
        "wandb": SimpleNamespace(Table=table, log=logged.append),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    one = {"goal": HOSTILE, "failure": "env_error", "won": False, "k": None, "replayed": 0, "kl": None}
    one |= {"turns": [], "outcome": ""}
    tracker.show_table(Namespace(use_wandb=True), "eval_unseen", 7, [one])
    [entry] = logged
    assert entry["eval/step"] == 7 and entry["eval/tcod/unseen/episodes"][1][0][1] == "env_error"
    tracker.show_table(Namespace(use_wandb=True), "train", 7, [{}])
    assert "the tracker gets no table of episodes" in caplog.text


def test_an_aborted_evaluation_request_is_saved_with_its_reason(rig, folder):
    rig.student.reply = lambda payload: generated([], [], finish="abort")
    evaluation(rig)
    assert {line["failure"] for line in saved(folder, "eval_t0.4_000000")} == {"engine_aborted"}
