"""The environment protocol: what a new environment has to be.

One file with one class that follows `Environment`; env_alfworld.py is the example. The text side (prompt, rendering,
parsing) is static and runs in the rollout process. Engines run in worker processes, see environment_pool.py.
"""

import importlib
import re
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Observation:
    """What the environment says after a reset or a step. `won` alone is success; `done` may also mean out of steps."""

    text: str
    won: bool = False
    done: bool = False
    admissible: tuple[str, ...] = ()


class Environment(Protocol):
    """One engine, reused over episodes. The constructor, `reset` and `step` run in a worker and may block or raise."""

    def __init__(self, data_root: str) -> None: ...

    def reset(self, metadata: dict[str, Any]) -> Observation:
        """Begin the episode that a dataset row's metadata describes, whatever state the last episode left behind."""

    def step(self, action: str) -> Observation:
        """Execute one action. An action that the environment does not know is an observation, never an exception."""

    @staticmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None:
        """Raise ValueError, saying why, if a dataset row obviously cannot be played. Every row is asked at launch."""

    @staticmethod
    def system_prompt() -> str:
        """Rules and answer format, for the system turn."""

    @staticmethod
    def render(observation: Observation, first: bool, admissible: bool) -> str:
        """Text of a user turn. The `first` one contains the goal; `admissible` adds the admissible actions."""

    @staticmethod
    def parse_action(response: str) -> tuple[str, bool]:
        """The action to send for a response, and whether the response had the valid format."""

    @staticmethod
    def format_action(action: str) -> str:
        """The shortest valid response for an action: what a demonstration without recorded responses replays."""


def load_environment(path: str) -> type[Environment]:
    """The environment class named "module.Class"; ".module.Class" is a module of this package."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module, package=__package__), name)


def is_admissible(action: str, observation: Observation) -> bool:
    """Whether the environment lists the action; True where it lists none, since not every environment does."""
    return not observation.admissible or action in observation.admissible


def as_listed(action: str, observation: Observation) -> str:
    """The one listed action that equals `action` but for case and outer punctuation; else the action as it is.

    Engines of text games know "go to desk 1" and not "Go To Desk 1.", `go to desk 1` or **go to desk 1**.
    """
    if action in observation.admissible:
        return action
    folded = _fold(action)
    equal = [listed for listed in observation.admissible if folded and _fold(listed) == folded]
    return equal[0] if len(equal) == 1 else action


def _fold(action: str) -> str:
    action = re.sub(r"^\W*action\W*:", "", " ".join(action.split()).casefold())
    return re.sub(r"^\W+|\W+$", "", action)
