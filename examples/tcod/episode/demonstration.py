"""A row's demonstration: what makes it usable, and its turns.

B2F and ReOPD replay its first turns, and the student goes on from there. A prepare tool and check_environment play it
to its end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import Failure
from ..environments.protocol import Environment, Observation, as_listed, ask, is_admissible

if TYPE_CHECKING:
    from ..model.chat_tokens import ChatTokens


def _lists_of(kind: type) -> Callable[[Any], bool]:
    return lambda turn: isinstance(turn, list) and {*map(type, turn)} <= {kind}


# What a demonstration has of each turn: what that is, and whether a value is it.
_PER_TURN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("actions", "responses", "observations"), ("texts", lambda turn: isinstance(turn, str))),
    **{"ids": ("lists of token ids", _lists_of(int)), "admissible": ("lists of texts", _lists_of(str))},
}
RECORDED = ("opening", "observations", "admissible")


def recorded(seen: Sequence[Observation]) -> dict[str, Any]:
    """What a demonstration keeps of the observations of its reset and of each of its actions."""
    opening, *answers = [observation.text for observation in seen]
    admissible = [list(observation.admissible) for observation in seen[:-1]]
    return dict(zip(RECORDED, (opening, answers, admissible), strict=True))


@dataclass(frozen=True)
class Demonstration:
    """A recorded solution: L actions; where they were recorded, the environment's answers to them, and the responses
    that they were parsed from.

    `opening` is what the environment said at its reset, `admissible` what it listed before each action. Many texts are
    sampled with other tokens than a tokenizer encodes them with: `ids` are the sampled ones, under the vocabulary (a
    digest, see ChatTokens) that they belong to.
    """

    actions: Sequence[str] = ()
    responses: Sequence[str] | None = None
    ids: Sequence[list[int]] | None = None
    vocabulary: str | None = None
    observations: Sequence[str] | None = None
    opening: str | None = None
    admissible: Sequence[Sequence[str]] | None = None

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> "Demonstration":
        """A row's demonstration; one without actions where the row has none.

        Raises:
            Failure: demo_malformed.
        """
        demo = metadata.get("demo")
        if demo is None:
            return cls()
        if not isinstance(demo, dict):
            raise Failure("demo_malformed", f"its demo is no JSON object but {str(demo)[:80]!r}")
        found = {"actions": [], **{name: demo[name] for name in _PER_TURN if demo.get(name) is not None}}
        for name, values in found.items():
            what, is_right = _PER_TURN[name]
            if not (isinstance(values, list) and all(map(is_right, values))):
                raise Failure("demo_malformed", f"{name} of its demo is no list of {what}")
        found = {name: tuple(values) for name, values in found.items()}
        return cls(**found, vocabulary=demo.get("vocabulary"), opening=demo.get("opening"))

    def first(self, turns: int) -> "Demonstration":
        """Its first turns."""
        return replace(self, **{name: values[:turns] for name in _PER_TURN if (values := getattr(self, name))})

    def check(self, horizon: float) -> None:
        """Whether it can be replayed within so many turns, as far as it shows without an engine.

        Raises:
            Failure: demo_missing, demo_too_long or demo_mismatch.
        """
        if not self.actions:
            raise Failure("demo_missing", "it has none")
        if len(self.actions) > horizon:
            raise Failure("demo_too_long", f"{len(self.actions)} actions, the horizon is {horizon}")
        for name in _PER_TURN:
            if (values := getattr(self, name)) is not None and len(values) != len(self.actions):
                raise Failure("demo_mismatch", f"{len(values)} turns of {name}, {len(self.actions)} actions")

    def observation(self, turn: int) -> Observation:
        """What `turn` (0-based) answers, as it was recorded.

        Raises:
            Failure: demo_unrecorded.
        """
        if self.opening is None or self.observations is None or self.admissible is None:
            raise Failure("demo_unrecorded", "what the environment said is not recorded: prepare the data anew")
        text = self.observations[turn - 1] if turn else self.opening
        return Observation(text, admissible=tuple(self.admissible[turn]))

    def response(self, turn: int, observation: Observation, environment: type[Environment]) -> str:
        """The response to replay at `turn` (0-based), to this observation.

        Raises:
            Failure: demo_inadmissible, or demo_mismatch where the response does not give the action.
        """
        action = self.actions[turn]
        if not is_admissible(action, observation, environment):
            raise Failure("demo_inadmissible", f"turn {turn + 1} of the demonstration: {action!r} is not admissible")
        response = self.responses[turn] if self.responses else ask(environment, "format_action", action)
        said, valid = ask(environment, "parse_action", response)
        if not valid or as_listed(said, observation) != action:
            raise Failure("demo_mismatch", f"turn {turn + 1}: {action!r} is not the action of {response!r}")
        return response

    def sampled_ids(self, turn: int, chat: "ChatTokens") -> list[int] | None:
        """The tokens that the response was sampled with; None where they are not known, or not of this vocabulary."""
        if self.ids is None or self.responses is None or self.vocabulary != chat.vocabulary:
            return None
        return self.ids[turn] if chat.spells(self.ids[turn], self.responses[turn]) else None

    def check_step(self, turn: int, observation: Observation, over: bool) -> None:
        """Whether the engine executed the action of `turn`, and the episode can go on from this answer.

        Raises:
            Failure: demo_inadmissible; demo_won_early, where the episode is over; demo_mismatch, where the engine
                answered otherwise when the demonstration was recorded.
        """
        action = self.actions[turn]
        if observation.refused:
            raise Failure("demo_inadmissible", f"turn {turn + 1} of the demonstration: the engine refuses {action!r}")
        if over:
            raise Failure("demo_won_early", f"the episode ends at replayed turn {turn + 1}: {action!r}")
        if self.observations and observation.text != self.observations[turn]:
            recorded = self.observations[turn]
            raise Failure("demo_mismatch", f"turn {turn + 1}: {action!r} gives {observation.text!r}, not {recorded!r}")
