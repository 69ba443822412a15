"""Some episodes of every rollout and evaluation, for people to read: transcripts in $TCOD_RUN_DIR/rollouts.

    train_000012.jsonl            of rollout 12
    eval_unseen_000025.jsonl      of the evaluation on the data set "unseen" after 25 rollouts, n as in metrics.jsonl

tcod_save_episodes says how many. A line is a transcript with two more keys, {"arm": "f2b", "dataset": "train", ..}.
`python -m examples.tcod.tools.show_rollouts RUN_DIR` makes a page of them. A tracker gets the first ones as a table.
"""

import hashlib
import json
import logging
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..episode.record import Episode
from ..episode.rows import task_key, task_of
from .metrics import Metrics
from .run_dir import run_dir, write
from .run_log import note_rollout, rollouts_before
from .tracker import show_table, tracks
from .transcript import transcript

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeLog:
    """Saves some episodes of every rollout and evaluation.

    Attributes:
        limit: tcod_save_episodes.
        arm: tcod_variant.
    """

    args: Namespace
    arm: str
    limit: int | str
    tokenizer: Any

    def save_rollout(self, rollout_id: int, drawn: Sequence[Any]) -> Metrics:
        """Save some of the samples that were drawn for a rollout, failed ones included.

        Returns rollout/tcod/unsaved_episodes: how many of them could not be written.
        """
        note_rollout()
        return {"rollout/tcod/unsaved_episodes": self._save("train", rollout_id, rollout_id, drawn, self.limit)}

    def save_evaluation(self, rollout_id: int, data: dict[str, dict[str, Any]]) -> Metrics:
        """The same for every data set of an evaluation; `data` is RolloutFnEvalOutput.data."""
        limit = self.limit if self.limit == "all" else 2 * self.limit
        n = rollouts_before(rollout_id)
        return {
            f"eval/tcod/{name}/unsaved_episodes": self._save(f"eval_{name}", n, rollout_id, result["samples"], limit)
            for name, result in data.items()
        }

    def _save(self, stem: str, n: int, rollout_id: int, samples: Sequence[Any], limit: int | str) -> int:
        """Write stem_n.jsonl. Returns how many samples are missing there, 0 where there is no run directory."""
        if limit == 0 or (run_dir() is None and not tracks(self.args)):
            return 0
        try:
            about = {"arm": self.arm, "dataset": stem.removeprefix("eval_")}
            lines = [{**about, **transcript(sample, self.tokenizer), "n": n} for sample in choose(samples, limit)]
            show_table(self.args, stem, rollout_id, lines)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            saved = write(f"rollouts/{_file_name(stem)}_{n:06d}.jsonl", text, "episodes")
            return 0 if saved or run_dir() is None else len(lines)
        except Exception:  # a mistake in here must not end the run
            logger.exception("episodes are not saved")
            return len(samples) if limit == "all" else min(len(samples), int(limit))


def choose(samples: Sequence[Any], limit: int | str) -> list[Any]:
    """Samples to save, at most `limit` unless it is "all".

    One that was won, one that was lost and one for every reason of a failure come first. The others are those of the
    same tasks at every step, so that one can see what was learned. The choice depends on nothing but the tasks and how
    they ended. Aborted samples have nothing to show, and samples of other hooks are not ours.
    """
    ours = [sample for sample in samples if "tcod" in (sample.metadata or {}) and sample.status.value != "aborted"]
    times: Counter[str] = Counter()
    rank: dict[int, tuple[int, str]] = {}
    for sample in ours:
        task = _task_digest(sample)
        rank[id(sample)] = (times[task], task)  # of a group, one sample before any task's second one
        times[task] += 1
    ranked = sorted(ours, key=lambda sample: rank[id(sample)])
    if limit == "all":
        return ranked
    one_of_each = {_ending(sample): sample for sample in reversed(ranked)}
    first = [one_of_each[ending] for ending in sorted(one_of_each)]
    return list({id(sample): sample for sample in [*first, *ranked]}.values())[: int(limit)]


def _file_name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem)


def _task_digest(sample: Any) -> str:
    return hashlib.sha256(task_key(task_of(sample.metadata)).encode()).hexdigest()


def _ending(sample: Any) -> tuple[int, str]:
    """Won, lost, and each reason of a failure, in this order."""
    record = Episode.of(sample).record
    return (2, record.failure) if record.failure else (0 if record.won else 1, "")
