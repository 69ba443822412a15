"""tools/check_environment.py: every mistake of a new environment is one sentence that names class and method."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.tcod import ConfigError
from examples.tcod.episode.rows import Row
from examples.tcod.settings.checks import check_environment_class as check_class
from examples.tcod.settings.config import TcodConfig
from examples.tcod.tools import check_environment
from examples.tcod.tools.check_environment import play_rows, report, spread
from smoke import hooks
from tests.support import faulty_environments

NUM_GPUS = 0
pytestmark = pytest.mark.usefixtures("real_ray")
FAULTY = faulty_environments.__name__
ROWS = [Row("say", "say", {"n": n, "tcod": {}, "demo": {"actions": ["no", "yes"]}}, line=n) for n in (5, 7)]


def config(name: str, **more) -> TcodConfig:
    return TcodConfig(tcod_variant="opd", tcod_horizon=5, tcod_environment=f"{FAULTY}.{name}", **more)


def sentence(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_environment_is_played_and_measured():
    cost = play_rows(config("Good", tcod_env_args={"word": "yes"}), ROWS, "rows.jsonl")
    assert len(cost.resets) == 6 and len(cost.steps) == 9
    assert cost.memory_mb[0] > 20 and not cost.printed
    text = report(cost, episodes=64)
    assert re.search(r"tcod_env_workers: 4, tcod_engines_per_worker: 16; they take [\d.]+ GB and 0.0 cores", text)


def test_numpys_bools_are_bools():
    rows = [Row("say", "say", {"demo": {"actions": ["yes"]}})]
    assert len(play_rows(config("NumpyBools"), rows, "rows.jsonl").steps) == 4


@pytest.mark.parametrize(
    "name, said",
    [
        ("TextFromReset", "env_error: TextFromReset.reset must return an Observation, not str 'Say yes.'"),
        ("TupleFromStep", "env_error: TupleFromStep.step must return an Observation, not tuple "),
        ("NoText", "env_error: the text of NoText.reset's Observation is None: Input should be a valid string"),
        (
            "HalfASuccess",
            "env_error: the won of HalfASuccess.step's Observation is 0.5: Input should be a valid boolean",
        ),
        (
            "HalfAnEmoji",
            "the text of HalfAnEmoji.reset's Observation is 'Say \\ud83d.': Value error, 'utf-8' codec can't encode",
        ),
        (
            "ListInOneString",
            "the admissible of ListInOneString.reset's Observation is 'yes, no': Input should be a valid ",
        ),
        ("AsyncReset", "AsyncReset.reset must return an Observation, not coroutine <coroutine object"),
        ("StringFromParse", "StringFromParse.parse_action must return a pair (action: str, valid: bool), not 'ok'"),
        ("LosesActions", "it must be ('yes', True)"),
        (
            "NotInstalled",
            "env_error: NotInstalled.__init__ raised ModuleNotFoundError: no_such_engine is not installed",
        ),
        ("Exits", "env_error: Exits.reset raised SystemExit: 3; it printed 'cannot read the game'"),
        ("Interrupts", "env_error: Interrupts.step raised KeyboardInterrupt"),
        ("Dies", "env_worker_died: step got no answer, its process ended"),
        ("Raises", "env_error: Raises.step raised KeyError: 'no such action'"),
    ],
)
def test_a_fault_is_one_sentence(name, said):
    message = sentence(play_rows, config(name), ROWS, "rows.jsonl")
    assert said in message
    assert message.startswith(f"{name} does not play line 5 of rows.jsonl, ")


def test_an_engine_that_blocks_is_a_timeout():
    settings = config("Blocks", tcod_env_timeout_s=2.0)
    assert "env_timeout: step took more than 2.0 s" in sentence(play_rows, settings, ROWS, "rows.jsonl")


def test_an_engine_that_prints_is_told_of():
    cost = play_rows(config("Prints"), ROWS, "rows.jsonl")
    assert "the engine prints, which training does not show: " in report(cost, 64) and "DEBUG yes" in cost.printed


@pytest.mark.parametrize(
    "demo, said",
    [
        ({"actions": ["no"]}, "demo_not_won: 1 actions do not reach the goal"),
        ({"actions": ["yes", "no"]}, "demo_won_early: the episode ends at replayed turn 1"),
        ({"actions": ["no", "yes"], "responses": ["no"]}, "demo_mismatch: 1 responses, 2 actions"),
    ],
)
def test_a_demonstration_that_does_not_win_is_refused(demo, said):
    assert said in sentence(play_rows, config("Good"), [Row("say", "say", {"demo": demo})], "rows.jsonl")


@pytest.mark.parametrize(
    "metadata, said",
    [
        ({}, "1 of 2 rows have no usable demonstration {'demo_missing': 1}, the first is line 3 of "),
        ({"demo": {"actions": ["no"] * 6}}, "{'demo_too_long': 1}, the first is line 3 of "),
        ({"demo": {"actions": ["no", "yes"]}}, None),
    ],
)
def test_what_training_refuses_is_refused(tmp_path, monkeypatch, capsys, metadata, said):
    (tmp_path / "c.yaml").write_text(f"tcod_variant: b2f\ntcod_horizon: 5\ntcod_environment: {FAULTY}.Good\n")
    good = {"prompt": "p", "label": "l", "metadata": {"demo": {"actions": ["yes"]}}}
    lines = [json.dumps(row) for row in (good, {**good, "metadata": metadata})]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines))
    command = ["check_environment", "--config", str(tmp_path / "c.yaml"), "--rows", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", command)
    if said is None:
        check_environment.main()
        assert "2 of 2 rows play, 2 demonstrations replay" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        check_environment.main()
    assert said in str(stop.value) and str(stop.value).endswith("b2f needs one of 1 to 5 (tcod_horizon) actions")


@pytest.mark.parametrize(
    "name, said",
    [
        ("NoStaticMethod", "has a render that is no @staticmethod"),
        ("NoCheckRow", "lacks check_row"),
        ("NoEnvironment", "is no class derived from examples.tcod.environments.protocol.Environment"),
        ("Missing", "cannot be imported (AttributeError: "),
    ],
)
def test_a_class_that_cannot_work_is_refused_before_a_process_starts(name, said):
    assert said in sentence(check_class, config(name))


def test_modules_and_arguments_that_cannot_work(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {"broken_env": "def f(:\n", "leaving_env": "import sys; sys.exit(1)"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    path = {"tcod_variant": "opd", "tcod_horizon": 5}
    broken = sentence(check_class, TcodConfig(**path, tcod_environment="broken_env.Mine"))
    assert re.search(r"cannot be imported \(SyntaxError: .*broken_env.py, line 1\)", broken)
    assert "SystemExit: 1" in sentence(check_class, TcodConfig(**path, tcod_environment="leaving_env.Mine"))
    assert "no_such_module is not installed" in sentence(
        check_class, TcodConfig(**path, tcod_environment="no_such_module.Mine")
    )
    assert "unexpected keyword argument 'wrod'" in sentence(check_class, config("Good", tcod_env_args={"wrod": "x"}))


def test_the_command_leaves_no_process_behind(tmp_path):
    (tmp_path / "c.yaml").write_text(f"tcod_variant: opd\ntcod_horizon: 5\ntcod_environment: {FAULTY}.Good\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "label": "l", "metadata": {"demo": {"actions": ["yes"]}}}\n')
    command = [sys.executable, "-m", "examples.tcod.tools.check_environment", "--config", str(tmp_path / "c.yaml")]
    # Every process that it starts has this variable.
    env = {**os.environ, "PYTHONPATH": str(hooks.ROOT), "CHECK_ENVIRONMENT_TEST": str(tmp_path)}
    done = subprocess.run(
        [*command, "--rows", str(tmp_path / "rows.jsonl")], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "for 64 episodes at once" in done.stdout, done.stderr
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if str(tmp_path).encode() in _read(path)]
    assert not left


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


def test_rows_are_taken_from_all_over_the_file():
    rows = [Row(str(n), "", {}) for n in range(10)]
    assert [row.prompt for row in spread(rows, 5)] == ["0", "2", "4", "6", "8"]
    assert spread(rows, 20) == rows
