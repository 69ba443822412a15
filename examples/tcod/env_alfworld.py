"""ALFWorld (household tasks in text) on its own engine: TextWorld's PDDL environment with ALFWorld's object names.

Dataset rows carry `metadata["game_file"]`: the path of a `game.tw-pddl` relative to the data root.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import os
import re
import sys
import warnings
from typing import Any

from .environment import Observation

MAX_ACTION_CHARS = 200
_BANNER = "-= Welcome to TextWorld, ALFRED! =-"
_ACTION_TAG = re.compile(r"<\s*action\s*>((?:(?!<\s*action\s*>).)*?)<\s*/\s*action\s*>", re.IGNORECASE | re.DOTALL)

_SYSTEM_PROMPT = (
    "You are in a house and must reach a goal. Each turn you can do one thing: go to, open, close, take, move, use, "
    "clean, heat, cool, slice or examine something, look, or check your inventory. Anything else does nothing. First "
    "think in a few words, then give exactly one action, like this: <action>go to cabinet 1</action>"
)
_PATCHED_TEXTWORLD = "1.7.0"
_KEPT_GAMES = 256  # per process, about 0.2 MB each: an evaluation's games are played again and again


@functools.cache
def _speed_up_textworld() -> None:
    """Make TextWorld parse each text once and translate each game once per process; what it says stays the same.

    Unpatched, every step parses rules and queries of the grammar anew, and deep-copies what nobody writes to.
    """
    version = importlib.metadata.version("textworld")
    if version != _PATCHED_TEXTWORLD:
        warnings.warn(
            f"textworld {version} runs unpatched: each environment step takes more than ten times as long as with "
            f"textworld {_PATCHED_TEXTWORLD}, each reset two to three times",
            stacklevel=2,
        )
        return
    import fast_downward
    from textworld.envs.pddl import logic, textgen
    from textworld.logic import Rule

    def clone(value: Any) -> Any:
        # Deep enough for textgen: it writes to lists, to dicts and to the context of symbols, nothing else.
        if isinstance(value, list):
            return [clone(item) for item in value]
        if isinstance(value, dict):
            return dict(value)
        twin = copy.copy(value)
        if isinstance(twin, textgen.ListSymbol):
            twin.symbol = clone(twin.symbol)
        return twin

    parse = textgen._parse_and_convert
    parse_once = functools.lru_cache(maxsize=4096)(lambda text, rule_name: parse(text, rule_name=rule_name))
    textgen._parse_and_convert = lambda text, rule_name, trace=False: clone(parse_once(text, rule_name))
    textgen.deepcopy = clone
    Rule.parse_conjunctive_query = staticmethod(functools.lru_cache(maxsize=4096)(Rule.parse_conjunctive_query))
    logic._parse_and_convert = functools.lru_cache(_KEPT_GAMES)(logic._parse_and_convert)
    # load() and reset() of one episode share a translation; the most recent games keep theirs. TextWorld asks for a
    # second one to plan with, which takes as long. Nothing here plans: it gets the same.
    translate = functools.lru_cache(_KEPT_GAMES)(fast_downward.pddl2sas)
    fast_downward.pddl2sas = lambda domain, problem, verbose=False, optimize=False: translate(domain, problem)


class AlfworldEnvironment:
    """One ALFWorld engine. An engine object maps a private 33 MB library until its process ends: reuse it."""

    def __init__(self, data_root: str) -> None:
        _speed_up_textworld()
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

        self._data_root = data_root
        # No step limit here: the rollout counts turns, and `won` is success.
        self._engine = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))

    def reset(self, metadata: dict[str, Any]) -> Observation:
        """Load the row's game and describe its room and goal. Raises KeyError, OSError, ValueError on a bad row."""
        argv = sys.argv
        try:
            self._engine.load(os.path.join(self._data_root, metadata["game_file"]))
            return self._observation(self._engine.reset())
        finally:
            sys.argv = argv  # The planner's translator replaces it.

    def step(self, action: str) -> Observation:
        """Execute an action; any text that is not an admissible action gives "Nothing happens."."""
        state, _, _ = self._engine.step(action)
        return self._observation(state)

    @staticmethod
    def _observation(state: Any) -> Observation:
        won = bool(state["won"])
        text = state.feedback.replace(_BANNER, "").strip()
        return Observation(text, won=won, done=won, admissible=tuple(state["admissible_commands"]))

    @staticmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None:
        """Raise ValueError if the row names no game or its file is missing."""
        game_file = metadata.get("game_file")
        if not isinstance(game_file, str):
            raise ValueError("its metadata has no game_file")
        if not os.path.isfile(os.path.join(data_root, game_file)):
            raise ValueError(f"no game_file {game_file} below {data_root}")

    @staticmethod
    def system_prompt() -> str:
        """Rules and answer format in about 55 words."""
        return _SYSTEM_PROMPT

    @staticmethod
    def render(observation: Observation, first: bool, admissible: bool) -> str:
        """Text of a user turn. The engine's own first observation ends with the goal line."""
        if not admissible:
            return observation.text
        return f"{observation.text}\nAdmissible actions: {', '.join(observation.admissible)}"

    @staticmethod
    def parse_action(response: str) -> tuple[str, bool]:
        """The last <action></action> of a response as one line; without one, invalidly, the whole response."""
        tagged = _ACTION_TAG.findall(response)
        action = " ".join((tagged[-1] if tagged else response).split())[:MAX_ACTION_CHARS].strip()
        return action, bool(tagged and action)

    @staticmethod
    def format_action(action: str) -> str:
        """The action in the answer format, without reasoning."""
        return f"<action>{action}</action>"
