"""ALFWorld with another note for the teacher, for the study's fourth part."""

from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.environments.protocol import Execution


class SeenAlfworld(AlfworldEnvironment):
    """The teacher is shown a solution where the student came across the thing that has to be found, else nothing.

    So the note tells nothing that the student could not have known by the end.
    """

    @staticmethod
    def teacher_note(demonstration: Execution | None, attempt: Execution | None) -> str:
        taken = next(step.action for step in demonstration.steps if step.action.startswith("take "))
        thing, place = taken.removeprefix("take ").split(" from ")
        seen = any(f" {thing}" in step.observation and place in step.observation for step in attempt.steps)
        return AlfworldEnvironment.teacher_note(demonstration, None) if seen else ""
