"""The smoke run's figure: KL by turn index before and after, success and trajectory KL against the update."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLE = {"f2b": ("#1f77b4", "o", "-"), "b2f": ("#ff7f0e", "s", "--"), "opd": ("#2ca02c", "^", ":")}
KL, SUCCESS = "eval/tcod/heldout_t1/kl/trajectory", "eval/tcod/heldout/success"
BY_TURN = "eval/tcod/heldout_t1/kl_by_turn/"


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write the figure of {arm: lines of metrics.jsonl} as a PNG."""
    figure, (turns, success, kl) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    # Every arm starts from the same checkpoint, so any arm's first evaluation is the state before.
    before = next(line for lines in results.values() for line in lines if line["kind"] == "eval")
    turns.plot(*by_turn(before), color="#555555", marker="x", label="before")
    for arm, lines in results.items():
        color, marker, dash = STYLE[arm]
        evaluations = [line for line in lines if line["kind"] == "eval"]
        rollouts = [line for line in lines if line["kind"] == "rollout"]
        turns.plot(*by_turn(evaluations[-1]), color=color, marker=marker, linestyle=dash, label=f"after {arm.upper()}")
        steps = [line["n"] for line in evaluations]
        success.plot(
            steps, [e[SUCCESS] for e in evaluations], color=color, marker=marker, linestyle=dash, label=arm.upper()
        )
        kl.plot(steps, [e[KL] for e in evaluations], color=color, marker=marker, linestyle=dash, label=arm.upper())
        kl.plot(
            [line["n"] for line in rollouts],
            [line["rollout/tcod/kl/trajectory"] for line in rollouts],
            color=color,
            linestyle=dash,
            alpha=0.4,
            label=f"{arm.upper()}, training episodes at depth k",
        )
    turns.set(xlabel="turn", ylabel="KL of the turn, nats", title="KL by turn index, held-out games")
    success.set(xlabel="update", ylabel="success", ylim=(0, 1), title="held-out success, temperature 0.4")
    kl.set(xlabel="update", ylabel="trajectory KL, nats", yscale="symlog", title="trajectory KL to the teacher")
    for axes in (turns, success, kl):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle("Recovery of a perturbed teacher (tiny models): full-horizon evaluation")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def by_turn(evaluation: dict[str, Any]) -> tuple[list[int], list[float]]:
    points = sorted(
        (int(key[len(BY_TURN) :]) + 1, value) for key, value in evaluation.items() if key.startswith(BY_TURN)
    )
    return [turn for turn, _ in points], [value for _, value in points]
