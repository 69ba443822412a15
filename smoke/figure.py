"""The smoke run's figure: KL by turn index before and after, success and trajectory KL against the training step."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.tcod.tools.plot_runs import draw_by_turn, draw_metric

KL, SUCCESS = "eval/tcod/heldout_t1/kl/trajectory", "eval/tcod/heldout/success"


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write the figure of {arm: lines of metrics.jsonl}."""
    arms = {arm: [lines] for arm, lines in results.items()}
    figure = Figure(figsize=(13, 4), layout="constrained")
    turns, success, kl = figure.subplots(1, 3)
    draw_by_turn(turns, arms, "heldout_t1")
    draw_metric(success, arms, "success", "heldout")
    draw_metric(kl, arms, "kl/trajectory", "heldout_t1")
    figure.suptitle("Recovery of a perturbed teacher (tiny models): full-horizon evaluation")
    figure.savefig(path, dpi=110)
