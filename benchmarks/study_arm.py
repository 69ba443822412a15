"""One job of the study: smoke/train_arm.py with its options, and `--control` for what no setting of the recipe does.

    shuffled         the teacher's log-probs change places among all trained tokens of a batch
    random-horizon   the curriculum's depths k of all updates, in a random order
"""

import argparse
import ctypes
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

from examples.tcod.curriculum import Curriculum
from smoke import train_arm
from smoke.trainer import Trainer


class ShuffledTrainer(Trainer):
    """A trainer whose teacher says the right numbers about the wrong tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rng = random.Random(0)

    def step(self, batch: dict[str, Any]) -> dict[str, float]:
        return super().step({**batch, "teacher_log_probs": self.shuffled(batch)})

    def shuffled(self, batch: dict[str, Any]) -> list[list[float]]:
        places = [(i, j) for i, mask in enumerate(batch["loss_masks"]) for j, trained in enumerate(mask) if trained]
        values = [batch["teacher_log_probs"][i][j] for i, j in places]
        self._rng.shuffle(values)
        result = [list(row) for row in batch["teacher_log_probs"]]
        for (i, j), value in zip(places, values, strict=True):
            result[i][j] = value
        return result


Depth = Callable[[Curriculum, int], int]


def in_random_order(depth: Depth, updates: int, seed: int, asked: set[int]) -> Depth:
    """The schedule with its first `updates` depths shuffled; the next one only stamps the last evaluation.

    `asked` gets the updates whose depth the recipe has asked for.
    """
    order = [*random.Random(seed).sample(range(updates), updates), updates]

    def shuffled(curriculum: Curriculum, n: int) -> int:
        asked.add(n)
        return depth(curriculum, order[n])

    return shuffled


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no job outlives a study that is killed
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--control", choices=["shuffled", "random-horizon"])
    control, sys.argv[1:] = parser.parse_known_args()
    if control.control != "random-horizon":
        train_arm.main(ShuffledTrainer if control.control else Trainer)
        return
    options, asked = train_arm.option_parser().parse_args(), set()
    Curriculum.depth = in_random_order(Curriculum.depth, options.updates, options.seed, asked)
    train_arm.main()
    if not asked >= set(range(options.updates)):
        sys.exit("random-horizon: the recipe takes its depths from elsewhere than Curriculum.depth")


if __name__ == "__main__":
    main()
