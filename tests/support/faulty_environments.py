"""Environments with one fault each, as a newcomer writes them. Worker processes import this file."""

import os
import sys
import time
from typing import Any

from examples.tcod.environments.protocol import Environment, Observation


class Good(Environment):
    """Say "yes". The other classes differ from it in one place."""

    def __init__(self, data_root: str = "", word: str = "yes") -> None:
        super().__init__(data_root)
        self.word = word

    def reset(self, metadata: dict[str, Any]) -> Observation:
        if {"demo", "tcod"} & set(metadata):
            raise ValueError("these are not the environment's")
        return Observation(f"Say {self.word}.", admissible=[self.word, "no"])

    def step(self, action: str) -> Observation:
        won = action == self.word
        return Observation("Well said." if won else "What?", won, won, refused=action not in (self.word, "no"))

    @staticmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None: ...

    @staticmethod
    def system_prompt(metadata: dict[str, Any]) -> str:
        return "Do as you are told, like this: <action>no</action>"


class NumpyBools(Good):
    def step(self, action: str) -> Observation:
        import numpy

        won = numpy.array([action == self.word])[0]
        return Observation("Well said.", won, won, reward=numpy.float32(0.5))


class TextFromReset(Good):
    def reset(self, metadata: dict[str, Any]) -> str:
        return "Say yes."


class TupleFromStep(Good):
    def step(self, action: str) -> tuple[str, float, bool, dict]:
        return "Well said.", 1.0, True, {}


class NoText(Good):
    def reset(self, metadata: dict[str, Any]) -> Observation:
        return Observation(None)


class HalfASuccess(Good):
    def step(self, action: str) -> Observation:
        return Observation("Nearly.", won=0.5)


class ListInOneString(Good):
    def reset(self, metadata: dict[str, Any]) -> Observation:
        return Observation("Say yes.", admissible="yes, no")


class StringFromParse(Good):
    @staticmethod
    def parse_action(response: str) -> str:
        return "ok"


class LosesActions(Good):
    @staticmethod
    def parse_action(response: str) -> tuple[str, bool]:
        return response, True


class NotInstalled(Good):
    def __init__(self, data_root: str = "") -> None:
        import no_such_engine  # noqa: F401


class Exits(Good):
    def reset(self, metadata: dict[str, Any]) -> Observation:
        print("cannot read the game")
        sys.exit(3)


class Interrupts(Good):
    def step(self, action: str) -> Observation:
        raise KeyboardInterrupt


class Dies(Good):
    def step(self, action: str) -> Observation:
        os._exit(1)


class Blocks(Good):
    def step(self, action: str) -> Observation:
        time.sleep(3600)


class Prints(Good):
    def step(self, action: str) -> Observation:
        print(f"DEBUG {action}")
        return super().step(action)


class Raises(Good):
    def step(self, action: str) -> Observation:
        return {"yes": Observation("Well said.", True, True)}[action]


class NoStaticMethod(Good):
    def render(observation: Observation, first: bool, admissible: bool) -> str:
        return observation.text


class AsyncReset(Good):
    async def reset(self, metadata: dict[str, Any]) -> Observation:
        return Observation("Say yes.")


class NoCheckRow(Environment):
    reset, step, system_prompt = Good.reset, Good.step, Good.system_prompt


class NoEnvironment:
    reset, step = Good.reset, Good.step
