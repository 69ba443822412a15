"""ALFWorld with notes for the teacher that a tiny model can read: actions, and what was found as it would be taken."""

import re

from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.environments.protocol import Execution
from smoke.expert import THING

_VIEW = re.compile(r"(?:On the|The) (\w+ \d+).*?you see (.*)", re.DOTALL)


def found(execution: Execution) -> dict[str, str]:
    """{thing: the receptacle where it was first seen}."""
    places: dict[str, str] = {}
    for step in execution.steps:
        if view := _VIEW.search(step.observation or ""):
            for thing in THING.findall(view[2]):
                places.setdefault(thing, view[1])
    return places


class NotedAlfworld(AlfworldEnvironment):
    """A solution is its actions, an attempt what came to light in it."""

    @staticmethod
    def teacher_note(demonstration: Execution | None, attempt: Execution | None) -> str:
        said = [f"Solution: {'; '.join(step.action for step in demonstration.steps)}"] if demonstration else []
        if attempt:
            said.append(f"Found: {'; '.join(f'take {thing} from {place}' for thing, place in found(attempt).items())}")
        return "\n".join(said)


class SeenAlfworld(NotedAlfworld):
    """A solution is shown where the attempt came across the thing that has to be found, else nothing.

    So the note tells nothing that the student could not have known by the end.
    """

    @staticmethod
    def teacher_note(demonstration: Execution | None, attempt: Execution | None) -> str:
        takes = [step.action.removeprefix("take ") for step in demonstration.steps if step.action.startswith("take ")]
        known = {f"{thing} from {place}" for thing, place in found(attempt).items()}
        return NotedAlfworld.teacher_note(demonstration, None) if known.issuperset(takes) else ""
