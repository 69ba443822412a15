"""What an environment has to be.

A new one is a file with a class derived from `Environment`. README.md shows a small one; env_alfworld.py and
env_scienceworld.py are real ones. The text side is static and runs in the rollout process. Engines run in worker
processes, see environment_pool.py.
"""

import importlib
import inspect
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from .. import PACKAGE, ConfigError, Failure, words


@dataclass(frozen=True)
class Observation:
    """What the environment says after a reset or a step."""

    text: str
    won: bool = False
    """The task is solved. This alone is success."""
    done: bool = False
    """The episode is over, solved or not."""
    admissible: tuple[str, ...] = ()
    """What is listed for the student: the actions that are possible now, see Environment.lists_all_actions."""
    refused: bool = False
    """The engine did not execute the last action, because it knows no such action or the action is impossible."""
    reward: float | None = None
    """A grade of the episode so far, for the metrics alone."""


class Environment(ABC):
    """One engine, reused over episodes.

    `__init__`, `reset`, `step`, `finish` and `close` run in a worker process: they may block, and what they raise
    fails the episode. The other methods are static. They run in the rollout's event loop: they are pure and fast. A
    row's `metadata` comes without `demo` and `tcod`, which are the recipe's.
    """

    lists_all_actions = True
    """Whether what a non-empty `Observation.admissible` lacks is impossible: no demonstration may contain it then."""

    def __init__(self, data_root: str = "") -> None:
        """Build the engine. It gets tcod_data_root, and the entries of tcod_env_args as further keyword arguments."""
        self.data_root = data_root

    @abstractmethod
    def reset(self, metadata: dict[str, Any]) -> Observation:
        """Begin the episode that a row's metadata describes, whatever state the last episode left behind."""

    @abstractmethod
    def step(self, action: str) -> Observation:
        """Execute one action. An action that the environment does not know is an observation, never an exception."""

    def finish(self, last: Observation) -> Observation:
        """The final observation of an episode that ends, by itself or for want of turns: the place to grade it."""
        return last

    def close(self) -> None:  # noqa: B027  most environments have nothing to do here
        """Let go of what outlives the process. Called when a worker ends, but not when it is killed."""

    @staticmethod
    @abstractmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None:
        """Raise ValueError, saying why, if a row obviously cannot be played. Every row is asked at launch."""

    @staticmethod
    @abstractmethod
    def system_prompt(metadata: dict[str, Any]) -> str:
        """Rules and answer format, for the system turn of an episode of this row."""

    @staticmethod
    def render(observation: Observation, first: bool, admissible: bool) -> str:
        """Text of a user turn. The `first` one must contain the goal; `admissible` adds what is listed."""
        if not (admissible and observation.admissible):
            return observation.text
        return f"{observation.text}\nAdmissible actions: {', '.join(observation.admissible)}"

    @staticmethod
    def parse_action(response: str) -> tuple[str, bool]:
        """The action to send for a response, and whether the response had the valid format.

        The last <action></action> counts, white space included; without one the whole response is sent, invalidly.
        """
        tagged = _ACTION_TAG.findall(response)
        action = tagged[-1] if tagged else response
        return action, bool(tagged and action.strip())

    @staticmethod
    def format_action(action: str) -> str:
        """The shortest valid response for an action: what a demonstration without recorded responses replays."""
        return f"<action>{action}</action>"


_ACTION_TAG = re.compile(r"<\s*action\s*>((?:(?!<\s*action\s*>).)*?)<\s*/\s*action\s*>", re.IGNORECASE | re.DOTALL)
_ENGINE_SIDE = ("reset", "step", "finish", "close")
_TEXT_SIDE = ("check_row", "system_prompt", "render", "parse_action", "format_action")

# ------------------------------------------------------------------------------------------------ loading and checking


def load_environment(path: str) -> type[Environment]:
    """The environment class named "module.Class"; ".module.Class" is a module of this package.

    Raises:
        ConfigError: it cannot be imported, or is no environment.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module, package=PACKAGE), name)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise ConfigError(
            f"tcod_environment {path} cannot be imported ({words(error)}): name an importable module.Class"
        ) from error
    if fault := _fault(found):
        raise ConfigError(f"tcod_environment {path} {fault}, see environment.py")
    return found


def _fault(found: Any) -> str:
    """What keeps something from being an environment; "" if nothing does.

    It may be derived from the Environment of another copy of this package, so its methods are asked, not its bases.
    """
    if not isinstance(found, type):
        return "is no class"
    needed = ("lists_all_actions", *_ENGINE_SIDE, *_TEXT_SIDE)
    missing = [name for name in needed if not hasattr(found, name)] + sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        return f"lacks {', '.join(missing)}: derive it from Environment and write them"
    for name in _TEXT_SIDE:
        if not isinstance(inspect.getattr_static(found, name), staticmethod):
            return f"has a {name} that is no @staticmethod"
    for name in (*_ENGINE_SIDE, *_TEXT_SIDE):
        if inspect.iscoroutinefunction(getattr(found, name)):
            return f"has an async {name}: write a plain function, engines may block"
    return ""


def ask(environment: type[Environment], method: str, *args: Any) -> Any:
    """What a method of the text side returns.

    Raises:
        Failure: env_error, where it raises or returns something else than it must.
    """
    try:
        value = getattr(environment, method)(*args)
    except Exception as error:
        raise Failure("env_error", f"{environment.__name__}.{method} raised {words(error)}") from error
    if method == "parse_action":
        wanted = "a pair (action: str, valid: bool)"
        right = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and is_bool(value[1])
    else:
        wanted, right = "a str", isinstance(value, str)
    if not right:
        raise Failure("env_error", f"{environment.__name__}.{method} must return {wanted}, not {str(value)[:80]!r}")
    return value


def checked_observation(value: Any, source: str) -> Observation:
    """An engine's observation in plain types: numpy's bools and numbers become Python's.

    Args:
        source: the method that returned it, for the message.

    Raises:
        TypeError: it is none, or one of its fields is of another type; one sentence.
    """
    names = [field.name for field in fields(Observation)]
    if not all(hasattr(value, name) for name in names):
        raise TypeError(f"{source} must return an Observation, not {type(value).__name__} {str(value)[:80]!r}")
    listed = value.admissible
    is_list = isinstance(listed, list | tuple) and all(isinstance(action, str) for action in listed)
    is_number = isinstance(value.reward, Real) and math.isfinite(value.reward)
    wanted = {
        "text": ("a str", isinstance(value.text, str)),
        "won": ("a bool", is_bool(value.won)),
        "done": ("a bool", is_bool(value.done)),
        "admissible": ("a list or tuple of str", is_list),
        "refused": ("a bool", is_bool(value.refused)),
        "reward": ("None or a finite number", value.reward is None or is_number),
    }
    for name, (kind, right) in wanted.items():
        if not right:
            raise TypeError(f"the {name} of {source}'s Observation must be {kind}, not {getattr(value, name)!r:.80}")
    reward = None if value.reward is None else float(value.reward)
    return Observation(str(value.text), bool(value.won), bool(value.done), tuple(listed), bool(value.refused), reward)


def is_bool(value: Any) -> bool:
    """Whether it is Python's bool or numpy's. 0.5 is not half a success."""
    return isinstance(value, bool) or (type(value).__module__, type(value).__name__) in (
        ("numpy", "bool"),
        ("numpy", "bool_"),
    )


# ------------------------------------------------------------------------------------------------------------- actions


def is_admissible(action: str, observation: Observation, environment: type[Environment]) -> bool:
    """Whether the action may be possible: it is listed, or the list is empty or not complete."""
    return not (environment.lists_all_actions and observation.admissible) or action in observation.admissible


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
