"""A scripted searcher for pick_and_place_simple games that reads only the text, and noisy demonstrations by it."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from examples.tcod.environments.protocol import Environment

OPENABLE = ("cabinet", "drawer", "fridge", "microwave")
_GOAL = re.compile(r"Your task is to: put (?:a|some) (\w+) (?:in|on) (\w+)")
THING = re.compile(r"\ba (\w+ \d+)")


def kind(thing: str) -> str:
    """ "cabinet 2" -> "cabinet"."""
    return thing.split()[0]


class Expert:
    """Searches the receptacles in random order, takes the goal object and brings it to the target.

    It recovers from any valid or invalid action that was played in its place.

    Args:
        first: the first observation, with the room's receptacles and the goal.
        rng: decides where to search next.
    """

    def __init__(self, first: str, rng: random.Random) -> None:
        self.receptacles = sorted(THING.findall(first.split("Your task is to:")[0]))
        self.goal, self.target = _GOAL.search(first).groups()
        self._rng = rng
        self._here: str | None = None
        self._held: str | None = None
        self._open: set[str] = set()
        self._searched: set[str] = set()
        self._seen: dict[str, str] = {}  # object -> receptacle

    def observe(self, action: str, text: str) -> None:
        """Take note of an action that was played and of the engine's answer."""
        if text.startswith("Nothing happens"):
            return
        verb, *things = re.findall(r"^\w+|\w+ \d+", action)
        if verb == "go":
            self._here = things[0]
        elif verb == "open":
            self._open.add(things[0])
        elif verb == "close":
            self._open.discard(things[0])
        elif verb == "take":
            self._held = things[0]
            self._seen.pop(things[0], None)
        elif verb == "move":
            self._held = None
            self._seen[things[0]] = things[1]
        if verb in ("go", "open") and self._is_open(self._here):
            self._searched.add(self._here)
            self._seen.update(dict.fromkeys(THING.findall(text.partition("you see")[2]), self._here))

    def act(self) -> tuple[str, str]:
        """The next action, and the thought before it: what the expert is after."""
        if self._held:
            # A wrong object is put down where the agent stands.
            place = self._nearest_target() if kind(self._held) == self.goal else self._here
            aim = f"move {self._held} to {place}"
            return self._reach(place) or aim, aim
        for thing, place in sorted(self._seen.items()):
            if kind(thing) == self.goal and kind(place) != self.target:
                aim = f"take {thing} from {place}"
                return self._reach(place) or aim, aim
        left = [r for r in self.receptacles if r not in self._searched and kind(r) != self.target]
        action = f"open {self._here}" if self._here in left else f"go to {self._rng.choice(left or self.receptacles)}"
        return action, f"look for {self.goal}"

    def _nearest_target(self) -> str:
        if self._here and kind(self._here) == self.target:
            return self._here
        return next(r for r in self.receptacles if kind(r) == self.target)

    def _reach(self, place: str) -> str | None:
        """The next action on the way into a receptacle; None when things can be moved into or out of it."""
        if self._here != place:
            return f"go to {place}"
        return None if self._is_open(place) else f"open {place}"

    def _is_open(self, place: str) -> bool:
        return kind(place) not in OPENABLE or place in self._open


@dataclass
class Step:
    action: str
    label: bool  # chosen by the expert, not noise
    text: str  # the engine's answer
    thought: str = ""


def demonstrate(
    environment: Environment, metadata: dict, rng: random.Random, noise: float, horizon: int
) -> tuple[str, list[Step], bool]:
    """Play one game; each action is replaced by a random one with probability `noise`.

    Returns the first observation, the steps and whether the game was won.
    """
    observation = environment.reset(metadata)
    expert = Expert(observation.text, rng)
    first, steps = observation.text, []
    while len(steps) < horizon and not observation.won:
        (action, thought), label = expert.act(), True
        if rng.random() < noise:
            action, thought, label = random_action(expert, list(observation.admissible), rng), "", False
        observation = environment.step(action)
        expert.observe(action, observation.text)
        steps.append(Step(action, label, observation.text, thought))
    return first, steps, observation.won


def random_action(expert: Expert, admissible: list[str], rng: random.Random) -> str:
    """Mostly a possible action, sometimes one of a right form that may be impossible."""
    draw, place = rng.random(), rng.choice(expert.receptacles)
    forms: list[Callable[[], str]] = [
        lambda: f"go to {place}",
        lambda: f"open {place}",
        lambda: f"take {expert.goal} 1 from {place}",
        lambda: f"move {expert.goal} 1 to {place}",
    ]
    if draw < 0.6:
        return rng.choice([a for a in admissible if a != "help"])
    return forms[0]() if draw < 0.8 else rng.choice(forms)()
