"""What the episode loop hands to an environment, and what it makes of the answers."""

from typing import Any

import pytest

from examples.tcod.environments.protocol import Environment, Observation
from examples.tcod.episode.episode import Episode

MINE = f"{__name__}.Interpreter"
PROGRAM = "  total = 0\n\tadd 3 \n"  # white space and all


class Interpreter(Environment):
    """A task is won by PROGRAM, letter for letter. It lists a part of what it knows, and grades at the end."""

    lists_all_actions = False

    def reset(self, metadata: dict[str, Any]) -> Observation:
        self.said: list[str] = []
        return Observation(f"Own keys: {sorted(metadata)}.", admissible=("look",))

    def step(self, action: str) -> Observation:
        self.said.append(action)
        known = action in ("look", "glance", PROGRAM)
        return Observation("Hm." if known else "What?", refused=not known, admissible=("look",))

    def finish(self, last: Observation) -> Observation:
        won = PROGRAM in self.said
        return Observation(last.text, won=won, done=True, reward=0.25 + 0.75 * won)

    @staticmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None:
        if {"demo", "tcod"} & set(metadata):
            raise ValueError("these are the recipe's")

    @staticmethod
    def system_prompt(metadata: dict[str, Any]) -> str:
        return f"Level {metadata['level']}."


class Complete(Interpreter):
    lists_all_actions = True


def said(action: str) -> str:
    return f"<action>{action}</action>"


def test_the_environment_gets_its_own_keys_and_the_prompt_may_depend_on_them(rig, tokenizer):
    rig.script = [said("look")] * 4
    [sample], _ = rig.rollout([{"level": 3, "demo": {"actions": ["look"]}}], tcod_environment=MINE)
    text = tokenizer.decode(sample.tokens)
    assert "Level 3." in text and "Own keys: ['level']." in text


def test_the_grade_at_the_end_decides(rig):
    rig.script = [said("look"), said(PROGRAM), said("jump"), said("jump")]
    [sample], metrics = rig.rollout([{"level": 1}], tcod_environment=MINE)
    assert sample.reward == 1.0 and metrics["rollout/tcod/success"] == 1.0
    assert metrics["rollout/tcod/reward"] == sample.metadata["tcod"]["best_grade"] == 1.0
    assert metrics["rollout/tcod/refused_actions"] == 0.5
    assert metrics["rollout/tcod/inadmissible_actions"] == 0.0  # its list is not complete


def test_a_demonstrations_action_is_replayed_as_it_is_written(rig, tokenizer):
    rig.script = [said("look")] * 4
    demo = {"actions": [PROGRAM, "look"]}
    [sample], _ = rig.rollout([{"level": 1, "demo": demo}], tcod_environment=MINE, tcod_variant="b2f")
    assert said(PROGRAM) in tokenizer.decode(sample.tokens)
    assert sample.reward == 1.0  # the engine got it letter for letter


@pytest.mark.parametrize(
    "environment, action, reason",
    [
        ("Interpreter", "jump", "demo_inadmissible"),  # the environment refuses it
        ("Interpreter", "glance", None),  # it is not listed, and the engine takes it
        ("Complete", "glance", "demo_inadmissible"),  # it is not listed, and the list is said to be complete
    ],
)
def test_the_engine_is_the_gate_and_the_list_where_it_is_complete(rig, environment, action, reason):
    rig.script = [said("look")] * 4
    demo = {"actions": [action, "look"]}
    changes = {"tcod_environment": f"{__name__}.{environment}", "tcod_variant": "b2f"}
    _, sample = rig.generate({"level": 1, "demo": demo}, k=1, **changes)
    assert Episode.of(sample).record.failure == reason
