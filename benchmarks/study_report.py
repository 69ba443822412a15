"""The study's tables, as Markdown for STUDY.md. Whoever changes a result copies them there, and writes the findings.

Everything here is computed from results/study/*.json, so `study --report` gives the same tables again anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import study_figures
from benchmarks.study_arms import NOTES, TURNS_TO_WIN
from benchmarks.study_results import CHECKS, LATE, SPENT, Results, interval, kl_by_turn


@dataclass(frozen=True)
class Part:
    """What is shown of a part of the study.

    Attributes:
        arms: the first ones of every table.
        course: those that are shown on the way and by turn.
        pairs: of the table of paired differences.
        turns, updates: of the tables of KL by turn and, where there are any, by update.
    """

    arms: tuple[str, ...]
    course: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    turns: tuple[int, ...]
    updates: tuple[int, ...]


FIRST = Part(
    arms=("opd", "f2b", "b2f", "opd-f2b-rate", "b2f-f2b-rate"),
    course=("opd", "f2b", "b2f", "opd-f2b-rate", "b2f-f2b-rate"),
    pairs=(
        ("f2b", "opd"),
        ("b2f", "opd"),
        ("f2b", "opd-f2b-rate"),
        ("b2f-f2b-rate", "opd-f2b-rate"),
        *(("f2b", control) for control in ("opd-batch-11", "fixed-horizon-10", "random-horizon")),
        *((f"{name}-eta-{eta}", name) for name in ("f2b", "b2f") for eta in (1, 4, 6)),
        ("b2f-to-the-horizon", "b2f"),
    ),
    turns=(1, 3, 5, 8, 12, 16, 20),
    updates=(),
)
SECOND = Part(
    arms=("opd-token-calm", "f2b-token-calm", "b2f-token-calm", "reopd-token-calm"),
    course=("opd-token", "f2b-token", "b2f-token", "opd-token-calm", "f2b-token-calm", "b2f-token-calm"),
    pairs=(
        ("opd-token", "opd-trajectory"),
        ("opd-turn", "opd-trajectory"),
        ("opd-turn", "opd-token"),
        *((f"{name}-{loss}", f"opd-{loss}") for name in ("f2b", "b2f") for loss in ("trajectory", "token", "turn")),
        *((f"{name}-token", f"{name}-token-calm") for name in ("opd", "f2b", "b2f")),
        *((f"{name}-token-calm", "opd-token-calm") for name in ("f2b", "b2f", "reopd")),
    ),
    turns=(1, 5, 10, 15, 20, 25, 30),
    updates=(1, 2, 3, 4, 6, 8, 10, 15, 20, 25, 30),
)


def markdown(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def mean_text(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and 95% interval; of fewer than five, whose interval says nothing, the range; of one the value."""
    mean = f"{np.mean(values):{form}}"
    if len(values) == 1:
        return mean
    if len(values) < 5:
        return f"{mean} ({min(values):{form}} to {max(values):{form}})"
    low, high = interval(values)
    return f"{mean} [{low:{form}}, {high:{form}}]"


SPENT_ON = {
    "steps": "environment steps",
    "teacher_tokens": "teacher's tokens",
    "no_signal": "dropped without a signal",
}
TITLES = {**SPENT_ON, "success": "success", "kl": "KL, nats"}
COLUMNS = {  # of `final`: (title, format)
    "success": ("success", ".2f"),
    "success_t1": ("at temperature 1", ".2f"),
    "kl": ("KL, nats", ".1f"),
    "success_training": ("training success", ".2f"),
    "kl_training": ("training KL, nats", ".1f"),
}


def end_table(results: Results, arms: Sequence[str]) -> str:
    rows, final = [], results.final()
    for arm in arms:
        of, seeds, before = final.loc[arm], results.common_seeds(arm), results.before(arm)
        row = {"arm": arm, "learning rate": f"{results.jobs[arm, seeds[0]]['settings']['lr']:g}"}
        row |= {"seeds": str(len(of)), "before": "" if np.isnan(before) else f"{before:.2f}"}
        means = {title: mean_text([*of[name]], form) for name, (title, form) in COLUMNS.items()}
        row |= {"success": means["success"], "SD over seeds": f"{of['success'].std():.3f}" if len(of) > 1 else ""}
        rows.append({**row, **means, "doublings of the KL": f"{of['doublings'].mean():.1f}"})
    return markdown(rows)


def difference_table(results: Results, pairs: Sequence[tuple[str, str]]) -> str:
    """A row per pair that has a seed in common: the first arm minus the second."""
    rows, final = [], results.final()
    for arm, base in pairs:
        if seeds := results.common_seeds(arm, base):
            of = (final.loc[arm] - final.loc[base]).loc[seeds]
            row = {"difference": f"{arm} - {base}", "seeds ahead": f"{(of['success'] > 0).sum()} of {len(of)}"}
            row |= {title: mean_text([*of[name]], f"+{form}") for name, (title, form) in COLUMNS.items()}
            rows.append({**row, "success at equal steps": mean_text(results.leads(arm, base), "+.2f")})
    return markdown(rows)


def cost_table(results: Results, arms: Sequence[str]) -> str:
    """Means per run."""
    counts = {"student's steps": "student_steps", "replayed steps": "replayed_steps"}
    counts |= {"tokens scored": "scored", "tokens trained": "trained"}
    sums = results.updates.groupby(["arm", "seed"], sort=False).sum()
    rows = []
    for arm in arms:
        of = sums.loc[arm]
        row = {"arm": arm, **{title: f"{of[name].mean():,.0f}" for title, name in counts.items()}}
        rows.append({**row, "minutes": f"{of['s'].mean() / 60:.1f}", "failed episodes": f"{of['failed'].sum():.0f}"})
    return markdown(rows)


def course_table(results: Results, arms: Sequence[str], shown: dict[str, str]) -> str:
    """Every evaluation, means over seeds of what is shown, {name: format}."""
    means = results.evaluations.groupby(["arm", "n"])[list(shown)].mean()
    return markdown(
        [
            {"arm": arm, "updates": str(n), **{TITLES[name]: f"{point[name]:{form}}" for name, form in shown.items()}}
            for arm in arms
            for n, point in means.loc[arm].iterrows()
        ]
    )


def turn_table(results: Results, arms: Sequence[str], turns: Sequence[int]) -> str:
    """The start is one row: all arms have the same checkpoints there."""

    def row(name: str, n: int, evaluations: pd.DataFrame) -> dict[str, str]:
        of = kl_by_turn(evaluations[evaluations.index.get_level_values("n") == n])
        cells = {f"turn {t}": f"{of.kl[t]:.2f} ({of.episodes[t]})" if t in of.index else "" for t in turns}
        return {"arm": name, "update": str(n), **cells}

    every = results.evaluations.loc[list(arms)]
    last = every.index.get_level_values("n").max()
    rows = [row("all", 0, every.drop_duplicates(["turns", "kl"]))]  # some arms share theirs
    return markdown(rows + [row(arm, n, results.evaluations.loc[[arm]]) for n in (last // 2, last) for arm in arms])


def training_table(results: Results, arms: Sequence[str], updates: Sequence[int]) -> str:
    """Means over seeds."""
    means = results.updates["token_kl"].groupby(["arm", "n"]).mean()
    return markdown([{"arm": arm, **{f"update {n}": f"{means[arm, n - 1]:.2f}" for n in updates}} for arm in arms])


def tables(results: Results, part: Part) -> Iterator[tuple[str, str]]:
    """(title, Markdown) of all tables."""
    arms = [name for name in results.arms if name not in CHECKS]
    course = [name for name in part.course if name in arms]
    title = f"After training: held-out games, and the training episodes of the last {LATE} updates"
    yield title, end_table(results, arms)
    if checks := [name for name in results.arms if name in CHECKS]:
        yield "Checks", end_table(results, checks)
    yield "Paired differences, same seed and student", difference_table(results, part.pairs)
    yield "What it took, mean per run; minutes are a hint only, as other jobs ran beside it", cost_table(results, arms)
    yield "On the way, means over seeds", course_table(
        results, course, {"steps": ",.0f", "success": ".2f", "kl": ".1f"}
    )
    if part.updates:
        title = "KL per token in the training episodes, nats, mean over seeds"
        yield title, training_table(results, arms, part.updates)
    title = "KL by turn, nats, and the number of held-out episodes at temperature 1 that reached it"
    yield title, turn_table(results, course, part.turns)


BASE_ARMS = ("opd", "sft", "sft-then-opd", "opd-and-reward", "grpo", "opd-then-grpo")
BASE_PAIRS = (*((arm, "opd") for arm in BASE_ARMS[1:]), ("sft-then-opd", "sft"), ("opd-then-grpo", "grpo"))


def success_table(results: Results) -> str:
    """A row per arm: success at the end with every seed's, and what it took, means per run."""
    rows, final = [], results.final()["success"]
    spent = results.updates.groupby(["arm", "seed"], sort=False)[[*SPENT, "no_signal"]].sum()
    for arm in results.arms:
        last, took = [*final[arm]], spent.loc[arm].mean()
        row = {"arm": arm, "learning rate": f"{results.jobs[arm, final[arm].index[0]]['settings']['lr']:g}"}
        row |= {"success": mean_text(last), "of each seed": ", ".join(map("{:.2f}".format, last))}
        rows.append({**row, **{title: f"{took[name]:,.0f}" for name, title in SPENT_ON.items()}})
    return markdown(rows)


def lead_table(results: Results) -> str:
    """A row per pair: the first arm's success minus the second's, at the end and after equal expenses."""
    rows, final = [], results.final()["success"]
    for arm, base in BASE_PAIRS:
        if results.common_seeds(arm, base):
            row = {"difference": f"{arm} - {base}"}
            row |= {"at the end": mean_text([*(final[arm] - final[base]).dropna()], "+.2f")}
            row |= {f"at equal {SPENT_ON[of]}": mean_text(results.leads(arm, base, of), "+.2f") for of in SPENT}
            rows.append(row)
    return markdown(rows)


def baseline_tables(results: Results) -> Iterator[tuple[str, str]]:
    """(title, Markdown) of the third part's tables."""
    yield "After training, and what it took, means per run", success_table(results)
    yield "Paired differences of success, same seed and student", lead_table(results)
    yield "On the way, updates and expenses of the job before included, means over seeds", course_table(
        results, results.arms, {"steps": ",.0f", "teacher_tokens": ",.0f", "success": ".2f"}
    )


NOTE_ARMS = (*NOTES,)
NOTE_PAIRS = (
    *((arm, "another-demo") for arm in ("demo", "hindsight", "both", "demo-if-seen", "self-demo")),
    *((arm, "demo") for arm in ("hindsight", "both", "demo-if-seen", "self-demo", "sft")),
    ("f2b-both", "both"),
    *((arm, "strong") for arm in ("demo", "hindsight", "both", "b2f-strong")),
)


def note_tables(results: Results) -> Iterator[tuple[str, str]]:
    """(title, Markdown) of the fourth part's tables."""
    first = results.evaluations.query("n == 0").groupby("seed").first()
    last = results.evaluations.groupby(["arm", "seed"], sort=False).tail(1).droplevel("n")
    took = results.updates.fillna(0.0).groupby(["arm", "seed"], sort=False)[["steps", "read"]].sum()

    def row(arm: str, of: pd.DataFrame, spent: dict[str, str]) -> dict[str, str]:
        within = pd.DataFrame([*of["within"]])
        cells = {f"within {turns}": mean_text([*within[f"{turns}"]]) for turns in TURNS_TO_WIN}
        of_each = ", ".join(map("{:.2f}".format, of["success"]))
        cells |= {"of each seed": of_each, "turns of won": f"{of['turns_won'].mean():.1f}".replace("nan", "")}
        return {"arm": arm, **cells, "reached blindly": f"{of['blind'].mean():.2f}", **spent}

    titles = {"steps": "environment steps", "read": "tokens the teacher read"}
    rows = [row("before", first, dict.fromkeys(titles.values(), ""))] if len(first) else []
    for arm in results.arms:
        means = took.loc[arm].mean()
        rows.append(row(arm, last.loc[arm], {title: f"{means[name]:,.0f}" for name, title in titles.items()}))
    yield "After training: success within so many turns on 100 held-out games, and what it took, means per run", (
        markdown(rows)
    )
    rows = []
    for arm, base in NOTE_PAIRS:
        if seeds := results.common_seeds(arm, base):
            one, two = (pd.DataFrame([*last.loc[name].loc[seeds]["within"]]) for name in (arm, base))
            cells = {f"within {turns}": mean_text([*(one - two)[f"{turns}"]], "+.2f") for turns in TURNS_TO_WIN}
            rows.append({"difference": f"{arm} - {base}", **cells})
    yield "Paired differences of success, same seed and student", markdown(rows)


def circumstances(results: Results) -> str:
    """Where and with which code the jobs were run."""
    jobs = results.jobs.values()
    machines, slimes, commits = (sorted({one[key] for one in jobs}) for key in ("machine", "slime", "commit"))
    return f"{len(jobs)} jobs, on {'; '.join(machines)}; on {'; '.join(slimes)}; code of commit {', '.join(commits)}."


PARTS = {  # by folder of the results: the arms that come first, the pairs of arms, the tables, the figure
    ".": (FIRST.arms, FIRST.pairs, lambda results: tables(results, FIRST), study_figures.draw_first),
    "losses": (SECOND.arms, SECOND.pairs, lambda results: tables(results, SECOND), study_figures.draw_second),
    "baselines": (BASE_ARMS, BASE_PAIRS, baseline_tables, study_figures.draw_third),
    "notes": (NOTE_ARMS, NOTE_PAIRS, note_tables, study_figures.draw_fourth),
}


def publish(folder: Path) -> None:
    """Print the tables of all parts and draw their figures."""
    for name, (arms, _, tables_of, draw) in PARTS.items():
        if not any((folder / name).glob("*.json")):
            continue
        results = Results.load(folder / name, arms)
        print(circumstances(results))
        for title, text in tables_of(results):
            print(f"\n**{title}**\n\n{text}", end="")
        draw(results)
