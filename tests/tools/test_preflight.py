"""preflight.py: what the run script reads before a GPU is taken, and when the teacher is up."""

import json
import re
import sys

import pytest

from examples.tcod import ConfigError
from examples.tcod.settings import build
from examples.tcod.tools.launch import preflight
from tests.support.fake_sglang import FakeSGLang, generated
from tests.support.run_script import commands
from tests.support.toys import LocalPool

NUM_GPUS = 0


@pytest.fixture
def check(settings, tmp_path, monkeypatch):
    """check(more settings, **variables) of what needs no GPU: the sentence where it is refused."""
    monkeypatch.setenv("ALFWORLD_DATA", f"{tmp_path}/games")
    monkeypatch.setattr(build, "EnvironmentPool", LocalPool)
    monkeypatch.setattr(preflight, "start_ray", lambda workers: None)

    def check(more="", **variables):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/tcod.yaml").write_text((tmp_path / "alfworld.yaml").read_text() + more)
        s = settings(**variables)
        try:
            config = preflight.TcodConfig.read(s.run_dir / "tcod.yaml")
            chat = preflight.student_chat(config, str(s.student), s.chat_template_kwargs, "STUDENT")
            preflight.check_run(s, config, chat, "")
        except ConfigError as error:
            return str(error)

    return check


def row(**metadata):
    return json.dumps({"prompt": "door", "label": "door", "metadata": metadata}) + "\n"


def test_preflight_accepts_what_can_run(check):
    assert check() is None
    assert check("tcod_variant: b2f\n", TEACHER="megatron") is None


def test_imitation_asks_no_environment(check, monkeypatch):
    monkeypatch.setattr(preflight, "check_cluster", lambda s, gpus, games: games)
    monkeypatch.setattr(preflight, "check_training_rows", lambda *_: None)
    monkeypatch.setattr(preflight, "play_rows", None)
    assert check("tcod_variant: sft\n", RAY_ADDRESS="a:1", VARIANT="sft", TEACHER="none") is None


def test_a_note_and_its_teacher_fit_each_other(check):
    """Which do not: test_configuration.py."""
    assert check("tcod_teacher_sees: hindsight\n", TEACHER="self") is None
    assert "needs MODE=sync" in check("tcod_teacher_sees: hindsight\n", TEACHER="self", MODE="async")
    assert "no note for the teacher can be written" in check("tcod_teacher_sees: hindsight\ntcod_note_len: 9\n")


@pytest.mark.parametrize(
    "file, text, sentence",
    [
        ("data/train.jsonl", row(), "line 1 of .*/train.jsonl cannot be played: its .* has no goal"),
        ("data/valid_seen.jsonl", row(), "line 1 of .*/valid_seen.jsonl cannot be played"),
        ("data/train.jsonl", row(goal=1, explode=1), "does not play line 1 of .* env_error: .*the corridor collapsed"),
        ("student/chat_template.jinja", "{{ messages }}", "chat template ends an assistant turn"),
        ("student/tokenizer.json", "version https://git-lfs", "STUDENT .*/student: .*; name the checkpoint that is"),
    ],
)
def test_preflight_refuses_what_cannot_run(check, tmp_path, file, text, sentence):
    (tmp_path / file).write_text(text)
    assert re.search(sentence, check())


def test_a_teacher_in_megatron_has_the_students_architecture(check, tmp_path):
    (tmp_path / "teacher/config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": 64}))
    missing = check(TEACHER="megatron", TEACHER_MODEL=f"{tmp_path}/none", TEACHER_LOAD=f"{tmp_path}/teacher")
    assert missing == f"no file {tmp_path}/none/config.json: set TEACHER_MODEL to a checkpoint"
    message = check(TEACHER="megatron")
    assert "TEACHER_MODEL differs in num_hidden_layers: take a teacher of the student's architecture" in message


def test_a_context_that_the_horizon_does_not_fit_into_is_named(check, capsys):
    assert check(MAX_TURN_LEN="20", MAX_CONTEXT_LEN="800") is None and capsys.readouterr().err == ""
    assert check(MAX_TURN_LEN="200", MAX_CONTEXT_LEN="800") is None
    warning = capsys.readouterr().err
    assert "MAX_CONTEXT_LEN 800 may end episodes early: the horizon's 4 x MAX_TURN_LEN 200 and " in warning
    fits = int(re.search(r"responses of (\d+) tokens fit", warning)[1])
    assert check(MAX_TURN_LEN=str(fits), MAX_CONTEXT_LEN="800") is None and capsys.readouterr().err == ""
    assert check(MAX_TURN_LEN=str(fits + 1), MAX_CONTEXT_LEN="800") is None and capsys.readouterr().err


def test_thoughts_histories_and_template_arguments_are_those_of_the_run(check, capsys):
    assert "enable_thinking" in check(CHAT_TEMPLATE_KWARGS="{}")
    keep, variables = "tcod_history: turns\ntcod_thoughts: keep\n", {
        "CHAT_TEMPLATE_KWARGS": "{}",
        "MAX_CONTEXT_LEN": "800",
    }
    assert "switch thinking on" in check(keep)
    # Old thoughts are the template's to drop: one response of full length must fit, and the observations.
    assert check(keep, MAX_TURN_LEN="200", **variables) is None and capsys.readouterr().err == ""
    window = "tcod_history: turns\ntcod_window: 1\n"
    assert check(window, MAX_TURN_LEN="200", MAX_CONTEXT_LEN="800") is None and capsys.readouterr().err == ""
    assert check(window, MAX_TURN_LEN="350", MAX_CONTEXT_LEN="800") is None
    assert "2 x MAX_TURN_LEN 350" in capsys.readouterr().err


def test_the_teacher_is_waited_for_and_checked(place, tokenizer, monkeypatch):
    folder, _ = place

    def reply(payload):
        ids = enumerate(tokenizer.encode(payload["text"], add_special_tokens=False))
        return generated([], [], input_token_logprobs=[[None if i == 0 else -0.5, token, None] for i, token in ids])

    with FakeSGLang(reply) as server:
        server.pages |= {"/health_generate": {}, "/server_info": {"max_req_input_len": 30_000}}
        for name, text in commands(
            place, TEACHER_PORT=str(server.port), TEACHER_START_S="1", HF_TOKEN="hush"
        ).env.items():
            monkeypatch.setenv(name, text)
        (folder / "run").mkdir()
        (folder / "run/tcod.yaml").write_text((folder / "alfworld.yaml").read_text())
        monkeypatch.setattr(preflight, "check_run", lambda *_: ["10.0.0.7", "10.0.0.8"])
        monkeypatch.setattr(sys, "argv", ["preflight", f"{folder}/nodes", "6,7"])
        preflight.main()
        assert (folder / "nodes").read_text() == "10.0.0.7\n10.0.0.8"
        server.reply = lambda payload: reply({"text": payload["text"].upper()})
        with pytest.raises(SystemExit, match="^preflight: .* use a model with the student's tokenizer"):
            preflight.main()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^preflight: not with SECRET$"):
        patch.setattr(preflight, "check_run", lambda s, *_: preflight.require(False, f"not with {s.hf_token}"))
        preflight.main()
    with pytest.raises(SystemExit, match="the teacher was not ready within TEACHER_START_S=1 seconds: see its log"):
        preflight.main()
