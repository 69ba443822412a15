"""The texts of the ALFWorld environment: prompt, user turns, and what a response's action is. No engine."""

import re

import pytest

from examples.tcod.env_alfworld import MAX_ACTION_CHARS, AlfworldEnvironment
from examples.tcod.environments.protocol import Observation

NUM_GPUS = 0


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
    ],
)
def test_the_last_action_tag_counts(response, action, valid):
    assert AlfworldEnvironment.parse_action(response) == (action, valid)


def test_a_formatted_action_parses_back():
    action = "move mug 1 to shelf 2"
    assert AlfworldEnvironment.parse_action(AlfworldEnvironment.format_action(action)) == (action, True)


def test_user_turns_list_admissible_actions_on_request():
    observation = Observation("You see a desk 1.", admissible=("go to desk 1", "look"))
    for first in (True, False):
        assert AlfworldEnvironment.render(observation, first, admissible=False) == "You see a desk 1."
        assert AlfworldEnvironment.render(observation, first, admissible=True) == (
            "You see a desk 1.\nAdmissible actions: go to desk 1, look"
        )


def test_the_system_prompt_is_short_and_shows_the_format():
    prompt = AlfworldEnvironment.system_prompt({})
    assert len(prompt.split()) <= 60
    assert AlfworldEnvironment.parse_action(prompt) == ("go to cabinet 1", True)
    assert not re.search(r"[^ -~]", prompt)
