"""Every rollout and evaluation as a line of $TCOD_RUN_DIR/metrics.jsonl, for tools/plot_runs.py. slime's hooks:

    --custom-rollout-log-function-path      examples.tcod.run_log.log_rollout
    --custom-eval-rollout-log-function-path examples.tcod.run_log.log_eval

A line is {"kind": "rollout" or "eval", "n": .., "train_s": .., metric: value, ..}. n is the rollout's id, or how many
rollouts were trained on before the evaluation. train_s is the time in seconds, since this process's line before, that
was neither rollout nor evaluation: training, weights and checkpoints. A resumed run plays the rollouts after its last
checkpoint again, so the last line of a kind and n is the one that counts.
"""

import json
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

_last_line_at: float | None = None  # time.monotonic()


def log_rollout(
    rollout_id: int, args: Namespace, samples: list[Any], metrics: dict[str, Any] | None, seconds: float
) -> bool:
    """The metrics that generate_rollout returned, and train_s. False: slime logs as well."""
    _append("rollout", rollout_id, metrics or {}, seconds)
    return False


def log_eval(rollout_id: int, args: Namespace, data: dict[str, Any], metrics: dict[str, Any] | None) -> bool:
    """The same for an evaluation. slime gives the one before rollout 0 and the one after it the same id."""
    metrics = metrics or {}
    trained = 0 if _last_line_at is None else rollout_id + 1
    _append("eval", trained, metrics, metrics.get("eval/tcod/eval_s", 0.0))
    return False


def _append(kind: str, n: int, metrics: dict[str, Any], seconds: float) -> None:
    global _last_line_at
    now = time.monotonic()
    train_s = 0.0 if _last_line_at is None else max(now - _last_line_at - seconds, 0.0)
    _last_line_at = now
    with (Path(os.environ["TCOD_RUN_DIR"]) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "n": n, "train_s": train_s, **metrics}) + "\n")
