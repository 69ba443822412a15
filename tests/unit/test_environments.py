"""The text side of the environments, their rows, and what an observation may be. No engine."""

import math

import numpy
import pytest

from examples.tcod import Failure
from examples.tcod.env_alfworld import MAX_ACTION_CHARS, AlfworldEnvironment
from examples.tcod.environments.protocol import Observation, as_listed, ask, checked_observation
from examples.tcod.environments.scienceworld import ScienceworldEnvironment
from tests.support.faulty_environments import good_but

NUM_GPUS = 0
TASK = {"task": "boil", "variation": 0, "simplifications": "easy"}


@pytest.mark.parametrize(
    "response, action, valid",
    [
        ("<action>go to desk 1</action>", "go to desk 1", True),
        ("The mug is here.\n<action> take mug 1\n from desk 1 </action><|im_end|>", "take mug 1 from desk 1", True),
        ("<action>look</action> no: <action>inventory</action>", "inventory", True),
        ("I will use <action> now: <action>look</action>", "look", True),
        ("< Action >look< /ACTION >", "look", True),
        ("<action>look</action> and then <action>", "look", True),
        ("  go to\ndesk 1 ", "go to desk 1", False),
        ("<action>look", "<action>look", False),
        ("<action>  </action>", "", False),
        ("", "", False),
        ("<action>" + "look " * 1000 + "</action>", ("look " * 1000)[:MAX_ACTION_CHARS].strip(), True),
        (AlfworldEnvironment.format_action("move mug 1 to shelf 2"), "move mug 1 to shelf 2", True),
    ],
)
def test_the_last_action_tag_counts(response, action, valid):
    for environment in (AlfworldEnvironment, ScienceworldEnvironment):
        assert environment.parse_action(response) == (action, valid)


def test_an_action_that_equals_several_listed_ones_stays():
    assert as_listed("Look.", Observation("", admissible=("look", "LOOK"))) == "Look."


@pytest.mark.parametrize("first", [True, False])
def test_user_turns_list_actions_on_request(first):
    observation = Observation("You see a desk 1.", admissible=("go to desk 1", "look"))
    for environment, listed in (
        (AlfworldEnvironment, "Admissible actions: go to desk 1, look"),
        (ScienceworldEnvironment, "You can name: go to desk 1, look"),
    ):
        assert environment.render(observation, first, admissible=False) == observation.text
        assert environment.render(observation, first, admissible=True) == f"{observation.text}\n{listed}"


def test_the_system_prompts_are_short_and_show_the_format():
    prompt = AlfworldEnvironment.system_prompt({})
    assert len(prompt.split()) <= 60 and prompt.isascii()
    assert AlfworldEnvironment.parse_action(prompt) == ("go to cabinet 1", True)
    prompt = ScienceworldEnvironment.system_prompt(TASK)
    assert ScienceworldEnvironment.parse_action(prompt) == ("open door to kitchen", True)
    assert "teleport" in prompt
    assert "teleport" not in ScienceworldEnvironment.system_prompt({**TASK, "simplifications": ""})


@pytest.mark.parametrize(
    "environment, row, said",
    [
        (ScienceworldEnvironment, {**TASK, "variation": "0"}, "no variation of type int"),
        (ScienceworldEnvironment, {**TASK, "variation": True}, "no variation of type int"),
        (ScienceworldEnvironment, {**TASK, "variation": -1}, "its variation -1 is negative"),
        (ScienceworldEnvironment, {**TASK, "simplifications": "openDoors,easy"}, "have more than easy, which is all"),
        (AlfworldEnvironment, {}, "its metadata has no game_file"),
        (AlfworldEnvironment, {"game_file": "no.tw-pddl"}, "no game_file no.tw-pddl below /no/where"),
    ],
)
def test_a_row_that_cannot_be_played_is_refused(environment, row, said):
    ScienceworldEnvironment.check_row(TASK, "")
    with pytest.raises(ValueError, match=said):
        environment.check_row(row, "/no/where")


def test_an_observation_comes_in_plain_types():
    yes, half = numpy.array([True])[0], numpy.float32(0.5)
    observed = checked_observation(Observation(numpy.str_("a"), yes, yes, ["b"], ~yes, half), "E.step")
    assert observed == Observation("a", True, True, ("b",), False, 0.5)
    assert [type(value) for value in vars(observed).values()] == [str, bool, bool, tuple, bool, float, str, tuple]
    assert checked_observation(Observation("", reward=numpy.int64(1)), "E.step").reward == 1.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("text", None),
        ("text", b"bytes"),
        ("text", "half an emoji \ud83d"),
        ("won", 1),
        ("done", 0.5),
        ("refused", "no"),
        ("admissible", "yes, no"),
        ("admissible", {"in no order"}),
        ("admissible", ["\udcff"]),
        ("reward", "1"),
        ("reward", math.nan),
        ("role", "assistant"),
        ("results", "one text"),
    ],
)
def test_an_observation_of_other_types_is_refused_in_one_sentence(field, value):
    with pytest.raises(TypeError, match=rf"^the {field} of E\.step's Observation is .*: [^\n]*$"):
        checked_observation(Observation(**{"text": "", field: value}), "E.step")


TOOL = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    "method, returned",
    [
        *[("render", None), ("render", "\ud83d"), ("parse_action", ("look", 1))],
        *[("tools", TOOL), ("tools", [TOOL["function"]]), ("tools", [{**TOOL, "type": "tool"}])],
    ],
)
def test_what_the_text_side_returns_is_checked(method, returned):
    environment = good_but("Mine", **{method: staticmethod(lambda *_: returned)})
    with pytest.raises(Failure, match=f"Mine.{method} must return a ") as caught:
        ask(environment, method, "", True, True)
    assert caught.value.reason == "env_error"
