"""The paper's figures from run directories: success and trajectory KL against the step, KL by turn, wall time.

    python -m examples.tcod.tools.plot_runs runs.png opd=runs/opd-1 f2b=runs/f2b-1 f2b=runs/f2b-2 b2f=runs/b2f-1

Directories of the same name are seeds of one arm: its line is their mean, the band reaches from the lowest to the
highest. Each directory holds the metrics.jsonl of a run (run_log.py, or the smoke run).
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plotting import BEFORE, THIN, Curve, draw_curve, finish, label, styles

Line = dict[str, Any]  # of metrics.jsonl
Arms = dict[str, list[list[Line]]]  # {arm: lines of each of its runs}

AXES = {
    "success": {"ylabel": "success", "ylim": (-0.03, 1.03)},
    "kl/trajectory": {"ylabel": "trajectory KL, nats", "yscale": "symlog"},
}
WORK = {"rollouts": ("#DDDDDD", ""), "training": ("#AAAAAA", "//"), "evaluation": ("#FFFFFF", "..")}


def read_run(folder: Path) -> list[Line]:
    """The lines that count: of those with the same kind and n, the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return list({(line["kind"], line["n"]): line for line in lines}.values())


def curve(lines: Iterable[Line], metric: str) -> Curve:
    """{n: metric} of one run."""
    return {line["n"]: line[metric] for line in lines if metric in line}


def by_turn(line: Line, prefix: str) -> Curve:
    """{turn, from 1: KL} of one line; `prefix` ends in kl_by_turn/."""
    return {int(key.removeprefix(prefix)) + 1: value for key, value in line.items() if key.startswith(prefix)}


def work_minutes(lines: Iterable[Line]) -> dict[str, float]:
    """Wall time of one run by what it was spent on."""
    totals = dict.fromkeys(WORK, 0.0)
    for line in lines:
        totals["rollouts"] += line.get("rollout/tcod/rollout_s", 0.0) / 60
        totals["training"] += line.get("train_s", 0.0) / 60
        totals["evaluation"] += line.get("eval/tcod/eval_s", 0.0) / 60
    return totals


def datasets(arms: Arms, metric: str) -> list[str]:
    """Names of the evaluation datasets that have eval/tcod/<name>/<metric>."""
    keys = {key: None for runs in arms.values() for lines in runs for line in lines for key in line}
    found = [key.split("/") for key in keys if key.startswith("eval/tcod/") and key.endswith(f"/{metric}")]
    return [parts[2] for parts in found if "/".join(parts[3:]) == metric]


def draw_metric(axes: Axes, arms: Arms, metric: str, dataset: str | None, title: str) -> None:
    """The metric of the evaluations on `dataset`, and in thin lines that of the training episodes.

    Without a dataset, of the training episodes alone.
    """
    for name, style in styles(arms).items():
        if dataset:
            draw_curve(axes, [curve(lines, f"eval/tcod/{dataset}/{metric}") for lines in arms[name]], style)
            style = {**style, **THIN, "label": None}
        draw_curve(axes, [curve(lines, f"rollout/tcod/{metric}") for lines in arms[name]], style, band=not dataset)
    if dataset:
        axes.plot([], [], color="#555555", label="training episodes, at depth k", **THIN)
    finish(axes, xlabel="training step", title=title, **AXES[metric])


def draw_by_turn(axes: Axes, arms: Arms, dataset: str | None, title: str) -> None:
    """KL by turn before training and at the end; without an evaluation that has it, of the last training episodes."""
    prefix = f"eval/tcod/{dataset}/kl_by_turn/" if dataset else "rollout/tcod/kl_by_turn/"
    having = {
        name: [[line for line in lines if any(key.startswith(prefix) for key in line)] for lines in runs]
        for name, runs in arms.items()
    }
    if dataset:
        first = [lines[0] for runs in having.values() for lines in runs if lines and lines[0]["n"] == 0]
        draw_curve(axes, [by_turn(line, prefix) for line in first], BEFORE)
    for name, style in styles(arms).items():
        draw_curve(axes, [by_turn(lines[-1], prefix) for lines in having[name] if lines], style)
    finish(axes, xlabel="turn", ylabel="KL of the turn, nats", title=title)


def draw_work(axes: Axes, arms: Arms) -> None:
    """Stacked bars, and over each the range of its seeds' totals."""
    names = [label(name, runs).replace(", ", "\n") for name, runs in arms.items()]
    minutes = [[work_minutes(lines) for lines in runs] for runs in arms.values()]
    bottom = [0.0] * len(names)
    for work, (shade, hatch) in WORK.items():
        heights = [fmean(run[work] for run in runs) for runs in minutes]
        axes.bar(names, heights, bottom=bottom, color=shade, hatch=hatch, edgecolor="#333333", label=work)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    totals = [[sum(run.values()) for run in runs] for runs in minutes]
    below = [mean - min(runs) for mean, runs in zip(bottom, totals, strict=True)]
    above = [max(runs) - mean for mean, runs in zip(bottom, totals, strict=True)]
    axes.errorbar(names, bottom, yerr=[below, above], fmt="none", ecolor="#333333", capsize=4)
    finish(axes, ylabel="minutes", title="wall time")


def draw(arms: Arms, path: Path) -> None:
    """Write the figure."""
    arms = {name: arms[name] for name in styles(arms)}
    success, scored = datasets(arms, "success") or [None], datasets(arms, "kl/trajectory") or [None]
    rows = math.ceil((len(success) + len(scored) + 2) / 3)
    figure = Figure(figsize=(13, 4 * rows), layout="constrained")
    panels = iter(figure.subplots(rows, 3, squeeze=False).flat)
    for name in success:
        draw_metric(next(panels), arms, "success", name, f"success, {name or 'training at depth k'}")
    for name in scored:
        draw_metric(next(panels), arms, "kl/trajectory", name, f"KL to the teacher, {name or 'training at depth k'}")
    draw_by_turn(next(panels), arms, scored[0], f"KL by turn at the end, {scored[0] or 'training'}")
    draw_work(next(panels), arms)
    for axes in panels:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures from run directories.")
    parser.add_argument("figure", type=Path, help="image to write")
    parser.add_argument("runs", nargs="+", metavar="ARM=DIR", help="several of the same name are seeds of one arm")
    options = parser.parse_args()
    arms: Arms = {}
    for run in options.runs:
        name, equals, folder = run.partition("=")
        if not equals or not (Path(folder) / "metrics.jsonl").is_file():
            parser.error(f"{run} is not ARM=DIR with a metrics.jsonl in DIR: name a run directory")
        arms.setdefault(name, []).append(read_run(Path(folder)))
    try:
        styles(arms)
    except ValueError as error:
        parser.error(f"{error}: name fewer")
    draw(arms, options.figure)


if __name__ == "__main__":
    main()
