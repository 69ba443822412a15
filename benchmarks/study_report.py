"""The study's numbers: a job's result out of its metrics, bootstrap intervals over seeds, the tables and the figure.

Everything here is computed from results/study/*.json, so `study --report` gives the same tables again anywhere.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from math import factorial, prod
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.tcod.tools.plot_runs import BEFORE, by_turn, draw_curve, finish, styles

HERE = Path(__file__).resolve().parent
FIGURE = HERE.parent / "docs" / "study.png"

MAIN = ("opd", "f2b", "b2f")
EQUAL_RATE = ("opd-f2b-rate", "b2f-f2b-rate")
CHECKS = ("teacher", "shuffled")
PAIRS = (  # of the table of paired differences
    ("f2b", "opd"),
    ("b2f", "opd"),
    ("f2b", "opd-f2b-rate"),
    ("b2f-f2b-rate", "opd-f2b-rate"),
    ("f2b", "opd-batch-11"),
    ("f2b", "fixed-horizon-10"),
    ("f2b", "random-horizon"),
    ("f2b-eta-1", "f2b"),
    ("f2b-eta-4", "f2b"),
    ("f2b-eta-6", "f2b"),
    ("b2f-eta-1", "b2f"),
    ("b2f-eta-4", "b2f"),
    ("b2f-eta-6", "b2f"),
    ("b2f-to-the-horizon", "b2f"),
)
MOST_SEEDS = 10  # of an exact bootstrap
STEPS = ("student_steps", "replayed_steps")  # the environment's
TURNS = (1, 3, 5, 8, 12, 16, 20)  # of the table of KL by turn

Result = dict[str, Any]  # of one job, see `result`
Arms = dict[str, dict[int, Result]]  # {arm: {seed: result}}
Interval = tuple[float, float]

AT_04, AT_1 = "eval/tcod/heldout/", "eval/tcod/heldout_t1/"


def result(lines: list[dict[str, Any]], batch: int) -> Result:
    """What is kept of a job's metrics.jsonl: a line per evaluation and a line per update.

    Evaluations: success at temperatures 0.4 and 1, KL in nats of whole trajectories and by turn (with the number of
    episodes that reached the turn), at temperature 1. Updates: depth, success and KL of the training episodes, the
    environment's steps by the student and by replay, tokens, and seconds of rollout and training.
    """
    evaluations, updates = [], []
    for line in lines:
        if line["kind"] == "eval":
            counts = by_turn(line, f"{AT_1}kl_by_turn_count/")
            evaluations.append(
                {
                    "n": line["n"],
                    "success": line[f"{AT_04}success"],
                    "success_t1": line[f"{AT_1}success"],
                    "turns": line[f"{AT_04}turns/student"],
                    "kl": line[f"{AT_1}kl/trajectory"],
                    "episodes": line[f"{AT_04}episodes"],
                    "kl_by_turn": [kl for _, kl in sorted(by_turn(line, f"{AT_1}kl_by_turn/").items())],
                    "kl_by_turn_episodes": [count for _, count in sorted(counts.items())],
                }
            )
        elif line["kind"] == "rollout":
            of = {key.removeprefix("rollout/tcod/"): value for key, value in line.items()}
            updates.append(
                {
                    "n": line["n"],
                    "k": of["k"],
                    "success": of["success"],
                    "kl": of["kl/trajectory"],
                    "student_steps": round(of["turns/student"] * batch),
                    "replayed_steps": round(of["turns/replayed"] * batch),
                    "scored": of["tokens/scored"],
                    "trained": of["tokens/trained"],
                    "failed": of["failed"],
                    "s": of["rollout_s"] + of["train/s"],
                }
            )
    return {"evaluations": _rounded(evaluations), "updates": _rounded(updates)}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def load(folder: Path) -> Arms:
    """All results of a folder, the main arms first."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    results.sort(key=lambda one: (MAIN.index(one["arm"]) if one["arm"] in MAIN else len(MAIN), one["arm"]))
    arms: Arms = {}
    for one in results:
        arms.setdefault(one["arm"], {})[one["settings"]["seed"]] = one
    return with_starts(arms)


def with_starts(arms: Arms) -> Arms:
    """Put a seed's evaluation before the first update, which only one of its arms may have, into its other runs.

    All of a seed's runs start from one checkpoint, but for the teacher as its own student.
    """
    starts = {
        seed: one["evaluations"][0]
        for name, runs in arms.items()
        for seed, one in runs.items()
        if one["evaluations"][0]["n"] == 0 and name not in CHECKS
    }
    for seed, one in ((seed, one) for runs in arms.values() for seed, one in runs.items()):
        if one["evaluations"][0]["n"] > 0 and seed in starts:
            one["evaluations"].insert(0, starts[seed])
    return arms


def one_line(one: Result) -> str:
    first, last = one["evaluations"][0], one["evaluations"][-1]
    return (
        f"{last['n']} updates, success {first['success']:.2f} -> {last['success']:.2f} at temperature 0.4, "
        f"{first['success_t1']:.2f} -> {last['success_t1']:.2f} at 1, KL {first['kl']:.1f} -> {last['kl']:.1f} nats"
    )


# -------------------------------------------------------------------------------------------------- statistics


def bootstrap(values: Sequence[float]) -> Interval:
    """95% percentile interval of the mean over seeds that are drawn with replacement: exact, of all n^n draws.

    Each end cuts off less than 2.5% of the draws. With five seeds it is too narrow: it covers the true mean of a
    normal in about 83 of 100 studies rather than 95.

    Raises:
        ValueError: there are more than MOST_SEEDS values.
    """
    n = len(values)
    if n > MOST_SEEDS:
        raise ValueError(f"{n} values have too many draws to count them all: {MOST_SEEDS} at most")
    draws = sorted(
        (fmean(draw), factorial(n) // prod(map(factorial, Counter(draw).values())))
        for draw in itertools.combinations_with_replacement(sorted(values), n)
    )
    return _cut(draws, n**n), _cut(draws[::-1], n**n)


def _cut(draws: Sequence[tuple[float, int]], total: int) -> float:
    """The first mean, counted from this end, at which 2.5% of the draws have been seen."""
    seen = itertools.accumulate(count for _, count in draws)
    return next(mean for (mean, _), so_far in zip(draws, seen, strict=True) if so_far >= 0.025 * total)


def final(metric: str) -> Callable[[Result], float]:
    return lambda one: one["evaluations"][-1][metric]


def paired(arm: dict[int, Result], base: dict[int, Result], value: Callable[[Result], float]) -> list[float]:
    """value(arm) - value(base) of every seed that both have."""
    return [value(arm[seed]) - value(base[seed]) for seed in sorted(arm.keys() & base.keys())]


def spent(one: Result, *names: str) -> dict[int, float]:
    """{n: what all updates before the evaluation at n took}, the sum of these counts."""
    return {
        evaluation["n"]: sum(update[name] for update in one["updates"][: evaluation["n"]] for name in names)
        for evaluation in one["evaluations"]
    }


def steps(one: Result) -> dict[int, float]:
    """The environment's steps, replayed ones included."""
    return spent(one, *STEPS)


def success_at_steps(one: Result, wanted: float) -> float:
    """Success at temperature 0.4 after `wanted` environment steps, linear between evaluations, at most the last's."""
    successes = [evaluation["success"] for evaluation in one["evaluations"]]
    return float(np.interp(wanted, list(steps(one).values()), successes))


def lead_at_equal_steps(arm: dict[int, Result], base: dict[int, Result]) -> list[float]:
    """Success of each seed minus the base's, after as many environment steps as the cheaper of the two took in all."""
    leads = []
    for seed in sorted(arm.keys() & base.keys()):
        common = min(list(steps(one[seed]).values())[-1] for one in (arm, base))
        leads.append(success_at_steps(arm[seed], common) - success_at_steps(base[seed], common))
    return leads


def reached(runs: dict[int, Result], target: float) -> int | None:
    """The first evaluation at which the mean success over seeds is `target` or more; None if there is none."""
    for i, evaluation in enumerate(next(iter(runs.values()))["evaluations"]):
        if fmean(one["evaluations"][i]["success"] for one in runs.values()) >= target:
            return evaluation["n"]
    return None


# ------------------------------------------------------------------------------------------------------ tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def mean_text(values: Sequence[float], form: str = ".2f", sign: str = "") -> str:
    """Mean and interval; of fewer than five seeds, whose interval says nothing, mean and range; of one the value."""
    mean = f"{fmean(values):{sign}{form}}"
    if len(values) == 1:
        return mean
    if len(values) < 5:
        return f"{mean} ({min(values):{sign}{form}} to {max(values):{sign}{form}})"
    low, high = bootstrap(values)
    return f"{mean} [{low:{sign}{form}}, {high:{sign}{form}}]"


def final_table(arms: Arms) -> str:
    """ "Before" is the mean over all runs of a seed, which start from one checkpoint."""
    starts: dict[int, list[float]] = {}
    for runs in arms.values():
        for seed, one in runs.items():
            if one["evaluations"][0]["n"] == 0:
                starts.setdefault(seed, []).append(one["evaluations"][0]["success"])
    rows = []
    for name, runs in arms.items():
        values = {metric: [final(metric)(one) for one in runs.values()] for metric in ("success", "success_t1", "kl")}
        rate = next(iter(runs.values()))["settings"]["lr"]
        before = f"{fmean(fmean(starts[seed]) for seed in runs):.2f}" if runs.keys() <= starts.keys() else ""
        deviation = f"{stdev(values['success']):.3f}" if len(runs) > 1 else ""
        texts = [mean_text(values["success"]), deviation, mean_text(values["success_t1"])]
        texts.append(mean_text(values["kl"], ".1f"))
        rows.append([name, f"{rate:g}", str(len(runs)), before, *texts])
    header = ["arm", "learning rate", "seeds", "success before", "success after", "SD over seeds"]
    return table([*header, "after, at temperature 1", "KL after, nats"], rows)


def cost_table(arms: Arms) -> str:
    rows = []
    for name, runs in arms.items():
        counts = [("student_steps",), ("replayed_steps",), ("scored",), ("trained",), ("s",)]
        means = [fmean(list(spent(one, *names).values())[-1] for one in runs.values()) for names in counts]
        failed = sum(update["failed"] for one in runs.values() for update in one["updates"])
        *numbers, seconds = means
        rows.append([name, *(f"{number:,.0f}" for number in numbers), f"{seconds / 60:.1f}", f"{failed:.0f}"])
    header = [
        "arm",
        "student's steps",
        "replayed steps",
        "tokens scored",
        "tokens trained",
        "minutes",
        "failed episodes",
    ]
    return table(header, rows)


def difference_table(arms: Arms, pairs: Sequence[tuple[str, str]] = PAIRS) -> str:
    """A row per pair that has a seed in common: the first arm minus the second."""
    rows = []
    for name, base in pairs:
        if name not in arms or base not in arms or not arms[name].keys() & arms[base].keys():
            continue
        differences = [paired(arms[name], arms[base], final(metric)) for metric in ("success", "success_t1", "kl")]
        texts = [mean_text(values, form, "+") for values, form in zip(differences, (".2f", ".2f", ".1f"), strict=True)]
        better = sum(value > 0 for value in differences[0])
        lead = mean_text(lead_at_equal_steps(arms[name], arms[base]), ".2f", "+")
        rows.append([f"{name} - {base}", f"{better} of {len(differences[0])}", *texts, lead])
    header = [
        "difference",
        "seeds ahead",
        "success",
        "at temperature 1",
        "KL, nats",
        "success at equal environment steps",
    ]
    return table(header, rows)


def reach_table(arms: Arms) -> str:
    target = fmean(final("success")(one) for one in arms["opd"].values())
    rows = []
    for name in MAIN:
        n = reached(arms[name], target)
        cells = ["never"] + [""] * 4
        if n is not None:
            costs = [STEPS, ("scored",), ("trained",), ("s",)]
            *counts, seconds = (fmean(spent(one, *names)[n] for one in arms[name].values()) for names in costs)
            cells = [str(n), *(f"{count:,.0f}" for count in counts), f"{seconds / 60:.1f}"]
        rows.append([name, *cells])
    return table(["arm", "updates", "environment steps", "tokens scored", "tokens trained", "minutes"], rows)


def course_table(arms: Arms, shown: Sequence[str]) -> str:
    """Success and KL at every evaluation, means over seeds."""
    rows = []
    for name in shown:
        results = list(arms[name].values())
        for i, n in enumerate(steps(results[0])):
            success, kl = (fmean(one["evaluations"][i][metric] for one in results) for metric in ("success", "kl"))
            steps_so_far = fmean(steps(one)[n] for one in results)
            rows.append([name, str(n), f"{steps_so_far:,.0f}", f"{success:.2f}", f"{kl:.1f}"])
    return table(["arm", "updates", "environment steps", "success", "KL, nats"], rows)


def _shown(arms: Arms) -> list[str]:
    return [name for name in (*MAIN, *EQUAL_RATE) if name in arms]


def turn_table(arms: Arms, shown: Sequence[str], turns: Sequence[int] = TURNS) -> str:
    """The start is one row: the arms have the same checkpoints there."""
    runs = {name: list(arms[name].values()) for name in shown}
    every = [evaluation for results in runs.values() for one in results for evaluation in one["evaluations"]]
    _, *after = sorted({0, *(evaluation["n"] for evaluation in every)})
    middle, end = after[(len(after) - 1) // 2], after[-1]

    def row(name: str, n: int, evaluations: Sequence[dict[str, Any]]) -> list[str]:
        kl = kl_by_turn([evaluation for evaluation in evaluations if evaluation["n"] == n])
        cells = [f"{kl[turn][0]:.2f} ({kl[turn][1]})" if turn in kl else "" for turn in turns]
        return [name, str(n), *cells]

    rows = [row("all", 0, list({id(evaluation): evaluation for evaluation in every}.values()))]  # some share theirs
    rows += [
        row(name, n, [evaluation for one in results for evaluation in one["evaluations"]])
        for n in dict.fromkeys((middle, end))
        for name, results in runs.items()
    ]
    return table(["arm", "update", *(f"turn {turn}" for turn in turns)], rows)


def kl_by_turn(evaluations: Sequence[dict[str, Any]]) -> dict[int, tuple[float, int]]:
    """{turn, from 1: (mean KL of the turn over the episodes that reached it, in nats; how many they are)}."""
    totals: dict[int, tuple[float, int]] = {}
    for evaluation in evaluations:
        pairs = zip(evaluation["kl_by_turn"], evaluation["kl_by_turn_episodes"], strict=True)
        for turn, (kl, episodes) in enumerate(pairs, 1):
            total, count = totals.get(turn, (0.0, 0))
            totals[turn] = (total + kl * episodes, count + episodes)
    return {turn: (total / count, count) for turn, (total, count) in totals.items()}


def check_lines(arms: Arms) -> str:
    lines = []
    for one in arms.get("teacher", {}).values():
        first = one["evaluations"][0]
        lines.append(
            f"- The teacher as its own student, before any update: KL {abs(first['kl']):.4f} nats per trajectory; its "
            f"success is {first['success']:.2f} at temperature 0.4 and {first['success_t1']:.2f} at 1.\n"
        )
    for seed, one in arms.get("shuffled", {}).items():
        lines.append(f"- The teacher's log-probs shuffled, seed {seed}: {one_line(one)}.\n")
    return "".join(lines)


def text(arms: Arms) -> str:
    """The first part's results, in Markdown."""
    compared = {name: runs for name, runs in arms.items() if name not in CHECKS}
    parts = [
        f"{circumstances_line(arms)} In brackets 95% bootstrap intervals over seeds; in parentheses, where seeds are "
        "fewer than five, the range.\n",
        "**Held-out success at the full horizon** (temperature 0.4 unless said otherwise)\n\n" + final_table(compared),
        "**Paired differences**, same seed, student and games\n\n" + difference_table(compared),
        "**What it took**, mean per run; minutes of rollout and training, a hint only, as other jobs ran beside it\n\n"
        + cost_table(compared),
        "**To reach the OPD arm's final success**: the first evaluation at which the mean over seeds is there\n\n"
        + reach_table(arms),
        "**On the way**, means over seeds\n\n" + course_table(arms, _shown(arms)),
        "**KL by turn**, nats, and the number of held-out episodes at temperature 1 that reached the turn\n\n"
        + turn_table(arms, _shown(arms)),
    ]
    if checks := check_lines(arms):
        parts.append("**Checks**\n\n" + checks)
    if missing := [name for name in dict.fromkeys(itertools.chain(*PAIRS)) if name not in arms]:
        parts.append(f"**Not run yet**: {', '.join(missing)}.\n")
    return "\n".join(parts)


def circumstances_line(arms: Arms) -> str:
    """Where and with which code the jobs were run."""
    every = [one for runs in arms.values() for one in runs.values()]
    machines, slimes, commits = (sorted({one[key] for one in every}) for key in ("machine", "slime", "commit"))
    where = f"on {'; '.join(machines)}; on {'; '.join(slimes)}"
    return f"{len(every)} jobs, {where}; code of commit {', '.join(commits)}."


def tuning_table(folder: Path) -> str:
    """A row per tuning run. What a rate is chosen by: the mean of the successes at both temperatures, at the end."""
    rows = []
    for one in sorted((json.loads(path.read_text()) for path in folder.glob("*.json")), key=_tuning_order):
        first, last = one["evaluations"][0], one["evaluations"][-1]
        numbers = [last["success"], last["success_t1"], (last["success"] + last["success_t1"]) / 2]
        seed, rate = one["settings"]["seed"], one["settings"]["lr"]
        kl = f"{first['kl']:.1f} → {last['kl']:.1f}"
        rows.append([one["arm"], f"{rate:g}", str(seed), *(f"{number:.2f}" for number in numbers), kl])
    return table(["arm", "learning rate", "seed", "success", "at temperature 1", "mean", "KL, nats"], rows)


def _tuning_order(one: Result) -> tuple[int, float, int]:
    return MAIN.index(one["arm"]), one["settings"]["lr"], one["settings"]["seed"]


# ------------------------------------------------------------------------------------------------------ figure


def draw(arms: Arms, path: Path) -> None:
    """Success against updates and environment steps, KL against updates, and KL by turn before and after."""
    runs = {name: list(arms[name].values()) for name in MAIN}
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    (success, by_steps), (kl, turns) = figure.subplots(2, 2)

    def mean_kl(evaluations: Sequence[dict[str, Any]]) -> dict[int, float]:
        return {turn: mean for turn, (mean, _) in kl_by_turn(evaluations).items()}

    for name, style in styles(runs).items():
        every = [one["evaluations"] for one in runs[name]]
        for axes, metric in ((success, "success"), (kl, "kl")):
            draw_curve(axes, [{point["n"]: point[metric] for point in points} for points in every], style)
        costs = [fmean(at) for at in zip(*(steps(one).values() for one in runs[name]), strict=True)]
        means = [fmean(point["success"] for point in at) for at in zip(*every, strict=True)]
        draw_curve(by_steps, [dict(zip(costs, means, strict=True))], style)
        draw_curve(turns, [mean_kl([points[-1] for points in every])], style)
    draw_curve(turns, [mean_kl([one["evaluations"][0] for results in runs.values() for one in results])], BEFORE)
    finish(success, xlabel="update", ylabel="success", title="held-out success, mean and range of the seeds")
    finish(by_steps, xlabel="environment steps", ylabel="success", title="the same against environment steps, mean")
    finish(kl, xlabel="update", ylabel="KL, nats", ylim=(0, None), title="trajectory KL to the teacher, full horizon")
    finish(turns, xlabel="turn", xticks=TURNS, ylabel="KL of the turn, nats", title="KL by turn, after training")
    figure.savefig(path, dpi=110)  # on white: it is read on dark pages and printed as well
