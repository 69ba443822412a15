"""How every figure looks: the order and style of the arms, a line per arm with the range of its seeds, the axes."""

from collections.abc import Mapping, Sequence, Sized
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

Curve = Mapping[float, float]
Style = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and dashes say the same without colour.
ARMS = {"opd": ("#0072B2", "o", "-"), "f2b": ("#D55E00", "s", "--"), "b2f": ("#009E73", "^", ":")}
OTHERS = [("#CC79A7", "D", "-."), ("#E69F00", "v", (0, (6, 1, 1, 1, 1, 1))), ("#56B4E9", "P", (0, (1, 3)))]
BEFORE = {"color": "#555555", "marker": "x", "label": "before training"}
THIN = {"marker": "", "linewidth": 1, "alpha": 0.6}


def styles(arms: Mapping[str, Sized]) -> dict[str, Style]:
    """{arm: style of its lines} for {arm: its runs}: OPD, F2B and B2F, then other names in the order given.

    Raises:
        ValueError: there are more other names than can be told apart.
    """
    others = [name for name in arms if name not in ARMS]
    if len(others) > len(OTHERS):
        raise ValueError(f"besides {', '.join(ARMS)} at most {len(OTHERS)} arms can be told apart: name fewer")
    found = {}
    for name, (color, marker, line) in {**ARMS, **dict(zip(others, OTHERS, strict=False))}.items():
        if name in arms:
            label = name.upper() if name in ARMS else name
            label += f", {len(arms[name])} seeds" if len(arms[name]) > 1 else ""
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
