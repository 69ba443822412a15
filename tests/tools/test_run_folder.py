"""RUN_DIR: its lock, and which run goes on in it."""

import errno
import fcntl
import json
import resource
from pathlib import Path

import pytest
import yaml

from examples.tcod import ConfigError
from examples.tcod.tools.launch import folder
from examples.tcod.tools.launch.variables import read_tcod
from tests.support.run_script import checkpoint

NUM_GPUS = 0
PLACES = {"tcod_data_root", "tcod_teacher_url", "tcod_eval_kl", "tcod_save_plain_scores"}  # other tests have them


def test_a_run_dir_is_locked_where_that_can_be_done(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file/below", Path("/proc/run")):
        with pytest.raises(ConfigError, match=f"RUN_DIR {run_dir} cannot be written .*: set another one"):
            folder.lock(run_dir)
    held = r"has a run that goes on \(process \d+ on .*\): wait"
    with folder.lock(tmp_path), pytest.raises(ConfigError, match=held):
        folder.lock(tmp_path)
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        refuse = OSError(number, "no locks")
        monkeypatch.setattr(fcntl, "flock", lambda *_, refuse=refuse: (_ for _ in ()).throw(refuse))
        folder.lock(tmp_path).close()
        assert "no locks" in capsys.readouterr().err


@pytest.fixture
def resume(settings, tmp_path, monkeypatch):
    """resume(**changes) of a run that left a checkpoint: None, or why it is not the same run."""
    monkeypatch.setenv("ALFWORLD_DATA", f"{tmp_path}/games")

    def begin(**changes):
        s = settings(**changes)
        try:
            folder.begin(s, read_tcod(s, {"VARIANT": "f2b", **changes}), "")
        except ConfigError as error:
            return str(error)

    assert begin() is None
    checkpoint(tmp_path / "run", 24)
    return begin


def test_a_run_goes_on_with_other_ways_to_run_it(resume, tmp_path):
    free = {"NUM_ROLLOUT": "500", "EVAL_INTERVAL": "5", "SAVE_INTERVAL": "5", "ACTOR_GPUS": "2", "LR": "1"}
    free["EVAL_TEMPERATURE"] = "1"
    assert resume(**free, TEACHER_URL="http://a:1") is None
    config = (tmp_path / "alfworld.yaml").read_text()
    remedies = "".join(f"{name}: 1\n" for name in sorted((folder.FREE | folder.FREE_OF_A_RUN) - PLACES))
    (tmp_path / "alfworld.yaml").write_text(config + remedies)
    assert resume() is None
    (tmp_path / "alfworld.yaml").write_text(config)
    for name in ("data", "student"):  # what counts is what they hold
        (tmp_path / name).rename(tmp_path / f"{name}2")
    moved = {"DATA_DIR": f"{tmp_path}/data2", "STUDENT": f"{tmp_path}/student2"}
    assert resume(**moved, EVAL_SETS="") is None
    config = yaml.safe_load((tmp_path / "alfworld.yaml").read_text())
    (tmp_path / "alfworld.yaml").write_text("# the same\n" + json.dumps(dict(reversed(config.items()))))
    (tmp_path / "run/tcod.yaml").chmod(0o644)
    assert resume(**moved) is None
    for name in ("tcod.yaml", "run.yaml", *(f"logs/{logs.name}" for logs in (tmp_path / "run/logs").iterdir())):
        assert (tmp_path / "run" / name).stat().st_mode & 0o077 == 0, name  # there may be a key in it


def test_the_workers_of_an_environment_among_several_may_change(resume, tmp_path):
    begun, config = tmp_path / "run/run.yaml", (tmp_path / "alfworld.yaml").read_text()
    begun.unlink()
    for workers in (1, 2):
        entry = f"tcod_environments:\n  all: {{tcod_env_workers: {workers}, tcod_horizon: 3}}\n"
        (tmp_path / "alfworld.yaml").write_text(config + entry)
        assert resume() is None
        written = yaml.safe_load(begun.read_text())
        assert written["tcod_environments"] == {"all": {"tcod_horizon": 3}}
        written["tcod_environments"]["all"]["tcod_env_workers"] = 7  # as earlier versions wrote it
        begun.write_text(yaml.safe_dump(written))
    assert resume() is None
    (tmp_path / "alfworld.yaml").write_text(config + entry.replace("3}", "4}"))
    assert "has a run with another tcod_environments: take it back" in resume()


def test_a_model_counts_by_its_files_wherever_they_lie(tmp_path):
    """A checkpoint of Megatron has them in a folder of its own."""
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "__0_0.distcp").write_bytes(b"weights")
    before = folder.digest(tmp_path, "TEACHER_MODEL")
    (tmp_path / "iter_0000001" / "__0_0.distcp").write_bytes(b"others!")
    assert folder.digest(tmp_path, "TEACHER_MODEL") != before


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"ETA": "2"}, "tcod_eta"),
        ({"VARIANT": "b2f", "ETA": "2"}, "tcod_eta, tcod_variant"),
        ({"SAMPLES_PER_TASK": "2"}, "SAMPLES_PER_TASK"),
        (
            {"TEACHER": "none", "REWARD_COEF": "1", "SAMPLES_PER_TASK": "2"},
            "SAMPLES_PER_TASK, TEACHER, tcod_reward_coef",
        ),
        ({"MAX_TURN_LEN": "100"}, "MAX_TURN_LEN"),
        ({"CHAT_TEMPLATE_KWARGS": "{}"}, "CHAT_TEMPLATE_KWARGS"),
        ({"other": "data/train.jsonl"}, "DATA_DIR"),
        ({"other": "data/valid_seen.jsonl"}, "EVAL_SETS seen"),
        ({"other": "student/tokenizer.json"}, "STUDENT"),
        ({"other": "teacher/model.safetensors"}, "TEACHER_MODEL"),
    ],
)
def test_another_run_is_not_continued(resume, tmp_path, changes, what):
    if other := changes.pop("other", None):
        (tmp_path / other).write_text((tmp_path / other).read_text() + " ")
    assert resume(**changes) == f"{tmp_path}/run has a run with another {what}: take it back, or set another RUN_DIR"


def test_a_start_on_a_full_disk_loses_nothing_of_the_last_one(resume, tmp_path):
    names, limit = ("run.yaml", "tcod.yaml"), resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = [(tmp_path / "run" / name).read_text() for name in names]

    with pytest.raises(OSError):
        resource.setrlimit(resource.RLIMIT_FSIZE, (9, limit[1]))  # bytes of a file
        try:
            resume()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [(tmp_path / "run" / name).read_text() for name in names] == kept
    for text in ("", "tcod_eta: [", "\x00"):
        (tmp_path / "run/run.yaml").write_text(text)
        assert "run.yaml is damaged, and says no more what the run is made of: move it away" in resume()


def test_what_a_start_needs_is_named_before_anything_runs(resume, tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", "games")
    monkeypatch.chdir(tmp_path)  # where it is there
    assert "tcod_data_root games depends on the current folder: give the whole path" in resume()
    monkeypatch.setenv("ALFWORLD_DATA", f"{tmp_path}/games")
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").unlink()
    assert resume(STUDENT_LOAD=f"{tmp_path}/249") == f"nothing there, {tmp_path}/249: set STUDENT_LOAD"


def test_a_checkpoint_without_the_position_in_the_data_is_refused(resume, tmp_path):
    checkpoint(tmp_path / "run", 49).unlink()
    assert f"checkpoint 49 has no {tmp_path}/run/checkpoints/rollout/global_dataset_state_dict_49.pt, the" in resume()
