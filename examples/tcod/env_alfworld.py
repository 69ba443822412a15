"""ALFWorld (household tasks in text) on its own engine: TextWorld's PDDL environment with ALFWorld's object names.

Dataset rows carry `metadata["game_file"]`: the path of a `game.tw-pddl` relative to the data root.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from .environments.protocol import Environment, Observation
from .environments.textworld_speedup import mend_textworld, speed_up_textworld

MAX_ACTION_CHARS = 200
_BANNER = "-= Welcome to TextWorld, ALFRED! =-"
_REFUSAL = "Nothing happens."

_SYSTEM_PROMPT = (
    "You are in a house and must reach a goal. Each turn you can do one thing: go to, open, close, take, move, use, "
    "clean, heat, cool, slice or examine something, look, or check your inventory. Anything else does nothing. First "
    "think in a few words, then give exactly one action, like this: <action>go to cabinet 1</action>"
)


class AlfworldEnvironment(Environment):
    """One ALFWorld engine. An engine object maps a private 33 MB library until its process ends: reuse it."""

    def __init__(self, data_root: str) -> None:
        super().__init__(data_root)
        mend_textworld()
        speed_up_textworld()
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

        # No step limit here: the rollout counts turns, and `won` is success.
        self._engine = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))

    def reset(self, metadata: dict[str, Any]) -> Observation:
        """Load the row's game and describe its room and goal. Raises KeyError, OSError, ValueError on a bad row."""
        argv = sys.argv
        try:
            self._engine.load(os.path.join(self.data_root, metadata["game_file"]))
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
        # "help" is possible at every turn, and its answer costs 205 tokens: it is not offered.
        admissible = tuple(command for command in state["admissible_commands"] if command != "help")
        return Observation(text, won=won, done=won, admissible=admissible, refused=text == _REFUSAL)

    @staticmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None:
        """Raise ValueError if the row names no game or its file is missing."""
        game_file = metadata.get("game_file")
        if not isinstance(game_file, str):
            raise ValueError("its metadata has no game_file")
        if not os.path.isfile(os.path.join(data_root, game_file)):
            raise ValueError(f"no game_file {game_file} below {data_root}")

    @staticmethod
    def system_prompt(metadata: dict[str, Any]) -> str:
        """Rules and answer format in about 55 words, the same for all games."""
        return _SYSTEM_PROMPT

    @staticmethod
    def parse_action(response: str) -> tuple[str, bool]:
        """As one line, which is all that the engine knows."""
        action, valid = Environment.parse_action(response)
        return " ".join(action.split())[:MAX_ACTION_CHARS].strip(), valid
