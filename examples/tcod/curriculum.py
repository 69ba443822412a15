"""TCOD's temporal curriculum (arXiv 2604.24005): how deep a trajectory goes at training step n.

Pure Python: no torch, no slime, no I/O. A turn is one response of the student (or of a demonstration) and the
environment's answer to it. The arms that play differ in nothing but the plan this module makes for an episode:

    opd    the student plays the whole horizon T from the first step on (the baseline);
    f2b    forward to backward: the student plays the first k turns only;
    b2f    backward to forward: a demonstration of L turns is replayed up to turn L - k, then the student plays;
    reopd  one-step replay (arXiv 2607.04763): a random number of turns is replayed, then the student plays one;
    sft    imitation: nothing is played and there is no plan; a demonstration's own responses are what is trained.
"""

import random
from dataclasses import dataclass
from typing import Literal, get_args

Variant = Literal["opd", "f2b", "b2f", "reopd", "sft"]
VARIANTS = get_args(Variant)


@dataclass(frozen=True)
class EpisodePlan:
    """Who acts when: a demonstration plays `replayed` turns, then the student plays at most `budget` turns."""

    replayed: int
    budget: int

    @property
    def turns(self) -> int:
        """Turns of the whole episode, at most."""
        return self.replayed + self.budget


@dataclass(frozen=True)
class Curriculum:
    """The settings of one arm. `horizon` is T, the largest number of turns of an episode, replayed ones included.

    settings/config.py refuses what is out of range.

    Args:
        k_start, eta: the schedule, see `depth`: where it begins, and training steps per turn of depth.
        b2f_budget: "slack" gives the student k + b2f_slack turns after the hand-over, "horizon" what is left of T.
        b2f_slack: turns beyond k, because k turns suffice only for a flawless finish.
        reopd_gamma: how fast the probability of a longer replay falls, see `plan`.
    """

    variant: Variant
    horizon: int
    k_start: int = 1
    eta: int = 5
    b2f_budget: Literal["slack", "horizon"] = "slack"
    b2f_slack: int = 2
    reopd_gamma: float = 0.6

    @property
    def needs_demonstration(self) -> bool:
        """Whether every task needs a demonstration."""
        return self.variant in ("b2f", "reopd", "sft")

    @property
    def deepens(self) -> bool:
        """Whether the depth grows; that of opd and sft is T and that of reopd 1 for ever."""
        return self.variant in ("f2b", "b2f")

    def depth(self, n: int) -> int:
        """Depth k at training step n (0-based), in turns.

        f2b and b2f: the paper's schedule min(k_start + floor(n / eta), T). opd and sft: T. reopd: 1.
        A function of n alone, so a resumed run goes on exactly. In slime n is the rollout id, whatever the optimizer
        steps per rollout. b2f stops at the demonstration's own length by its plan.
        """
        if not self.deepens:
            return 1 if self.variant == "reopd" else self.horizon
        return min(self.k_start + n // self.eta, self.horizon)

    def plan(self, k: int, demo_length: int = 0, n: int = 0, index: int = 0) -> EpisodePlan:
        """The plan of one training episode at depth k; the task's demonstration has L = `demo_length` turns, 1 to T.

        opd and f2b: the student plays min(k, T) turns. b2f: p = max(L - k, 0) turns are replayed; the student's
        budget is min(k + slack, T - p) while p > 0 and T once nothing is replayed, so training ends on the test
        distribution.
        reopd: t turns are replayed, with probability gamma^t / (gamma^0 + .. + gamma^(L - 1)), and one is played; t
        is drawn from the training step n and the sample's index, so it is the same when a run is resumed.

        Raises:
            ValueError: a demonstration is needed and there is none, or it is longer than the horizon.
        """
        assert self.variant != "sft", "nothing is played in this arm"
        if not self.needs_demonstration:
            return EpisodePlan(replayed=0, budget=min(k, self.horizon))
        if not 1 <= demo_length <= self.horizon:
            raise ValueError(f"{self.variant} needs a demonstration of 1 to {self.horizon} turns, not {demo_length}")
        if self.variant == "reopd":
            chances = [self.reopd_gamma**t for t in range(demo_length)]
            [replayed] = random.Random(f"{n} {index}").choices(range(demo_length), chances)
            return EpisodePlan(replayed=replayed, budget=1)
        replayed = max(demo_length - k, 0)
        left = self.horizon - replayed
        if replayed and self.b2f_budget == "slack":
            left = min(k + self.b2f_slack, left)
        return EpisodePlan(replayed=replayed, budget=left)

    def full_plan(self) -> EpisodePlan:
        """The plan of an evaluation episode: the full horizon, no curriculum."""
        return EpisodePlan(replayed=0, budget=self.horizon)
