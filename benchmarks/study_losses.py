"""The second part of the study: what the loss is a mean over, crossed with the curricula. Its tables."""

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

from benchmarks import study_report
from benchmarks.study_report import Arms, Result, final, mean_text, paired, table
from examples.tcod.tools.plot_runs import draw_curve, finish, styles

FIGURE = study_report.FIGURE.with_name("study_losses.png")

PAIRS = (  # of the table of paired differences
    ("opd-token", "opd-trajectory"),
    ("opd-turn", "opd-trajectory"),
    ("opd-turn", "opd-token"),
    ("f2b-trajectory", "opd-trajectory"),
    ("f2b-token", "opd-token"),
    ("f2b-turn", "opd-turn"),
    ("b2f-trajectory", "opd-trajectory"),
    ("b2f-token", "opd-token"),
    ("b2f-turn", "opd-turn"),
    ("opd-token", "opd-token-calm"),
    ("f2b-token", "f2b-token-calm"),
    ("b2f-token", "b2f-token-calm"),
    ("f2b-token-calm", "opd-token-calm"),
    ("b2f-token-calm", "opd-token-calm"),
    ("reopd-token-calm", "opd-token-calm"),
    ("f2b-kl-token", "f2b-token"),
    ("reopd-token", "opd-token"),
)
LOSSES = ("token", "turn", "trajectory")
CURRICULA = (*study_report.MAIN, "reopd")
COLUMNS = {
    **{loss: f"mean over {loss.replace('trajectory', 'trajectorie')}s" for loss in LOSSES},
    "token-calm": "mean over tokens,\na quarter of the rate",
}
TURNS = (1, 5, 10, 15, 20, 25, 30)
LATE = 6  # updates at the end in which F2B, too, plays whole episodes
SHOWN = (1, 2, 3, 4, 6, 8, 10, 15, 20, 25, 30)  # updates of the table of training episodes


def text(arms: Arms) -> str:
    """The second part's results, in Markdown."""
    parts = [
        f"{study_report.circumstances_line(arms)} In brackets 95% bootstrap intervals over five seeds; in "
        "parentheses, where seeds are fewer, the range.\n",
        f"**After training**: held-out games, and the training episodes of the last {LATE} updates (temperature 1)\n\n"
        + end_table(arms),
        "**Paired differences**, same seed and student; the same training games, too, but for seed 1 of "
        "b2f-token-calm\n\n" + difference_table(arms),
        "**KL per token in the training episodes**, nats, mean over seeds; OPD's are whole episodes, F2B's the first "
        "k turns, B2F's what follows the replay\n\n" + training_table(arms),
        "**What it took**, mean per run\n\n" + study_report.cost_table(arms),
        "**KL by turn**, nats, and the number of held-out episodes at temperature 1 that reached the turn\n\n"
        + study_report.turn_table(arms, list(arms), TURNS),
    ]
    if missing := [name for name in dict.fromkeys(chain(*PAIRS)) if name not in arms]:
        parts.append(f"**Not run yet**: {', '.join(missing)}.\n")
    return "\n".join(parts)


def token_kl(one: Result) -> list[float]:
    """Of the training episodes of each update, in nats, a mean over tokens."""
    return [update["kl"] * one["settings"]["batch"] / update["trained"] for update in one["updates"]]


def late(metric: str) -> Callable[[Result], float]:
    """Mean over the training episodes of the last updates: `success`, or `kl` of a trajectory in nats."""
    return lambda one: fmean(update[metric] for update in one["updates"][-LATE:])


def doublings(one: Result) -> int:
    """How often the KL per token of the training episodes more than doubled from one update to the next."""
    return sum(after > 2 * before for before, after in pairwise(token_kl(one)))


def end_table(arms: Arms) -> str:
    columns: dict[str, tuple[Callable[[Result], float], str]] = {
        "success": (final("success"), ".2f"),
        "at temperature 1": (final("success_t1"), ".2f"),
        "KL, nats": (final("kl"), ".1f"),
        "training success": (late("success"), ".2f"),
        "training KL, nats": (late("kl"), ".1f"),
        "doublings of the KL": (doublings, ".1f"),
    }
    rows = []
    for name, runs in arms.items():
        halfway = fmean(one["evaluations"][-2]["success"] for one in runs.values())
        cells = [mean_text([value(one) for one in runs.values()], form) for value, form in columns.values()]
        successes = [final("success")(one) for one in runs.values()]
        deviation = f"{stdev(successes):.3f}" if len(runs) > 1 else ""
        rows.append([name, str(len(runs)), f"{halfway:.2f}", cells[0], deviation, *cells[1:]])
    first, *others = columns
    return table(["arm", "seeds", "success halfway", first, "SD over seeds", *others], rows)


def difference_table(arms: Arms, pairs: Sequence[tuple[str, str]] = PAIRS) -> str:
    """A row per pair that has a seed in common: the first arm minus the second."""
    columns: dict[str, tuple[Callable[[Result], float], str]] = {
        "success": (final("success"), ".2f"),
        "training success": (late("success"), ".2f"),
        "training KL, nats": (late("kl"), ".1f"),
    }
    rows = []
    for name, base in pairs:
        if not arms.get(name, {}).keys() & arms.get(base, {}).keys():
            continue
        differences = [paired(arms[name], arms[base], value) for value, _ in columns.values()]
        ahead = f"{sum(value > 0 for value in differences[0])} of {len(differences[0])}"
        forms = (form for _, form in columns.values())
        texts = [mean_text(values, form, "+") for values, form in zip(differences, forms, strict=True)]
        lead = mean_text(study_report.lead_at_equal_steps(arms[name], arms[base]), ".2f", "+")
        rows.append([f"{name} - {base}", ahead, *texts, lead])
    return table(["difference", "seeds ahead", *columns, "success at equal environment steps"], rows)


def training_table(arms: Arms) -> str:
    rows = []
    for name, runs in arms.items():
        every = [token_kl(one) for one in runs.values()]
        rows.append([name, *(f"{fmean(kl[n - 1] for kl in every):.2f}" for n in SHOWN)])
    return table(["arm", *(f"update {n}" for n in SHOWN)], rows)


def draw(arms: Arms, path: Path) -> None:
    """KL per token and success of the training episodes against the update: a column per loss and learning rate."""
    columns = {
        title: {name: list(arms[f"{name}-{suffix}"].values()) for name in CURRICULA if f"{name}-{suffix}" in arms}
        for suffix, title in COLUMNS.items()
    }
    columns = {title: runs for title, runs in columns.items() if runs}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, len(columns), sharey="row", squeeze=False)
    for i, (title, runs) in enumerate(columns.items()):
        kl, success = panels[:, i]
        for name, style in styles(runs).items():
            draw_curve(kl, [dict(enumerate(token_kl(one), 1)) for one in runs[name]], style)
            points = [{update["n"] + 1: update["success"] for update in one["updates"]} for one in runs[name]]
            draw_curve(success, points, style)
        finish(kl, xlabel="update", yscale="log", title=title)
        finish(success, xlabel="update")
    panels[0, 0].set_ylabel("KL per token, nats")
    panels[1, 0].set_ylabel("success, at depth k")
    figure.suptitle("training episodes")
    figure.savefig(path, dpi=110)
