"""The single-player games of TextArena, such as Mastermind and Sokoban, in this process: pip install textarena==0.7.4.

Dataset rows carry `metadata["game"]`, a name of TextArena's such as "Mastermind-v0", and `metadata["seed"]`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from .protocol import Environment, Observation

_SYSTEM_PROMPT = (
    "You play a game alone. Its rules come first. Each turn, think in a few words, then give exactly one move in the "
    "form that the rules ask for, like this: <action>[move]</action>"
)


class TextArenaEnvironment(Environment):
    """One game at a time.

    TextArena draws from the global generators of Python and numpy, which all environments of a process share. So
    each has states of its own, which are put in place around every call.
    """

    def __init__(self, data_root: str = "") -> None:
        super().__init__(data_root)
        import textarena

        self._new_game, self._own_move = textarena.make, textarena.ObservationType.PLAYER_ACTION
        self._generators = random.getstate(), np.random.get_state()

    def reset(self, metadata: dict[str, Any]) -> Observation:
        """Begin the row's game; the first observation is its rules. Raises what TextArena does of an unknown one."""
        with self._own_generators():
            random.seed(metadata["seed"])
            np.random.seed(metadata["seed"])
            self._game = self._new_game(metadata["game"])
            self._game.reset(num_players=1, seed=metadata["seed"])
        return self._observe()

    def step(self, action: str) -> Observation:
        """Make a move. Of an impossible one the game says why; after two in a row it ends."""
        with self._own_generators():
            self._game.step(action)
        return self._observe()

    def _observe(self) -> Observation:
        """What the game said since the last turn. Won is what the game rewards with 1, the most that it gives."""
        state = self._game.state  # not get_observation, which tells the whole game again at every turn
        said = [message[1] for message in state.get_current_player_observation() if self._own_move not in message]
        if not state.done:
            return Observation("\n".join(said), refused=state.error_count > 0)
        about, reward = state.game_info[0], float(state.rewards[0])
        text = "\n".join([*said, about.get("reason") or "The game is over."])
        return Observation(text, won=reward >= 1, done=True, refused=about["invalid_move"], reward=reward)

    @contextlib.contextmanager
    def _own_generators(self) -> Iterator[None]:
        others = _exchange(self._generators)
        try:
            yield
        finally:
            self._generators = _exchange(others)

    @staticmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None:
        """Raise ValueError if the row has not both keys; whether there is such a game, TextArena says."""
        if not isinstance(metadata.get("game"), str):
            raise ValueError('its metadata has no game, a name of TextArena\'s such as "Mastermind-v0"')
        if type(metadata.get("seed")) is not int or not 0 <= metadata["seed"] < 2**32:  # a bool is an int, too
            raise ValueError("its metadata has no seed that is an integer from 0 to 4294967295")

    @staticmethod
    def system_prompt(metadata: dict[str, Any]) -> str:
        """The answer format in about 40 words, the same for all games; the rules are in the first observation."""
        return _SYSTEM_PROMPT


def _exchange(states: tuple[Any, Any]) -> tuple[Any, Any]:
    before = random.getstate(), np.random.get_state()
    random.setstate(states[0])
    np.random.set_state(states[1])
    return before
