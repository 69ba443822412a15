"""A row's demonstration: what makes it usable, and its turns.

B2F and ReOPD replay its first turns, and the student goes on from there. A prepare tool and check_environment play it
to its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from pydantic import StrictInt, TypeAdapter, ValidationError

from .. import Failure
from ..environments.protocol import Observation, as_listed, calls_of, checked_observation, is_admissible

if TYPE_CHECKING:
    from ..model.chat_tokens import ChatTokens
    from .text_side import TextSide


def recorded(seen: Sequence[Observation]) -> dict[str, Any]:
    """What a demonstration keeps of the observations of its reset and of each of its actions."""
    parts = [part for part in fields(Observation) if part.name in ("text", "admissible", "role", "results")]
    kept = [{p.name: value for p in parts if (value := getattr(one, p.name)) != p.default} for one in seen[:-1]]
    return {"observations": tuple(one.full_text for one in seen[1:]), "seen": tuple(kept)}


@dataclass(frozen=True)
class Demonstration:
    """A recorded solution: L actions; where they were recorded, what the environment said to them, and the
    responses that they were parsed from.

    Many texts are sampled with other tokens than a tokenizer encodes them with: `ids` are the sampled ones, under the
    vocabulary (a digest, see ChatTokens) that they belong to. `observations` are after each action, `seen` has the
    whole observation before each.
    """

    actions: Sequence[str] = ()
    responses: Sequence[str] | None = None
    ids: Sequence[list[StrictInt]] | None = None
    vocabulary: str | None = None
    observations: Sequence[str] | None = None
    seen: Sequence[dict[str, Any]] | None = None

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> "Demonstration":
        """A row's demonstration; one without actions where the row has none.

        Raises:
            Failure: demo_malformed.
        """
        demo = metadata.get("demo")
        try:
            return cls() if demo is None else _DEMONSTRATION.validate_python(demo)
        except ValidationError as error:
            fault = error.errors()[0]
            name = ".".join(map(str, ("demo", *fault["loc"])))
            raise Failure("demo_malformed", f"its {name} is {fault['input']!r:.80}: {fault['msg']}") from error

    def first(self, turns: int) -> "Demonstration":
        """Its first turns."""
        names = ("actions", "responses", "ids", "observations", "seen")
        return replace(self, **{name: values[:turns] for name in names if (values := getattr(self, name))})

    def check(self, horizon: float) -> None:
        """Whether it can be replayed within so many turns, as far as it shows without an environment.

        Raises:
            Failure: demo_missing, demo_too_long or demo_mismatch.
        """
        if not self.actions:
            raise Failure("demo_missing", "it has none")
        if len(self.actions) > horizon:
            raise Failure("demo_too_long", f"{len(self.actions)} actions, the horizon is {horizon}")
        counted = {"responses": self.responses, "turns of ids": self.ids, "observations": self.observations}
        counted["observations in seen"] = self.seen
        for name, values in counted.items():
            if values is not None and len(values) != len(self.actions):
                raise Failure("demo_mismatch", f"{len(values)} {name}, {len(self.actions)} actions")

    def seen_before(self, turn: int) -> Observation:
        """What `turn` (0-based) answers, as it was recorded. Raises Failure: demo_unrecorded, demo_malformed."""
        if self.seen is None:
            raise Failure("demo_unrecorded", "it lacks what its environment said: run check_environment --record")
        try:
            return checked_observation(Observation(**self.seen[turn]), "the row")
        except TypeError as error:
            raise Failure("demo_malformed", f"seen of its demo, turn {turn + 1}: {error}") from error

    def response(self, turn: int, observation: Observation, side: "TextSide") -> str:
        """The response to replay at `turn` (0-based), to this observation.

        Raises:
            Failure: demo_inadmissible, or demo_mismatch where the response does not give the action.
        """
        action = self.actions[turn]
        if not is_admissible(action, observation, side.environment):
            raise Failure("demo_inadmissible", f"turn {turn + 1} of the demonstration: {action!r} is not admissible")
        response = self.responses[turn] if self.responses else side.format(action)
        said, valid = side.parse(response)
        if not valid or not (as_listed(said, observation) == action or calls_of(said) == calls_of(action) != []):
            raise Failure("demo_mismatch", f"turn {turn + 1}: {action!r} is not the action of {response!r}")
        return response

    def sampled_ids(self, turn: int, chat: "ChatTokens") -> list[int] | None:
        """The tokens that the response was sampled with; None where they are not known, or not of this vocabulary."""
        if self.ids is None or self.responses is None or self.vocabulary != chat.vocabulary:
            return None
        return self.ids[turn] if chat.spells(self.ids[turn], self.responses[turn]) else None

    def check_step(self, turn: int, observation: Observation, over: bool) -> None:
        """Whether the environment executed the action of `turn`, and the episode can go on from this answer.

        Raises:
            Failure: demo_inadmissible; demo_won_early, where the episode is over; demo_mismatch, where the environment
                answered otherwise when the demonstration was recorded.
        """
        action = self.actions[turn]
        if observation.refused:
            raise Failure("demo_inadmissible", f"turn {turn + 1} of the demonstration: {action!r} is refused")
        if over:
            raise Failure("demo_won_early", f"the episode ends at replayed turn {turn + 1}: {action!r}")
        if self.observations and observation.full_text != (expected := self.observations[turn]):
            said = f"{action!r} gives {observation.full_text!r}, not {expected!r}"
            raise Failure("demo_mismatch", f"turn {turn + 1} of the demonstration: {said}")


_DEMONSTRATION = TypeAdapter(Demonstration)
