"""preflight.py: what the run script reads before a GPU is taken."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest

from tests.support.toys import LocalPool

NUM_GPUS = 0


@pytest.fixture
def preflight(place, monkeypatch):
    """check(**options) of preflight.py's checks before a GPU is taken; the message where they refuse."""
    folder, env = place
    monkeypatch.setenv("ALFWORLD_DATA", env["ALFWORLD_DATA"])
    from examples.tcod import ConfigError
    from examples.tcod.settings import build
    from examples.tcod.tools import preflight

    monkeypatch.setattr(build, "EnvironmentPool", LocalPool)
    monkeypatch.setattr(preflight, "start_ray", lambda workers: None)

    def check(**options):
        given = {"config": Path(env["CONFIG"]), "student": folder / "student", "train": folder / "data/train.jsonl"}
        given |= {"eval": [folder / "data/valid_seen.jsonl"], "apply_chat_template_kwargs": {"enable_thinking": False}}
        given |= {"megatron_teacher": None, "ray_gpus": None, "context_len": None}
        try:
            preflight.check_run(Namespace(**{**given, **options}))
        except ConfigError as error:
            return str(error)

    return folder, check


def row(**metadata):
    return json.dumps({"prompt": "door", "label": "door", "metadata": metadata}) + "\n"


def test_preflight_accepts_what_can_run(preflight):
    folder, check = preflight
    assert check() is None
    assert check(config=folder / "b2f.yaml", megatron_teacher=folder / "teacher") is None


@pytest.mark.parametrize(
    "file, text, sentence",
    [
        ("f2b.yaml", "tcod_variant: f2b\ntcod_horizon: 4\ntcod_etta: 3\n", "unknown setting tcod_etta"),
        ("f2b.yaml", "tcod_variant: f2b\ntcod_horizon: 4\nlr: 1\n", "sets lr: slime reads this file too late"),
        ("data/train.jsonl", row(goal=2) + "{\n", "line 2 of .*train.jsonl is no row"),
        ("data/train.jsonl", row(), "line 1 of .*/train.jsonl cannot be played: its .* has no goal"),
        ("data/valid_seen.jsonl", row(), "line 1 of .*/valid_seen.jsonl cannot be played"),
        ("data/train.jsonl", row(goal=1, explode=1), "does not play line 1 of .* env_error: .*the corridor collapsed"),
        ("student/chat_template.jinja", "{{ messages }}", "chat template ends an assistant turn"),
    ],
)
def test_preflight_refuses_what_cannot_run(preflight, file, text, sentence):
    folder, check = preflight
    (folder / file).write_text(text)
    assert re.search(sentence, check())


def test_a_teacher_in_megatron_has_the_students_architecture(preflight):
    folder, check = preflight
    (folder / "teacher/config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": 64}))
    message = check(megatron_teacher=folder / "teacher")
    assert "TEACHER_MODEL differs in num_hidden_layers: take a teacher of the student's architecture" in message


def test_a_context_that_the_horizon_does_not_fit_into_is_named(preflight, capsys):
    _, check = preflight
    assert check(turn_len=20, context_len=800) is None and capsys.readouterr().err == ""
    assert check(turn_len=200, context_len=800) is None
    warning = capsys.readouterr().err
    assert "MAX_CONTEXT_LEN 800 may end episodes early: 4 x MAX_TURN_LEN 200, with " in warning
    fits = int(re.search(r"responses of (\d+) tokens fit", warning)[1])
    assert check(turn_len=fits, context_len=800) is None and capsys.readouterr().err == ""
    assert check(turn_len=fits + 1, context_len=800) is None and capsys.readouterr().err


def test_the_template_arguments_are_those_of_the_run(preflight):
    _, check = preflight
    assert "enable_thinking" in check(apply_chat_template_kwargs={})


def test_thoughts_and_histories_are_those_of_the_settings(preflight, capsys):
    folder, check = preflight
    config = folder / "thinks.yaml"
    settings = (folder / "f2b.yaml").read_text()
    config.write_text(settings + "tcod_history: turns\ntcod_thoughts: keep\n")
    assert "switch thinking on" in check(config=config)
    kwargs = {"apply_chat_template_kwargs": {}}
    assert check(config=config, **kwargs) is None
    # Old thoughts are the template's to drop: one response of full length must fit, and the observations.
    assert check(config=config, **kwargs, turn_len=200, context_len=800) is None and capsys.readouterr().err == ""
    config.write_text(settings + "tcod_history: turns\ntcod_window: 1\n")
    assert check(config=config, turn_len=200, context_len=800) is None and capsys.readouterr().err == ""
    assert check(config=config, turn_len=350, context_len=800) is None
    assert "2 x MAX_TURN_LEN 350" in capsys.readouterr().err
