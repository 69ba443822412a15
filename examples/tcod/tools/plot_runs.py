"""The paper's figures from run directories: success and trajectory KL against the step, KL by turn, wall time.

    python plot_runs.py runs.png opd=runs/opd-1 f2b=runs/f2b-1 f2b=runs/f2b-2 b2f=runs/b2f-1

Directories of the same name are seeds of one arm: its line is their mean, the band reaches from the lowest to the
highest. Each directory holds the metrics.jsonl of a run (tcod_log.py, or the smoke run).
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Line = dict[str, Any]  # of metrics.jsonl
Curve = dict[int, float]

# Colours of one palette that colour-blind readers can tell apart; markers and dashes say the same without colour.
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", ":"), ("#CC79A7", "D", "-.")]
WORK = {"rollouts": "", "training": "//", "evaluation": ".."}


def read_run(folder: Path) -> list[Line]:
    """The lines that count: of those with the same kind and n, the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return list({(line["kind"], line["n"]): line for line in lines}.values())


def curve(lines: Iterable[Line], kind: str, metric: str) -> Curve:
    """{n: metric} of one run."""
    return {line["n"]: line[metric] for line in lines if line["kind"] == kind and metric in line}


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


def datasets(arms: dict[str, list[list[Line]]], metric: str) -> list[str]:
    """Names of the evaluation datasets that have eval/tcod/<name>/<metric>."""
    keys = {key: None for runs in arms.values() for lines in runs for line in lines for key in line}
    found = [key.split("/") for key in keys if key.startswith("eval/tcod/") and key.endswith(f"/{metric}")]
    return [parts[2] for parts in found if "/".join(parts[3:]) == metric]


def draw_curves(axes: Axes, arms: dict[str, list[list[Line]]], curve_of: Callable[[list[Line]], Curve]) -> None:
    """One line per arm: the mean of its runs at each x, and the band between the lowest and the highest."""
    for (name, runs), (colour, marker, dash) in zip(arms.items(), STYLES, strict=False):
        values = defaultdict(list)
        for lines in runs:
            for x, y in curve_of(lines).items():
                values[x].append(y)
        if values:
            xs = sorted(values)
            style = {"color": colour, "marker": marker, "linestyle": dash, "markevery": max(len(xs) // 10, 1)}
            axes.plot(xs, [fmean(values[x]) for x in xs], label=label(name, runs), markersize=4, **style)
            if len(runs) > 1:
                low, high = [min(values[x]) for x in xs], [max(values[x]) for x in xs]
                axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)


def label(name: str, runs: list[list[Line]]) -> str:
    return name if len(runs) == 1 else f"{name}, {len(runs)} seeds"


def draw_work(axes: Axes, arms: dict[str, list[list[Line]]]) -> None:
    """Stacked bars, and over each the range of its seeds' totals."""
    names = [label(name, runs) for name, runs in arms.items()]
    minutes = [[work_minutes(lines) for lines in runs] for runs in arms.values()]
    bottom = [0.0] * len(names)
    for (work, hatch), shade in zip(WORK.items(), ("#56B4E9", "#E69F00", "#F0E442"), strict=True):
        heights = [fmean(run[work] for run in runs) for runs in minutes]
        axes.bar(names, heights, bottom=bottom, color=shade, hatch=hatch, edgecolor="#333333", label=work)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    totals = [[sum(run.values()) for run in runs] for runs in minutes]
    below = [mean - min(runs) for mean, runs in zip(bottom, totals, strict=True)]
    above = [max(runs) - mean for mean, runs in zip(bottom, totals, strict=True)]
    axes.errorbar(names, bottom, yerr=[below, above], fmt="none", ecolor="#333333", capsize=4)
    axes.set(ylabel="minutes", title="wall time")


def draw(arms: dict[str, list[list[Line]]], path: Path) -> None:
    """Write the figure of {arm: lines of each of its runs}."""
    panels: list[Callable[[Axes], None]] = []

    def add(curve_of: Callable[[list[Line]], Curve], **texts: Any) -> None:
        def panel(axes: Axes) -> None:
            draw_curves(axes, arms, curve_of)
            axes.set(**texts)

        panels.append(panel)

    for name in datasets(arms, "success"):
        metric = f"eval/tcod/{name}/success"
        add(
            lambda lines, metric=metric: curve(lines, "eval", metric),
            **{"xlabel": "step", "ylabel": "success", "ylim": (0, 1), "title": f"success, {name}"},
        )
    nats = {"xlabel": "step", "ylabel": "trajectory KL, nats", "yscale": "symlog"}
    scored = datasets(arms, "kl/trajectory")
    for name in scored:
        metric = f"eval/tcod/{name}/kl/trajectory"
        add(lambda lines, metric=metric: curve(lines, "eval", metric), **nats, title=f"KL to the teacher, {name}")
    training = "rollout/tcod/kl/trajectory"
    add(lambda lines: curve(lines, "rollout", training), **nats, title="KL to the teacher, training at depth k")
    kind, prefix = ("eval", f"eval/tcod/{scored[0]}/") if scored else ("rollout", "rollout/tcod/")

    def last_by_turn(lines: list[Line]) -> Curve:
        of_kind = [line for line in lines if line["kind"] == kind]
        return by_turn(of_kind[-1], f"{prefix}kl_by_turn/") if of_kind else {}

    title = f"KL by turn at the end, {scored[0] if scored else 'training'}"
    add(last_by_turn, xlabel="turn", ylabel="KL of the turn, nats", title=title)
    panels.append(lambda axes: draw_work(axes, arms))

    rows = -(-len(panels) // 3)
    figure, grid = plt.subplots(rows, 3, figsize=(13, 4 * rows), layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures from run directories.")
    parser.add_argument("figure", type=Path, help="image to write")
    parser.add_argument("runs", nargs="+", metavar="ARM=DIR", help="several of the same name are seeds of one arm")
    options = parser.parse_args()
    arms: dict[str, list[list[Line]]] = {}
    for run in options.runs:
        name, equals, folder = run.partition("=")
        if not equals or not (Path(folder) / "metrics.jsonl").is_file():
            parser.error(f"{run} is not ARM=DIR with a metrics.jsonl in DIR: name a run directory")
        arms.setdefault(name, []).append(read_run(Path(folder)))
    if len(arms) > len(STYLES):
        parser.error(f"{len(arms)} arms are more than the {len(STYLES)} that can be told apart: name fewer")
    draw(arms, options.figure)


if __name__ == "__main__":
    main()
