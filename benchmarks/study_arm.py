"""One job of the study: smoke/train_arm.py with its options, and with two more.

`--keep N` keeps the weights after N updates for another job. `--control` is for what no setting of the recipe does:

    shuffled         the teacher's log-probs change places among all trained tokens of a batch
    random-horizon   the curriculum's depths k of all updates, in a random order
"""

import argparse
import ctypes
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study_arms import KEPT
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


def keeping(trainer: type[Trainer], updates: int) -> type[Trainer]:
    """A trainer that keeps its weights after so many updates, for a job that goes on with them."""

    class KeepingTrainer(trainer):
        saves = 0  # the first is before the first update

        def save(self, folder: Path) -> None:
            super().save(folder)
            if self.saves == updates:
                shutil.copytree(folder, folder.with_name(KEPT))
            self.saves += 1

    return KeepingTrainer


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no job outlives a study that is killed
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--control", choices=["shuffled", "random-horizon"])
    parser.add_argument("--keep", type=int, default=0)
    control, sys.argv[1:] = parser.parse_known_args()
    trainer = ShuffledTrainer if control.control == "shuffled" else Trainer
    trainer = keeping(trainer, control.keep) if control.keep else trainer
    if control.control != "random-horizon":
        train_arm.main(trainer)
        return
    options, asked = train_arm.option_parser().parse_args(), set()
    Curriculum.depth = in_random_order(Curriculum.depth, options.updates, options.seed, asked)
    train_arm.main(trainer)
    if not asked >= set(range(options.updates)):
        sys.exit("random-horizon: the recipe takes its depths from elsewhere than Curriculum.depth")


if __name__ == "__main__":
    main()
