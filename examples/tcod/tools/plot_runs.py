"""The paper's figures from run directories: success and trajectory KL against the step, KL by turn, wall time.

    python -m examples.tcod.tools.plot_runs runs.png opd=runs/opd-1 f2b=runs/f2b-1 f2b=runs/f2b-2 b2f=runs/b2f-1

Directories of the same name are seeds of one arm: its line is their mean, the band reaches from the lowest to the
highest. Each directory holds the metrics.jsonl of a run.
"""

import itertools
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .common.command import new_parser
from .common.jsonl import read_lines

logger = logging.getLogger(__name__)

Line = dict[str, Any]  # of metrics.jsonl
Arms = dict[str, list[list[Line]]]  # {arm: lines of each of its runs}
Curve = Mapping[float, float]
Style = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and dashes say the same without colour.
ARMS = {"opd": ("#0072B2", "o", "-"), "f2b": ("#D55E00", "s", "--"), "b2f": ("#009E73", "^", ":")}
OTHERS = (("#CC79A7", "#E69F00", "#56B4E9", "#000000"), "DvP", ("-.", (0, (6, 1, 1, 1, 1, 1))))
BEFORE = {"color": "#555555", "marker": "x", "label": "before training"}
THIN = {"marker": "", "linewidth": 1, "alpha": 0.6}

AXES = {
    "success": {"ylabel": "success", "ylim": (-0.03, 1.03)},
    "kl/trajectory": {"ylabel": "KL to the teacher, nats", "yscale": "symlog"},
}
WORK = {  # what the wall time is spent on: its metric in seconds, and the look of its bar
    "rollouts": ("rollout/tcod/rollout_s", {"color": "#DDDDDD"}),
    "training": ("train_s", {"color": "#AAAAAA", "hatch": "//"}),
    "evaluation": ("eval/tcod/eval_s", {"color": "#FFFFFF", "hatch": ".."}),
}


def read_run(folder: Path) -> list[Line]:
    """The lines that count: of those with the same kind and n, the last. Raises ConfigError.

    A line that is none of metrics is left out, with a warning.
    """
    path, lines = folder / "metrics.jsonl", {}
    for number, line in read_lines(path, "line of metrics", logger.warning):
        kind, n = line.get("kind"), line.get("n")
        if isinstance(kind, str) and isinstance(n, int):
            lines[kind, n] = line
        else:
            about = f"its kind is {kind} and its n {n}"
            logger.warning("line %d of %s is no line of metrics: %s; it is left out", number, path, about)
    return list(lines.values())


def curve(lines: Iterable[Line], metric: str) -> Curve:
    """{n: metric} of one run."""
    return {line["n"]: line[metric] for line in lines if metric in line}


def by_turn(line: Line, prefix: str) -> Curve:
    """{turn, from 1: KL} of one line; `prefix` ends in kl_by_turn/."""
    return {int(key.removeprefix(prefix)) + 1: value for key, value in line.items() if key.startswith(prefix)}


def work_minutes(lines: Iterable[Line]) -> dict[str, float]:
    """Wall time of one run by what it was spent on."""
    return {work: sum(line.get(metric, 0.0) for line in lines) / 60 for work, (metric, _) in WORK.items()}


def datasets(arms: Arms, metric: str) -> list[str] | list[None]:
    """Names of the evaluation datasets that have eval/tcod/<name>/<metric>; [None] where none has."""
    keys = dict.fromkeys(key for runs in arms.values() for lines in runs for line in lines for key in line)
    return re.findall(rf"^eval/tcod/(.+)/{metric}$", "\n".join(keys), re.MULTILINE) or [None]


def styles(arms: Mapping[str, Sized]) -> dict[str, Style]:
    """{arm: style of its lines} for {arm: its runs}. OPD, F2B and B2F look the same in every figure."""
    others, found = zip(*map(itertools.cycle, OTHERS), strict=False), {}
    for name, runs in arms.items():
        color, marker, line = ARMS[name] if name in ARMS else next(others)
        label = name.upper() if name in ARMS else name
        label += f", {len(runs)} seeds" if len(runs) > 1 else ""
        found[name] = {"color": color, "marker": marker, "linestyle": line, "markersize": 4, "label": label}
    return found


def draw_curve(axes: Axes, curves: Sequence[Curve], style: Style, band: bool = True) -> None:
    """The mean of the curves at each x, and the band from the lowest to the highest."""
    xs = sorted({x for curve in curves for x in curve})
    values = [[curve[x] for curve in curves if x in curve] for x in xs]
    if xs:
        axes.plot(xs, list(map(fmean, values)), markevery=max(len(xs) // 20, 1), **style)
    if xs and len(curves) > 1 and band:
        low, high = list(map(min, values)), list(map(max, values))
        axes.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0)


def finish(axes: Axes, **texts: Any) -> None:
    """Grid, legend, whole numbers on the x axis (updates, turns) and what Axes.set takes."""
    axes.grid(alpha=0.3)
    if isinstance(locator := axes.xaxis.get_major_locator(), MaxNLocator):  # not that of an axis of names
        locator.set_params(integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    axes.set(**texts)


def draw_metric(axes: Axes, arms: Arms, metric: str, dataset: str | None) -> None:
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
    title = f"{AXES[metric]['ylabel'].partition(',')[0]}, {dataset or 'training at depth k'}"
    finish(axes, xlabel="training step", title=title, **AXES[metric])


def draw_by_turn(axes: Axes, arms: Arms, dataset: str | None) -> None:
    """KL by turn before training and at the end; without an evaluation that has it, of the last training episodes."""
    prefix = f"eval/tcod/{dataset}/kl_by_turn/" if dataset else "rollout/tcod/kl_by_turn/"
    having = {name: [[line for line in lines if by_turn(line, prefix)] for lines in arms[name]] for name in arms}
    if dataset:
        first = [lines[0] for runs in having.values() for lines in runs if lines and lines[0]["n"] == 0]
        draw_curve(axes, [by_turn(line, prefix) for line in first], BEFORE)
    for name, style in styles(arms).items():
        draw_curve(axes, [by_turn(lines[-1], prefix) for lines in having[name] if lines], style)
    finish(axes, xlabel="turn", ylabel="KL of the turn, nats", title=f"KL by turn at the end, {dataset or 'training'}")


def draw_work(axes: Axes, arms: Arms) -> None:
    """Stacked bars, and over each the range of its seeds' totals."""
    names = [style["label"].replace(", ", "\n") for style in styles(arms).values()]
    minutes = [[work_minutes(lines) for lines in runs] for runs in arms.values()]
    bottom = [0.0] * len(names)
    for work, (_, look) in WORK.items():
        heights = [fmean(run[work] for run in runs) for runs in minutes]
        axes.bar(names, heights, bottom=bottom, edgecolor="#333333", label=work, **look)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    totals = [[sum(run.values()) for run in runs] for runs in minutes]
    axes.vlines(names, [min(runs) for runs in totals], [max(runs) for runs in totals], color="#333333")
    finish(axes, ylabel="minutes", title="wall time")


def draw(arms: Arms, path: Path) -> None:
    """Write the figure."""
    has_kl = any("kl/trajectory" in key for runs in arms.values() for lines in runs for line in lines for key in line)
    if not has_kl:
        logger.warning("no run has a KL to a teacher: its panels are left out")
    curves = [(metric, name) for metric in (AXES if has_kl else ["success"]) for name in datasets(arms, metric)]
    rows = math.ceil((len(curves) + 2) / 3)
    figure = Figure(figsize=(13, 4 * rows), layout="constrained")
    panels = iter(figure.subplots(rows, 3, squeeze=False).flat)
    for metric, name in curves:
        draw_metric(next(panels), arms, metric, name)
    if has_kl:
        draw_by_turn(next(panels), arms, datasets(arms, "kl/trajectory")[0])
    draw_work(next(panels), arms)
    for axes in panels:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("figure", type=Path, help="image to write")
    parser.add_argument("runs", nargs="+", metavar="ARM=DIR", help="several of the same name are seeds of one arm")
    options = parser.parse_args()
    arms: Arms = {}
    try:
        for run in options.runs:
            name, equals, folder = run.partition("=")
            lines = read_run(Path(folder)) if equals and (Path(folder) / "metrics.jsonl").is_file() else []
            if not lines:
                raise ValueError(f"{run} is not ARM=DIR with metrics in DIR/metrics.jsonl: name a run directory")
            arms.setdefault(name, []).append(lines)
        draw(arms, options.figure)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
