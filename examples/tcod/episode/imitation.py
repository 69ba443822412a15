"""A demonstration as if the student had played it (tcod_variant sft): its responses are what is trained.

Its turns go through the same history as a replay's, so the tokens are the same. No engine and no environment is asked:
what a turn answers was recorded with the demonstration.
"""

from typing import Any

from .. import Failure
from ..environments.protocol import Environment, ask
from ..model.student import Response
from .demonstration import Demonstration
from .history import History
from .record import Episode, TurnRecord
from .rows import task_of


def imitate(
    metadata: dict[str, Any],
    episode: Episode,
    environment: type[Environment],
    history: History,
    lists_actions: bool,
    horizon: int,
) -> None:
    """Fill in an episode's turns and sequences, of a row's metadata. What is "sampled" has no log-probs.

    Raises:
        Failure: demo_*, or prompt_too_long.
    """
    demonstration, task = Demonstration.of(metadata), task_of(metadata)
    demonstration.check(horizon)
    for turn, action in enumerate(demonstration.actions):
        observation = demonstration.observation(turn)
        shown = ask(environment, "render", observation, turn == 0, lists_actions)
        fits = history.observe(shown) if turn else history.begin(ask(environment, "system_prompt", task), shown)
        response = demonstration.response(turn, observation, environment)
        ids = demonstration.sampled_ids(turn, history.chat) or history.chat.assistant(response)
        if not fits or history.room() < len(ids):
            raise Failure("prompt_too_long", f"{turn} of {len(demonstration.actions)} turns fit the context")
        history.respond(Response(ids, [], False, {}), response)
        episode.record.turns.append(TurnRecord(turn, shown, action, valid=True, admissible=True, cut=False))
    episode.sequences = history.sequences
