"""The OpenEnv environment on a double of its server and, where openenv is installed, on its own."""

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

pytest.importorskip("websockets", reason="needs websockets")

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from examples.tcod import ConfigError
from examples.tcod.environments.openenv import OpenEnvEnvironment
from examples.tcod.environments.protocol import Observation, action_of, ask, checked_observation
from examples.tcod.episode.rows import Row
from examples.tcod.settings.config import TcodConfig
from examples.tcod.tools.check_environment import play_rows
from smoke import cpu_only, hooks
from smoke.servers import free_port
from tests.support.openenv_double import OpenEnvDouble

cpu_only.prepare()

NUM_GPUS = 0
SESSIONS = 8
INSTALLED = all(importlib.util.find_spec(name) for name in ("openenv", "fastmcp"))
REAL = [pytest.mark.slow, pytest.mark.skipif(not INSTALLED, reason="needs openenv")]
TASK = {"reset": {"seed": 1}, "rules": "Guess."}  # the number is 3
ACTIONS = ["5", "1", "3"]


@pytest.fixture(scope="module", params=["double", pytest.param("openenv", marks=REAL)])
def urls(request) -> Iterator[dict[str, str]]:
    """Of a server of the game that is played by text, and of one by tools."""
    with ExitStack() as stack:
        if request.param == "double":
            kinds = {"text": False, "tools": True}.items()
            yield {kind: stack.enter_context(OpenEnvDouble(tools, SESSIONS)).url for kind, tools in kinds}
        else:
            yield {kind: _start(stack, kind) for kind in ("text", "tools")}


def _start(stack: ExitStack, kind: str) -> str:
    port = free_port()
    command = [sys.executable, "-m", "tests.support.openenv_games", str(port), kind, str(SESSIONS)]
    server = stack.enter_context(subprocess.Popen(command, cwd=hooks.ROOT))
    stack.callback(server.kill)
    while True:
        assert server.poll() is None, "the server ended"
        try:
            connect(url := f"ws://127.0.0.1:{port}/ws").__enter__().close()
            return url
        except OSError:
            time.sleep(0.2)


@pytest.fixture
def new(urls) -> Iterator[Callable[..., OpenEnvEnvironment]]:
    engines = []

    def new(kind: str, **more) -> OpenEnvEnvironment:
        text = "{message} ({tries})" if kind == "text" else "{metadata[question]}"
        engines.append(OpenEnvEnvironment("", **{"url": urls[kind], "text": text, "action": "guess", **more}))
        return engines[-1]

    yield new
    for engine in engines:
        engine._session.close()


def test_an_action_is_a_text_that_fills_a_field(new):
    engine = new("text")
    assert checked_observation(engine.reset(TASK), "reset") == Observation("Which number from 1 to 8? (0)", reward=0.0)
    said = [checked_observation(engine.step(action), "step") for action in ACTIONS]
    assert [one.text for one in said] == ["Smaller. (1)", "Larger. (2)", "Right. (3)"]
    assert [(one.won, one.done, one.reward) for one in said[1:]] == [(False, False, -0.1), (True, True, 1.0)]
    assert engine.reset({**TASK, "reset": {"seed": 1, "largest": 30}}).text == "Which number from 1 to 30? (0)"


def test_an_episode_can_end_without_success(new):
    engine = new("text")
    engine.reset(TASK)
    last = [engine.step("8") for _ in range(5)][-1]
    assert (last.won, last.done, last.reward) == (False, True, -0.1)


def test_what_is_no_action_is_refused_in_the_environments_words(new):
    engine = new("text")
    engine.reset(TASK)
    said = engine.step("no such action")
    assert said.refused and said.text == "Input should be a valid integer, unable to parse string as an integer"
    assert engine.step("3").won


def test_tools_are_called_as_the_server_lists_them(new, urls):
    document = (hooks.ROOT / "examples" / "tcod" / "docs" / "HUBS.md").read_text("utf-8")
    recipe = re.findall(r"```python\n(.*?)```", document, re.DOTALL)[1]
    exec(recipe.replace("ws://127.0.0.1:8000/ws", urls["tools"]), names := {})
    engine, task = new("tools"), {**TASK, "tools": names["tools"]}
    listed = [tool["function"] for tool in ask(OpenEnvEnvironment, "tools", task)]
    assert [(tool["name"], [*tool["parameters"]["properties"]]) for tool in listed] == [
        ("guess", ["number"]),
        ("bounds", []),
    ]
    first = engine.reset(task)
    assert (first.text, first.role) == ("Which number from 1 to 8?", "user")
    guesses = [{"name": "guess", "arguments": {"number": number}} for number in (5, 3, 1)]
    asked = checked_observation(engine.step(action_of([{"name": "bounds", "arguments": {}}, guesses[0]])), "step")
    assert (asked.role, asked.results) == ("tool", ('{"smallest":1,"largest":8}', "Smaller."))
    won = checked_observation(engine.step(action_of(guesses[1:])), "step")  # the last call comes too late
    assert (won.won, won.done, won.results) == (True, True, ("Right.",))


def test_a_call_that_cannot_be_is_answered(new):
    engine = new("tools")
    engine.reset({**TASK, "tools": []})
    calls = [{"name": "gess", "arguments": {}}, {"name": "guess", "arguments": {"n": 1}}]
    said = engine.step(action_of(calls))
    assert said.results[0] == "error: Unknown tool: 'gess'" and "call[guess]" in said.results[1] and not said.done
    assert engine.step("I would call guess.") == Observation("Call a tool.", refused=True)


def test_what_the_server_cannot_do_is_an_error_in_its_words(new):
    engine = new("text")
    with pytest.raises(RuntimeError, match="OpenEnv's server says EXECUTION_ERROR: largest is below 1"):
        engine.reset({**TASK, "reset": {"largest": 0}})
    assert engine.reset(TASK).text == "Which number from 1 to 8? (0)"


@pytest.mark.parametrize(
    "option, said",
    [
        ({"action": "gess"}, "says VALIDATION_ERROR: .*'missing', 'loc': \\['guess'\\].* \\(see docs/HUBS.md\\)"),
        ({"text": "{mesage}"}, "text in tcod_env_args has not the form of {.*'message': 'Which.* .KeyError.'mesage'"),
        ({"text": "{metadata[goal]}"}, "KeyError.'goal'"),
        ({"text": "{message"}, "ValueError.*expected '}' before end of string"),
    ],
)
def test_an_option_that_does_not_fit_the_environment_is_named(new, option, said):
    engine = new("text", **option)
    with pytest.raises((RuntimeError, ValueError), match=said):
        engine.reset(TASK)
        engine.step("3")


@pytest.mark.parametrize("pause_s", [0, 0.2])  # for the server to close the last one
def test_a_full_server_says_so(new, pause_s):
    with pytest.raises(RuntimeError, match="CAPACITY_REACHED: Server at capacity: 8/8 sessions active"):
        engines = [new("text") for _ in range(SESSIONS + 1)]
        time.sleep(pause_s)
        for engine in engines:
            engine.reset(TASK)


@pytest.mark.parametrize("scheme, said", [("ws", "Connection refused"), ("http", "scheme isn't ws or wss")])
def test_no_server_is_an_error_that_names_the_url(scheme, said):
    url = f"{scheme}://127.0.0.1:{free_port()}/ws"
    with pytest.raises(OSError, match=f"no OpenEnv server answers at {url} .*{said}.*: see url in docs/HUBS.md"):
        OpenEnvEnvironment("", url=url, text="")


def test_a_server_that_ends_fails_the_episode():
    with OpenEnvDouble(tools=False, sessions=1) as server:
        engine = OpenEnvEnvironment("", url=server.url, text="{message}", action="guess")
        engine.reset(TASK)
        engine._session.socket.shutdown(2)
        with pytest.raises(ConnectionClosed):
            engine.step("3")


def test_two_sessions_are_played_by_the_checker(urls, real_ray):
    arguments = {"url": urls["text"], "text": "{message}", "action": "guess"}
    config = {"tcod_variant": "b2f", "tcod_horizon": 5, "tcod_env_args": arguments}
    environment = "examples.tcod.environments.openenv.OpenEnvEnvironment"
    played = [Row("guess", "8", {**TASK, "demo": {"actions": actions}}, line=1) for actions in (ACTIONS, ACTIONS[:2])]
    demos = play_rows(TcodConfig(tcod_environment=environment, **config), played[:1], "f").demos
    assert [demo.observations for demo in demos] == [("Smaller.", "Larger.", "Right.")]
    with pytest.raises(ConfigError, match="OpenEnvEnvironment does not play line 1 of f, demo_not_won"):
        play_rows(TcodConfig(tcod_environment=environment, **config), played[1:], "f")


@pytest.mark.parametrize("row", [{}, {"reset": {}}, {"rules": "", "reset": []}, {"rules": 3, "reset": {}}])
def test_a_row_without_a_key_is_refused(row):
    with pytest.raises(ValueError, match="has not both reset, an object, and rules, a text"):
        OpenEnvEnvironment.check_row(row, "")
