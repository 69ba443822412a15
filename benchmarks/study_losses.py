"""The second part of the study: what the loss is a mean over, crossed with the curricula. Its tables."""

import json
from pathlib import Path
from statistics import fmean

from benchmarks import study_report
from benchmarks.study_report import Arms, Result, table

NOT_RUN = "Not yet run: there are no results in `benchmarks/results/study/losses/`.\n"

PAIRS = (  # of the table of paired differences
    ("opd-token", "opd-trajectory"),
    ("opd-turn", "opd-trajectory"),
    ("opd-turn", "opd-token"),
    ("f2b-token", "opd-token"),
    ("b2f-token", "opd-token"),
    ("f2b-turn", "opd-turn"),
    ("b2f-turn", "opd-turn"),
    ("f2b-trajectory", "opd-trajectory"),
    ("b2f-trajectory", "opd-trajectory"),
)
TURNS = (1, 5, 10, 15, 20, 25, 30)
UPDATES = (1, 2, 4, 6, 8, 10, 15, 20, 25, 30)  # of the table of training episodes


def text(arms: Arms) -> str:
    """The second part's results, in Markdown."""
    if not arms:
        return NOT_RUN
    parts = [
        f"{study_report.circumstances_line(arms)}\n",
        "**Held-out success at the full horizon**\n\n" + study_report.final_table(arms),
        "**Paired differences**, same seed, student and games\n\n" + study_report.difference_table(arms, PAIRS),
        "**KL per token in the training episodes**, nats, at some updates; mean over seeds\n\n" + training_table(arms),
        "**What it took**, mean per run\n\n" + study_report.cost_table(arms),
        "**KL by turn**, nats, and the number of held-out episodes at temperature 1 that reached the turn\n\n"
        + study_report.turn_table(arms, list(arms), TURNS),
    ]
    return "\n".join(parts)


def training_table(arms: Arms) -> str:
    """Of opd these are whole episodes, of f2b the first k turns, of b2f what follows the replay."""
    rows = []
    for name, runs in arms.items():
        every = [token_kl(one) for one in runs.values()]
        cells = [f"{fmean(kl[n - 1] for kl in every):.2f}" for n in UPDATES]
        largest = fmean(max(kl[1:]) for kl in every)
        rows.append([name, *cells, f"{largest:.2f}"])
    return table(["arm", *(f"update {n}" for n in UPDATES), "largest after the first"], rows)


def token_kl(one: Result) -> list[float]:
    """Of the training episodes of each update, in nats, a mean over tokens."""
    return [update["kl"] * one["settings"]["batch"] / update["trained"] for update in one["updates"]]


def pilot_table(folder: Path) -> str:
    """A row per pilot run: KL per token in the training episodes, and held-out success halfway and at the end."""
    results = sorted((json.loads(path.read_text()) for path in folder.glob("*.json")), key=_pilot_order)
    rows = []
    for one in results:
        kl = token_kl(one)
        middle, last = one["evaluations"][-2:]
        cells = [f"{kl[n - 1]:.2f}" for n in UPDATES] + [f"{max(kl[1:]):.2f}"]
        cells += [f"{point['success']:.2f}" for point in (middle, last)] + [f"{last['kl']:.0f}"]
        rows.append([one["arm"], f"{one['settings']['lr']:g}", *cells])
    header = ["arm", "learning rate", *(f"update {n}" for n in UPDATES), "largest after the first"]
    return table([*header, "success halfway", "success", "trajectory KL"], rows)


def _pilot_order(one: Result) -> tuple[float, str]:
    return one["settings"]["lr"], one["arm"]
