"""tools/check_environment.py: every mistake of a new environment is one sentence that names class and method."""

import json
import re
import sys
from collections import Counter

import pytest

from examples.tcod import ConfigError
from examples.tcod.episode.rows import Row
from examples.tcod.settings.checks import check_environment_class as check_class
from examples.tcod.settings.config import TcodConfig
from examples.tcod.tools import check_environment
from examples.tcod.tools.check_environment import Played, play_rows, report, spread
from examples.tcod.tools.common.prepare import Task, check_tasks
from smoke import cpu_only
from tests.support import faulty_environments

cpu_only.prepare()

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


def played(name: str, demo: dict = ROWS[0].metadata["demo"], **more) -> Played:
    return play_rows(config(name, **more), [Row("say", "say", {"n": 1, "demo": demo}, line=5)], "rows.jsonl")


def test_a_good_environment_is_played_and_measured():
    played = play_rows(config("Good", tcod_env_args={"word": "yes"}), ROWS, "rows.jsonl")
    methods = Counter(method for method, _ in played.calls)
    # Nonsense and demonstration three times, then each row twice alone and once in turn.
    assert methods == {"reset": 6 + 6, "step": 9 + 12, "finish": 6}
    assert all(seconds > 0 for _, seconds in played.calls)
    text = report([(method, 1e-4) for method, _ in played.calls], episodes=64)  # a busy machine takes longer
    assert re.search(r"tcod_env_workers: 4, tcod_envs_per_worker: 16; they take 0.0 cores", text)


@pytest.mark.parametrize(
    "name, said",
    [
        ("IsOver", "env_error: IsOver.reset begins an episode that is already over"),
        ("IsLost", "env_error: IsLost.reset begins an episode that is already over"),
        ("TextFromReset", "env_error: TextFromReset.reset must return an Observation, not str 'Say yes.'"),
        ("HalfASuccess", "env_error: the won of HalfASuccess.step's Observation is 0.5: Input should be a valid boo"),
        ("StringFromParse", "StringFromParse.parse_action must return a pair (action: str, valid: bool), not 'ok'"),
        ("LosesActions", "it must be ('yes', True)"),
        ("NotInstalled", "NotInstalled.__init__ raised ModuleNotFoundError: no_such_engine is not installed"),
        ("Exits", "env_error: Exits.reset raised SystemExit: 3"),
        ("Dies", "env_worker_died: step got no answer, its process ended"),
        ("Raises", "env_error: Raises.step raised KeyError: 'no such action'"),
        ("AnswersAsTool", "AnswersAsTool has the role tool in an Observation where no tool can be called"),
        ("ForgetsTheRole", 'ForgetsTheRole has results in an Observation without role="tool"'),
        ("NeedsArguments", "env_error: NeedsArguments.step raised KeyError: 'word'"),
        ("Blocks", "env_timeout: step took more than 2.0 s"),
    ],
)
def test_a_fault_is_one_sentence(name, said):
    message = sentence(lambda: played(name, tcod_env_timeout_s=2.0 if name == "Blocks" else 120.0))
    assert said in message
    assert message.startswith(f"{name} does not play line 5 of rows.jsonl, ")


@pytest.mark.parametrize(
    "demo, said",
    [
        ({"actions": ["no"]}, "demo_not_won: 1 actions do not reach the goal"),
        ({"actions": ["yes", "no"]}, "demo_won_early: the episode ends at replayed turn 1"),
        ({"actions": ["no", "yes"], "responses": ["no"]}, "demo_mismatch: 1 responses, 2 actions"),
    ],
)
def test_a_demonstration_that_does_not_win_is_refused(demo, said):
    assert said in sentence(lambda: played("Good", demo))


@pytest.mark.parametrize("kind", ["random", "folder", "variable", "cache"])
def test_engines_that_share_state_are_told_what_to_do(kind):
    arguments = {"tcod_env_args": {"kind": kind}}
    said = sentence(play_rows, config("SharesState", **arguments), ROWS, "f")
    assert said.startswith(
        "the environment answers otherwise where line 5 of f and line 7 of f are played in turn, on two"
    )
    assert said.endswith("or set tcod_envs_per_worker: 1")
    play_rows(config("SharesState", **arguments, tcod_envs_per_worker=1), ROWS, "f")


@pytest.mark.parametrize("kind", ["nothing", "never the same"])
def test_engines_that_share_nothing_or_never_answer_alike_pass(kind):
    play_rows(config("SharesState", tcod_env_args={"kind": kind}), ROWS, "f")


def test_recorded_answers_of_an_agent_with_tools_are_read_by_its_parser():
    settings = config("Good", tcod_tool_parser="qwen").model_copy(
        update={"tcod_environment": "tests.support.corridor.ToolCorridor", "tcod_admissible": "never"}
    )
    call = {"name": "move", "arguments": {"way": "right"}}
    for said, mismatch in ((call, False), ({**call, "arguments": {"way": "left"}}, True)):
        demo = {
            "actions": [json.dumps([call], indent=1)],
            "responses": [f"<tool_call>\n{json.dumps(said)}\n</tool_call>"],
        }
        row = Row("walk", "", {"goal": 1, "demo": demo}, line=5)
        if mismatch:
            assert "demo_mismatch: turn 1" in sentence(play_rows, settings, [row], "f")
        else:
            methods = Counter(method for method, _ in play_rows(settings, [row], "f").calls)
            # Nonsense, a call without arguments, the right one, on two engines; beside itself the right one alone.
            assert methods["step"] == 6 + 6


def test_what_training_refuses_is_refused(tmp_path, monkeypatch, capsys):
    settings, file = tmp_path / "c.yaml", tmp_path / "rows.jsonl"
    settings.write_text(f"tcod_variant: b2f\ntcod_horizon: 5\ntcod_environment: {FAULTY}.Good\n")
    monkeypatch.setattr(sys, "argv", ["check_environment", "--config", str(settings), "--rows", str(file)])
    good = {"prompt": "p", "label": "l", "metadata": {"demo": {"actions": ["yes"]}}}
    for metadata, reason in (({}, "demo_missing"), ({"demo": {"actions": ["no"] * 6}}, "demo_too_long")):
        file.write_text("\n\n".join(json.dumps(row) for row in (good, {**good, "metadata": metadata})))
        with pytest.raises(SystemExit, match=rf"1 of 2 rows .*{reason}': 1., the first is line 3 of .* 1 to 5 "):
            check_environment.main()
    file.write_text("\n".join([json.dumps(good)] * 2))
    with monkeypatch.context() as record, pytest.raises(SystemExit, match="is no file: name one for the result"):
        record.setattr(sys, "argv", [*sys.argv, "--record", str(tmp_path)])
        record.setattr(check_environment, "play_rows", None)  # before a row is played
        check_environment.main()
    check_environment.main()
    assert "2 of 2 rows play, 2 demonstrations replay" in capsys.readouterr().out


@pytest.mark.parametrize(
    "path, said",
    [
        (f"{FAULTY}.NoStaticMethod", "has a render that is no @staticmethod"),
        (f"{FAULTY}.NoCheckRow", "lacks check_row"),
        (f"{FAULTY}.NoEnvironment", "is no class derived from examples.tcod.environments.protocol.Environment"),
        (f"{FAULTY}.Missing", "cannot be imported (AttributeError: "),
        ("broken_env.Mine", "broken_env.py, line 1)"),
        ("leaving_env.Mine", "SystemExit: 1"),
        ("no_such_module.Mine", "no_such_module is not installed"),
    ],
)
def test_a_class_that_cannot_work_is_refused_before_a_process_starts(tmp_path, monkeypatch, path, said):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_env.py").write_text("def f(:\n")
    (tmp_path / "leaving_env.py").write_text("import sys; sys.exit(1)")
    assert said in sentence(check_class, TcodConfig(tcod_variant="opd", tcod_horizon=5, tcod_environment=path))


def test_arguments_that_the_class_does_not_take_are_refused():
    assert "unexpected keyword argument 'wrod'" in sentence(check_class, config("Good", tcod_env_args={"wrod": "x"}))


def test_a_prepare_tool_ends_at_once_where_no_environment_can_be_made():
    tasks = [Task("train", "say", {"n": n}) for n in range(2)]
    said = sentence(check_tasks, config("NotInstalled"), tasks, 1)
    assert said.startswith("no environment can be made: NotInstalled.__init__ raised") and "no_such_engine" in said
    check_tasks(config("Exits"), tasks, 1)  # each for itself
    assert [task.left_out[0]["reason"] for task in tasks] == ["env_error"] * 2


def test_rows_are_taken_from_all_over_the_file():
    rows = [Row(str(n), "", {}) for n in range(10)]
    assert [row.prompt for row in spread(rows, 5)] == ["0", "2", "4", "6", "8"]
    assert spread(rows, 20) == rows
