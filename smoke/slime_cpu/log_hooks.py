"""slime's logging hooks for the smoke run: the lines of metrics.jsonl that train_arm.py writes itself."""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import hooks
from transcript import transcript

from slime.rollout.sglang_rollout import GenerateState


def log_rollout(
    rollout_id: int, args: Namespace, samples: list[Any], metrics: dict[str, Any] | None, seconds: float
) -> bool:
    """--custom-rollout-log-function-path. False: slime logs as well."""
    _append("rollout", rollout_id, hooks.rollout_metrics(args, samples, metrics, seconds))
    shown = min(samples, key=lambda sample: (-sample.reward, len(sample.tokens)))
    if args.opd_type == "sglang":  # a teacher in Megatron scores after this
        (_run_dir() / "trajectory.txt").write_text(transcript(shown, GenerateState(args).tokenizer))
    return False


def log_eval(rollout_id: int, args: Namespace, data: dict[str, Any], metrics: dict[str, Any] | None) -> bool:
    """--custom-eval-rollout-log-function-path. slime counts an evaluation after rollout n as n, like one before it."""
    updates = rollout_id + 1 if (_run_dir() / "metrics.jsonl").exists() else 0
    _append("eval", updates, metrics or {})
    return False


def _append(kind: str, n: int, values: dict[str, Any]) -> None:
    with (_run_dir() / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "n": n, **values}) + "\n")


def _run_dir() -> Path:
    return Path(os.environ["SMOKE_RUN_DIR"])
