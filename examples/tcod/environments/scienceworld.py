"""ScienceWorld (elementary science in text) on its own engine: a Java program, which needs Java 8 or newer.

Dataset rows carry `metadata["task"]`, one of ScienceWorld's 30 task names, `metadata["variation"]`, an integer, and
`metadata["simplifications"]`: "easy", "", or some of ScienceWorld's own, separated by commas.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from .protocol import Environment, Observation

MAX_ACTION_CHARS = 200
_UNKNOWN = "No known action matches that input."
_TELEPORT = ("easy", "teleportAction")
_USERS_JAVA_OPTIONS = os.environ.get("JAVA_TOOL_OPTIONS", "")
# In a Turkish locale Java makes "ınventory" of "INVENTORY", which is no action; in an Arabic one, other digits.
_JAVA_LOCALE = "-Duser.language=en -Duser.country=US"

# Hundreds of actions are valid at a time, and others are too: the forms stand here, a turn lists what can be named.
_SYSTEM_PROMPT = (
    "You are in a house with a laboratory and must do an experiment. Each turn you can do one thing, where OBJ is "
    "something that you can see: look around, look at OBJ, look in OBJ, read OBJ, inventory, task, {move}, open OBJ, "
    "close OBJ, pick up OBJ, put down OBJ, move OBJ to OBJ, pour OBJ in OBJ, dunk OBJ in OBJ, mix OBJ, eat OBJ, flush "
    "OBJ, activate OBJ, deactivate OBJ, use OBJ on OBJ, connect OBJ to OBJ, disconnect OBJ, wait, wait1, or focus on "
    "OBJ. Focus only on what the task tells you to: a wrong focus fails it. First think in a few words, then give "
    "exactly one action, like this: <action>open door to kitchen</action>"
)


class ScienceworldEnvironment(Environment):
    """One ScienceWorld engine: a Java process of about 200 MB, which ends with its worker.

    Args:
        java_options: for all Java of the worker; what JAVA_TOOL_OPTIONS has comes after them. Without a bound on its
            heap the process can reach 1.4 GB.
    """

    lists_all_actions = False

    def __init__(self, data_root: str = "", java_options: str = "-Xmx512m -XX:+UseSerialGC") -> None:
        super().__init__(data_root)
        if shutil.which("java") is None:
            raise OSError("ScienceWorld needs Java, and there is no program `java`: install a Java runtime")
        os.environ["JAVA_TOOL_OPTIONS"] = f"{java_options} {_USERS_JAVA_OPTIONS} {_JAVA_LOCALE}"
        from scienceworld import ScienceWorldEnv

        self.game = ScienceWorldEnv("")

    def reset(self, metadata: dict[str, Any]) -> Observation:
        """Load the row's variation; the first observation is the room and the task. Raises ValueError on a bad row."""
        # As ScienceWorldEnv.reset() does.
        task, variation = metadata["task"], metadata["variation"]
        self.game.load(task, variation, metadata["simplifications"])
        if variation >= (count := self.game.get_max_variations(task)):
            raise ValueError(f"{task} has no variation {variation}: they are 0 to {count - 1}")
        self.game.server.reset()
        first = self.step("look around")
        if first.text.startswith("ERROR:"):  # which the engine answers to everything then
            raise ValueError(f"ScienceWorld cannot play {metadata}: {first.text}")
        goal = self.game.get_task_description().removeprefix("Task Description:\n")
        return Observation(f"{first.text}\n\n{goal}", admissible=first.admissible, reward=first.reward)

    def step(self, action: str) -> Observation:
        """Execute an action. An ambiguous one is answered with numbered choices; the next action may be a number."""
        # Not ScienceWorldEnv.step(): that finds all valid actions each time, which takes twenty times as long.
        server = self.game.server
        text = server.step(action).strip()
        score = round(100 * server.getScore())  # a wrong focus is -100, and the end
        won = score >= 100
        done = won or score < 0 or bool(server.getCompleted())
        objects = tuple(sorted(self.game.get_possible_objects()))
        return Observation(text, won, done, objects, refused=text == _UNKNOWN, reward=score / 100)

    def close(self) -> None:
        """End the Java process."""
        self.game.close()

    @staticmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None:
        """Raise ValueError if the row has not the three keys; whether there is such a variation, the engine says."""
        for key, kind in {"task": str, "variation": int, "simplifications": str}.items():
            if type(metadata.get(key)) is not kind:  # a bool is an int, too
                raise ValueError(f"its metadata has no {key} of type {kind.__name__}")
        if metadata["variation"] < 0:
            raise ValueError(f"its variation {metadata['variation']} is negative: they count from 0")
        if "easy" in (names := metadata["simplifications"].split(",")) and len(names) > 1:
            raise ValueError(f"its simplifications {metadata['simplifications']!r} have more than easy, which is all")

    @staticmethod
    def system_prompt(metadata: dict[str, Any]) -> str:
        """Rules and answer format in about 130 words; how to move depends on the row's simplifications."""
        teleport = any(name in _TELEPORT for name in metadata["simplifications"].split(","))
        return _SYSTEM_PROMPT.format(move="go to OBJ, teleport to OBJ (a room)" if teleport else "go to OBJ")

    @staticmethod
    def render(observation: Observation, first: bool, admissible: bool) -> str:
        """Text of a user turn. The engine's first observation ends with the task."""
        if not admissible:
            return observation.text
        return f"{observation.text}\nYou can name: {', '.join(observation.admissible)}"

    @staticmethod
    def parse_action(response: str) -> tuple[str, bool]:
        """As one line, which is all that the engine knows."""
        action, valid = Environment.parse_action(response)
        return " ".join(action.split())[:MAX_ACTION_CHARS].strip(), valid
