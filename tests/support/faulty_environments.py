"""Environments with one fault each, as a newcomer writes them. Worker processes import this file."""

import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

from examples.tcod.environments.protocol import Environment, Observation


class Good(Environment):
    """Say "yes". The others differ from it in one place."""

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


class Exits(Good):
    def reset(self, metadata: dict[str, Any]) -> Observation:
        sys.exit(3)


class NotInstalled(Good):
    def __init__(self, data_root: str = "") -> None:
        import no_such_engine  # noqa: F401


class NoCheckRow(Environment):
    reset, step, system_prompt = Good.reset, Good.step, Good.system_prompt


class NoEnvironment:
    reset, step = Good.reset, Good.step


def good_but(name: str, **methods: Any) -> type[Good]:
    return type(name, (Good,), methods)


IsOver = good_but("IsOver", reset=lambda self, metadata: Observation("You have said it.", won=True))
IsLost = good_but("IsLost", reset=lambda self, metadata: Observation("You have said no.", done=True))
TextFromReset = good_but("TextFromReset", reset=lambda self, metadata: "Say yes.")
HalfASuccess = good_but("HalfASuccess", step=lambda self, action: Observation("Nearly.", won=0.5))
AnswersAsTool = good_but("AnswersAsTool", step=lambda self, action: Observation("Yes.", role="tool"))
ForgetsTheRole = good_but("ForgetsTheRole", step=lambda self, action: Observation("Yes.", results=("Yes.",)))
ASK = {"type": "function", "function": {"name": "ask", "parameters": {"type": "object", "properties": {}}}}
NeedsArguments = good_but(
    "NeedsArguments",
    tools=staticmethod(lambda metadata: [ASK]),
    step=lambda self, action: Observation("Yes.") if action == "no such action" else {}["word"],
)
StringFromParse = good_but("StringFromParse", parse_action=staticmethod(lambda response: "ok"))
LosesActions = good_but("LosesActions", parse_action=staticmethod(lambda response: (response, True)))
NoStaticMethod = good_but("NoStaticMethod", render=lambda observation, first, admissible: observation.text)
Dies = good_but("Dies", step=lambda self, action: os._exit(1))
Blocks = good_but("Blocks", step=lambda self, action: time.sleep(3600))
Raises = good_but("Raises", step=lambda self, action: {"yes": Observation("Well said.", True, True)}[action])


CACHE: dict[str, str] = {}


class SharesState(Good):
    """Says numbers that its row's seed decides, as long as nobody else draws from, moves or sets what it uses."""

    def __init__(self, data_root: str = "", kind: str = "random") -> None:
        super().__init__(data_root)
        self.kind = kind

    def reset(self, metadata: dict[str, Any]) -> Observation:
        seed = str(metadata["n"])
        random.seed(seed)
        self.own = random.Random(seed)
        os.environ["SEED"] = CACHE["seed"] = seed
        os.makedirs(folder := os.path.join(tempfile.gettempdir(), "shares", seed), exist_ok=True)
        os.chdir(folder)
        return super().reset(metadata)

    def step(self, action: str) -> Observation:
        values = {"random": random.random, "folder": os.getcwd, "variable": lambda: os.environ["SEED"]}
        values |= {"cache": lambda: CACHE["seed"], "nothing": self.own.random, "never the same": time.perf_counter}
        return replace(super().step(action), text=str(values[self.kind]()))
