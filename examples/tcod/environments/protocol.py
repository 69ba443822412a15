"""What an environment has to be.

A new one is a file with a class derived from `Environment`. README.md shows a small one; env_alfworld.py and the
files beside this one are real ones. The text side is static and runs in the rollout process. The rest runs in
worker processes, see pool.py.
"""

import importlib
import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from .. import PACKAGE, ConfigError, Failure, words


def _in_unicode(text: str) -> str:
    text.encode()  # raises on half of a surrogate pair, which no tokenizer takes
    return text


Text = Annotated[str, AfterValidator(_in_unicode)]
Flag = Annotated[bool, BeforeValidator(lambda value: value.item() if hasattr(value, "item") else value)]  # numpy's too
Texts = Annotated[tuple[Text, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


def _as_tool(value: Any) -> Any:
    match value:
        case {"type": "function", "function": {"name": str()}}:
            json.dumps(value)
            return value
    raise ValueError("no tool")


Call = dict[str, Any]  # {"name": .., "arguments": {..}}
Tool = Annotated[dict[str, Any], AfterValidator(_as_tool)]  # see Environment.tools


@dataclass(frozen=True)
class Observation:
    """What the environment says after a reset or a step."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, revalidate_instances="always")

    text: Text
    won: Flag = False
    """The task is solved. This alone is success."""
    done: Flag = False
    """The episode is over, solved or not."""
    admissible: Texts = ()
    """What is listed for the student: the actions that are possible now, see Environment.lists_all_actions."""
    refused: Flag = False
    """The environment did not execute the last action, because it knows no such action or the action is impossible."""
    reward: float | None = None
    """A grade of the episode so far, for the metrics, and with tcod_reward: grade for training."""
    role: Literal["user", "tool"] = "user"
    """Whose turn the text is in the chat: "tool", as it is, for what a called tool returns."""
    results: Texts = ()
    """What several called tools return: a tool turn each, in the place of one with the text."""

    @property
    def over(self) -> bool:
        return self.won or self.done

    @property
    def full_text(self) -> str:
        """All that it says, in one text: the results of several tools, or its text."""
        return "\n".join(self.results) or self.text


@dataclass(frozen=True)
class Step:
    """An action, and what the environment said to it; None where that is not known, or left out."""

    action: str
    observation: str | None = None


@dataclass(frozen=True)
class Execution:
    """One way through a task, from its first action on; as a text, its actions and what they led to."""

    steps: tuple[Step, ...]
    won: bool

    def __str__(self) -> str:
        return "\n".join(line for step in self.steps for line in (f"> {step.action}", step.observation) if line)


class Environment(ABC):
    """What episodes are played in, one after the other.

    `__init__`, `reset`, `step`, `finish` and `close` run in a worker process: they may block, and what they raise
    fails the episode. The other methods are static. They run in the rollout's event loop: they are pure and fast. A
    row's `metadata` comes without `demo` and `tcod`, which are the recipe's. Where a run has several
    environments (tcod_environments), `environment` in it is this one's name.
    """

    lists_all_actions = True
    """Whether what a non-empty `Observation.admissible` lacks is impossible: no demonstration may contain it then."""

    def __init__(self, data_root: str = "") -> None:
        """It gets tcod_data_root, and the entries of tcod_env_args as further keyword arguments."""
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
    def tools(metadata: dict[str, Any]) -> Sequence[Tool]:
        """What the agent can call in an episode of this row, for the chat template.

        Each is {"type": "function", "function": {"name": .., "description": .., "parameters": a JSON schema}}. With
        tools, `step` gets the calls of an answer as JSON, see calls_of, and an answer without a valid call as it is;
        parse_action and format_action are not asked.
        """
        return ()

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

    @staticmethod
    def teacher_note(demonstration: Execution | None, attempt: Execution | None) -> str:
        """What the teacher alone is shown, at the end of the first user turn; "" for nothing.

        `attempt` is the episode that is scored. Either may have no steps: where tcod_note_len has room for none, and
        once at launch. What all of a task share comes first: the server's cache holds it.
        """
        said = ["A note that is not part of the conversation: its agent does not know it."]
        if demonstration:
            said.append(f"What solves the task:\n{demonstration}")
        if attempt:
            end = f"The task was {'' if attempt.won else 'not '}solved."
            said.append(f"What the agent does in this conversation, to its end:\n{attempt}\n{end}")
        return "\n\n".join([*said, "Judge the next answer as one that has to be found from the conversation alone."])


_ACTION_TAG = re.compile(r"<\s*action\s*>((?:(?!<\s*action\s*>).)*?)<\s*/\s*action\s*>", re.IGNORECASE | re.DOTALL)
_TEXT_SIDE = ("check_row", "system_prompt", "tools", "render", "parse_action", "format_action", "teacher_note")
_OBSERVATION = TypeAdapter(Observation)
_RETURNED = {
    "tools": (TypeAdapter(list[Tool] | tuple[Tool, ...]), 'a list of {"type": "function", "function": {"name": ..}}'),
    "parse_action": (TypeAdapter(tuple[Text, Flag]), "a pair (action: str, valid: bool)"),
}
_TEXT = (TypeAdapter(Text), "a str in valid Unicode")


def load_environment(path: str) -> type[Environment]:
    """The environment class named "module.Class"; ".module.Class" is a module of this package. Raises ConfigError."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module, package=PACKAGE), name)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise ConfigError(
            f"tcod_environment {path} cannot be imported ({words(error)}): name .module.Class of this package, or "
            "module.Class whose folder is in PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ConfigError(f"tcod_environment {path} is no class derived from {__name__}.Environment: derive it")
    if missing := sorted(found.__abstractmethods__):
        raise ConfigError(f"tcod_environment {path} lacks {', '.join(missing)}: write what {__name__} asks for")
    for method in _TEXT_SIDE:
        if not isinstance(inspect.getattr_static(found, method), staticmethod):
            raise ConfigError(f"tcod_environment {path} has a {method} that is no @staticmethod: make it one")
    return found


def ask(environment: type[Environment], method: str, *args: Any) -> Any:
    """What a method of the text side returns. Raises Failure (env_error) where it raises, or returns a wrong type."""
    source = f"{environment.__name__}.{method}"
    try:
        value = getattr(environment, method)(*args)
    except Exception as error:
        raise Failure("env_error", f"{source} raised {words(error)}") from error
    adapter, wanted = _RETURNED.get(method, _TEXT)
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise Failure("env_error", f"{source} must return {wanted}, not {value!r:.80}") from error


def checked_observation(value: Any, source: str) -> Observation:
    """What a method of an environment, the `source`, returned, with Python's own types in place of numpy's.

    Raises:
        TypeError: it is no Observation, or one of its fields is of another type; one sentence.
    """
    if not isinstance(value, Observation):
        raise TypeError(f"{source} must return an Observation, not {type(value).__name__} {value!r:.80}")
    try:
        return _OBSERVATION.validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]
        name, said = fault["loc"][0], fault["msg"]
        raise TypeError(f"the {name} of {source}'s Observation is {fault['input']!r:.80}: {said}") from None


def calls_of(action: str) -> list[Call]:
    """The calls [{"name": .., "arguments": {..}}, ..] of an action, for `step`; none of an answer without a call."""
    try:
        calls = json.loads(action)
    except (ValueError, RecursionError):
        return []
    objects = calls if isinstance(calls, list) and {*map(type, calls)} == {dict} else []
    form = {"name": str, "arguments": dict}
    return objects if all({name: type(value) for name, value in one.items()} == form for one in objects) else []


def action_of(calls: Sequence[Call]) -> str:
    """Calls as an action: what a demonstration has for a turn that calls tools."""
    return json.dumps(list(calls), ensure_ascii=False)


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
