"""Every rollout and evaluation as a line of $TCOD_RUN_DIR/metrics.jsonl, for tools/plot_runs.py. slime's hooks:

    --custom-rollout-log-function-path      examples.tcod.run_log.log_rollout
    --custom-eval-rollout-log-function-path examples.tcod.run_log.log_eval

A line is {"kind": "rollout" or "eval", "n": .., "train_s": .., metric: value, ..}. n is the rollout's id, or how many
rollouts were trained on before the evaluation. train_s is the time in seconds, since this process's line before, that
was neither rollout nor evaluation: training, weights and checkpoints. A resumed run plays the rollouts after its last
checkpoint again, so the last line of a kind and n is the one that counts. Where TCOD_RUN_DIR is not set nothing is
written; a line that cannot be written is counted in the next ones, as rollout/tcod/unsaved_lines so far.
"""

import json
import time
from argparse import Namespace
from typing import Any

from .run_dir import run_dir, write

_last_line_at: float | None = None  # time.monotonic()
_unsaved = 0
_rollout_played = False


def log_rollout(
    rollout_id: int,
    args: Namespace,
    samples: list[Any],
    rollout_extra_metrics: dict[str, Any] | None,
    rollout_time: float,
) -> bool:
    """The metrics that generate_rollout returned, and train_s. False: slime logs as well."""
    note_rollout()
    _append("rollout", rollout_id, {} if rollout_extra_metrics is None else rollout_extra_metrics, rollout_time)
    return False


def log_eval(rollout_id: int, args: Namespace, data: dict[str, Any], extra_metrics: dict[str, Any] | None) -> bool:
    """The same for an evaluation. slime gives the one before rollout 0 and the one after it the same id."""
    metrics = {} if extra_metrics is None else extra_metrics
    _append("eval", rollouts_before(rollout_id), metrics, metrics.get("eval/tcod/eval_s", 0.0))
    return False


def note_rollout() -> None:
    """A rollout was played in this process."""
    global _rollout_played
    _rollout_played = True


def rollouts_before(evaluation_id: int) -> int:
    """How many rollouts were trained on before an evaluation: its n in metrics.jsonl and in names of files.

    slime gives the evaluation before rollout 0 and the one after it the same id, and evaluates before a rollout only
    where a run begins.
    """
    return evaluation_id + 1 if _rollout_played else 0


def _append(kind: str, n: int, metrics: dict[str, Any], seconds: float) -> None:
    global _last_line_at, _unsaved
    now = time.monotonic()
    train_s = 0.0 if _last_line_at is None else max(now - _last_line_at - seconds, 0.0)
    _last_line_at = now
    if _unsaved:
        metrics["rollout/tcod/unsaved_lines"] = _unsaved  # slime logs these metrics afterwards
    line = json.dumps({"kind": kind, "n": n, "train_s": train_s, **metrics}) + "\n"
    if not write("metrics.jsonl", line, "metrics", append=True) and run_dir():
        _unsaved += 1
