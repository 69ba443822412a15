"""The stand-in for slime behaves as slime does: one scenario (standin_scenario.py), played on it and on a checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smoke import hooks
from tests.support.toys import save_tokenizer

NUM_GPUS = 0
PROGRAM = """
import sys
from smoke import hooks
hooks.find_slime()
from tests.support import standin_scenario
standin_scenario.main(*sys.argv[1:])
"""


def play(tmp_path_factory, env):
    folder = tmp_path_factory.mktemp("scenario")
    checkpoint, out = save_tokenizer(folder / "tokenizer"), folder / "out.json"
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    env = {key: value for key, value in os.environ.items() if key != "SLIME_DIR"}
    env["PYTHONPATH"] = hooks.python_path(hooks.STANDIN)
    return play(tmp_path_factory, env)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not os.environ.get("SLIME_DIR"):
        pytest.skip("set SLIME_DIR to a checkout of slime to compare the stand-in with it")
    return play(tmp_path_factory, dict(os.environ))


def samples(rollout):
    return [sample for group in rollout["groups"] for sample in group]


def of_kind(events, kind):
    return [event for event in events if event[0] == kind]


def test_the_stand_in_ran(standin):
    assert standin["slime"] == "the minimal slime stand-in"


def test_turns_are_appended_and_aligned(standin):
    sample = next(s for s in samples(standin["epochs"]["rollouts"][0]) if s["prompt"] == "a")
    assert sample["tokens"][1:] == [30, 31, 60, 31, 31, 61] and sample["response"] == "t0|t1|"
    assert sample["loss_mask"] == [1, 1, 0, 1, 1, 0]
    assert sample["rollout_log_probs"] == [-0.5, -0.25, 0.0, -1.5, -0.25, 0.0]
    assert sample["weight_versions"] == ["w", "w"]
    assert sample["prefix_cache_info"] == {"cached_tokens": 1, "total_prompt_tokens": 1 + 4}


def test_a_data_source_shuffles_each_epoch_and_resumes(standin):
    result = standin["epochs"]
    drawn = [sample["prompt"] for rollout in result["rollouts"] for sample in samples(rollout)]
    assert drawn == ["bb", "a", "ccc"] + ["ccc", "bb", "a"] + ["ccc", "a"], "the order is a function of seed and epoch"
    assert [s["index"] for rollout in result["rollouts"] for s in samples(rollout)] == list(range(8))

    def by_source(i):
        return [
            (group[0]["index"], group[0]["prompt"]) for draw in result["later"][3 * i : 3 * i + 3] for group in draw
        ]

    went_on, loaded, fresh = by_source(0), by_source(1), by_source(2)
    assert loaded == went_on  # the group that was put back came out first
    assert [index for index, _ in fresh] == list(range(6)), "a state that does not exist leaves the start"
    assert result["lengths"] == [3, 3, 0]


def test_surplus_groups_are_aborted_and_lost(standin):
    result = standin["surplus"]
    assert result["draws"] == [4, 4]
    prompts = [[sample["prompt"] for sample in samples(rollout)] for rollout in result["rollouts"]]
    assert prompts == [["a", "a", "c", "c"]] * 2
    assert [s["index"] for s in samples(result["rollouts"][1])] == [8, 9, 12, 13], "in the order of their drawing"
    assert {event[1] for event in of_kind(result["events"], "reward")} == {"a", "c"}
    assert all(
        event[4] and event[5] == 8 for event in of_kind(result["events"], "generate")
    ), "a session and a dict each"
    assert result["state"] == [False, 0, 0]


def test_filtered_groups_are_replaced_and_counted(standin):
    result = standin["drops"]
    [rollout] = result["rollouts"]
    assert result["draws"] == [2, 2]
    assert [sample["prompt"] for sample in samples(rollout)] == ["c", "d"]
    assert rollout["metrics"]["rollout/dynamic_filter/drop_failed"] == 1
    assert rollout["metrics"]["rollout/dynamic_filter/drop_aborted"] == 1
    # FAILED is left as it is and rewarded; ABORTED and what has a reward already are not.
    rewarded = {(prompt, status) for _, prompt, _, status in of_kind(result["events"], "reward")}
    assert rewarded == {("a", "failed"), ("c", "truncated")}
    assert rollout["batch"]["truncated"] == [1, 0] and rollout["metrics"]["rollout/truncated_ratio"] == 0.5
    assert rollout["batch"]["raw_reward"] == [0.75, 0.5] and rollout["metrics"]["rollout/raw_reward"] == 0.625
    assert rollout["metrics"]["rollout/response_len/mean"] == 2.0


def test_an_evaluation_shares_its_sampling_parameters(standin):
    events, data = standin["evaluation"]["events"], standin["evaluation"]["data"]
    assert [event[5] for event in events] == [8, 9, 10, 80, 81, 82, 83]
    assert all(event[3] and not event[4] for event in events), "evaluation, and no session"
    assert data["one"]["rewards"] == [1.0, 0.25, 1.0] and data["one"]["truncated"] == [False, True, False]
    assert [sample["metadata"].get("extra") for sample in data["two"]["samples"]] == [1] * 4


def test_the_train_batch(standin):
    batch = standin["batch"]["batch"]
    assert batch["rollout_ids"] == [1, 0, 7, 7, 2]
    assert batch["loss_masks"] == [[1, 1], [0, 0], [0, 1], [1, 1], [1, 1]]
    assert batch["rollout_mask_sums"] == [2, 0, 3, 3, 2]
    assert "teacher_log_probs" not in batch
    trained = standin["surplus"]["rollouts"][0]["batch"]
    assert [len(values) for values in trained["teacher_log_probs"]] == trained["response_lengths"]


def test_appending_refuses_what_would_misalign(standin):
    refusing = {name for name, (errors, *_) in standin["appending"].items() if errors == ["ValueError"]}
    assert refusing == {
        "no log-probs",
        "unequal lengths",
        "log-probs of what is not trained",
        "earlier tokens without log-probs",
    }
    assert standin["appending"]["late mask"][1]["loss_mask"] == [1, 1, 0]


def test_an_option_the_stand_in_lacks_is_refused(standin):
    assert standin["refusal"].startswith("the slime stand-in has no partial_rollout: set SLIME_DIR")


def test_parity_with_slime(standin, real):
    assert real["slime"].startswith(f"slime at {Path(os.environ['SLIME_DIR']).resolve()} (")
    only_in_slime = set()
    compare(standin, real, "", only_in_slime)
    assert only_in_slime <= {"spec_info", "source_names", "rollout/repetition_frac", "defaults"}


def compare(ours, slimes, path, only_in_slime):
    """Everything of ours is in slime's, equal; names that only slime has are collected, its speeds aside."""
    if isinstance(ours, dict) and isinstance(slimes, dict):
        assert ours.keys() <= slimes.keys(), path
        only_in_slime |= {key for key in slimes.keys() - ours.keys() if not key.startswith("perf/")}
        for key in ours.keys() - {"slime", "refusal"}:
            compare(ours[key], slimes[key], f"{path}/{key}", only_in_slime)
    elif isinstance(ours, list) and isinstance(slimes, list):
        assert len(ours) == len(slimes), path
        for i, (mine, other) in enumerate(zip(ours, slimes, strict=True)):
            compare(mine, other, f"{path}/{i}", only_in_slime)
    else:
        assert ours == slimes, path


def test_defaults_are_slimes(real):
    missing = hooks.SLIME_DEFAULTS.keys() - real["defaults"].keys()
    assert missing == {"eval_datasets"}, "slime makes it of --eval-prompt-data and --eval-config"
    assert {name: hooks.SLIME_DEFAULTS[name] for name in real["defaults"]} == real["defaults"]


def test_rollout_args():
    args = hooks.rollout_args(rollout_batch_size=4, tcod_horizon=3)
    assert args.custom_rm_path == "examples.tcod.tcod_rollout.reward_func" and args.opd_type == "sglang"
    assert args.over_sampling_batch_size == 4 and args.n_samples_per_prompt == 1 and args.tcod_horizon == 3


def test_a_wrong_slime_dir_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIME_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no checkout of slime"):
        hooks.find_slime()
