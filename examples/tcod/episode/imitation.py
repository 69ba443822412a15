"""A demonstration as if the student had played it (tcod_variant sft): its responses are what is trained.

Its turns go through the same history as a replay's, so the tokens are the same. No engine and no environment is asked:
what a turn answers was recorded with the demonstration.
"""

from typing import Any

from .. import Failure
from ..model.student import Response
from .demonstration import Demonstration
from .episode import Episode, TurnRecord
from .history import History
from .text_side import TextSide, as_text


def imitate(metadata: dict[str, Any], episode: Episode, side: TextSide, history: History, horizon: int) -> None:
    """Fill in an episode's turns and sequences.

    Their log-probs are 0.0, a placeholder that marks what is trained; samples.write_tokens removes it.

    Raises:
        Failure: demo_*, or prompt_too_long.
    """
    demonstration = Demonstration.of(metadata)
    demonstration.check(horizon)
    for turn, action in enumerate(demonstration.actions):
        observation = demonstration.seen_before(turn)
        shown = side.show(observation, first=turn == 0)
        fits = history.add_turn(shown) if turn else history.begin(side.rules(), shown)
        response = demonstration.response(turn, observation, side)
        ids = demonstration.sampled_ids(turn, history.chat) or history.chat.assistant(response)
        if not fits or history.room() < len(ids):
            raise Failure("prompt_too_long", f"{turn} of {len(demonstration.actions)} turns fit the context")
        history.add_response(Response(ids, [0.0] * len(ids), False, {}), response)
        episode.record.turns.append(TurnRecord(turn, as_text(shown), action, valid=True, admissible=True, cut=False))
    episode.sequences = history.sequences
