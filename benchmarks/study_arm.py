"""One job of the study: smoke/train_arm.py with its options, and `--control` for what no setting of the recipe does.

    shuffled         the teacher's log-probs change places among all trained tokens of a batch: nothing can be learned
    random-horizon   each update draws its depth k evenly from 1..T: as short as a curriculum on average, in no order
"""

import argparse
import ctypes
import random
import signal
import sys
from typing import Any

import train_arm
from curriculum import Curriculum
from trainer import Trainer


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


def random_depth(curriculum: Curriculum, n: int) -> int:
    """A function of n alone, as the recipe's schedule is."""
    return random.Random(f"depth/{n}").randint(1, curriculum.horizon)


def evaluation_datasets(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fewer games at temperature 1: a KL is a mean over many tokens, a success one of two outcomes."""
    success, kl = smokes_datasets(options)
    return [success, {**kl, "path": str(options.data / "heldout_kl.jsonl")}]


smokes_datasets = train_arm.evaluation_datasets


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no job outlives a study that is killed
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--control", choices=["shuffled", "random-horizon"])
    options, sys.argv[1:] = parser.parse_known_args()
    train_arm.evaluation_datasets = evaluation_datasets
    if options.control == "shuffled":
        train_arm.Trainer = ShuffledTrainer
    elif options.control == "random-horizon":
        Curriculum.depth = random_depth
    train_arm.main()


if __name__ == "__main__":
    main()
