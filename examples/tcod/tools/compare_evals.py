"""The statistics of evaluations, and the difference of two results of evaluate.py.

    python -m examples.tcod.tools.compare_evals opd.json f2b.json

prints the success of the second minus that of the first, by task type, with 95% intervals: paired where the two played
the same games, which removes the differences between games from the comparison. Of games that were played repeatedly
their rates are compared. One run of each arm says little about the arms: training itself varies from seed to seed.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import binomtest, norm, t

from .. import words
from ..episode.rows import task_key
from ..records.repeats import grouped, statistics_of
from .common.command import new_parser, table

Episode = dict[str, Any]  # task, attempt, task_type, won, turns, score, context_limited
Interval = tuple[float, float]

Z = float(norm.ppf(0.975))  # all intervals are 95% ones


def wilson(wins: int, n: int) -> Interval:
    """Wilson's score interval of a proportion, `wins` out of `n` > 0."""
    return binomtest(wins, n).proportion_ci(method="wilson")


def difference(wins_a: int, n_a: int, wins_b: int, n_b: int) -> Interval:
    """Newcombe's interval of p_b - p_a for two independent proportions, out of Wilson's of each.

    R. G. Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10.
    """
    (low_a, high_a), (low_b, high_b) = wilson(wins_a, n_a), wilson(wins_b, n_b)
    a, b = wins_a / n_a, wins_b / n_b
    return b - a - math.hypot(b - low_b, high_a - a), b - a + math.hypot(high_b - b, a - low_a)


def paired_difference(only_a: int, only_b: int, n: int) -> Interval:
    """Agresti and Min's interval of p_b - p_a over `n` games that both played: 1/2 added to each of the four counts.

    A. Agresti and Y. Min, Statistics in Medicine 24 (2005) 729-740.

    Args:
        only_a, only_b: games that only one of the two won.
    """
    total, a, b = n + 2, only_a + 0.5, only_b + 0.5
    centre = (b - a) / total
    half = Z * math.sqrt(a + b - (b - a) ** 2 / total) / total
    return max(centre - half, -1.0), min(centre + half, 1.0)


def repeated_difference(differences: Sequence[float]) -> dict[str, Any]:
    """The mean of p_b - p_a over games, its interval and p by Student's t, where games were played repeatedly.

    A game counts once: its repeats are alike, and each for a game of its own would make the interval too narrow.
    """
    n, mean = len(differences), fmean(differences)
    error = stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    half = error * float(t.ppf(0.975, max(n - 1, 1)))
    p = float(2 * t.sf(abs(mean) / error, max(n - 1, 1))) if error else float(mean == 0)
    return {"success": mean, "interval": (max(mean - half, -1.0), min(mean + half, 1.0)), "p": p}


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test: how surprising this split is where both are equally good."""
    return binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """{"all": .., "by_label": {task type: ..}}, each with its pooled interval and statistics_of's. Of at least one."""
    plain = _plain(episodes)
    by_label = {name: _summary(group) for name, group in grouped(plain, "task_type").items()}
    return {"all": _summary(plain), "by_label": by_label}


def _plain(episodes: Sequence[Episode]) -> list[Episode]:
    return [{**one, "task": task_key(one["task"]), "repeat": one.get("attempt", 0)} for one in episodes]


def _summary(episodes: Sequence[Episode]) -> dict[str, Any]:
    won, n = sum(episode["won"] for episode in episodes), len(episodes)
    turns = fmean(episode["turns"] for episode in episodes)
    return {"episodes": n, "won": won, "interval": wilson(won, n), "turns": turns, **statistics_of(episodes)}


def compare(a: Sequence[Episode], b: Sequence[Episode]) -> dict[str, Any]:
    """Success of b minus success of a: {"all": .., "by_label": {task type: ..}}.

    Where the two share games, over those games and paired; where they share none, as independent samples. Types that
    only one of the two has are not compared.
    """
    a, b = map(_plain, (a, b))
    of_a, of_b = grouped(a, "task_type"), grouped(b, "task_type")
    by_label = {name: _difference(of_a[name], of_b[name]) for name in sorted(of_a.keys() & of_b.keys())}
    return {"all": _difference(a, b), "by_label": by_label}


def _difference(a: Sequence[Episode], b: Sequence[Episode]) -> dict[str, Any]:
    games_a, games_b = grouped(a, "task"), grouped(b, "task")
    shared = games_a.keys() & games_b.keys()
    chosen = [[one for key in shared or games for one in games[key]] for games in (games_a, games_b)]
    one, other = map(_summary, chosen)
    row = {"paired": bool(shared), "a": one, "b": other, "success": other["success"] - one["success"]}
    row |= {"turns": other["turns"] - one["turns"], "not_shared": len(games_a) + len(games_b) - 2 * len(shared)}
    if not shared:
        return row | {"interval": difference(one["won"], one["episodes"], other["won"], other["episodes"])}
    differences = [statistics_of(games_b[key])["success"] - statistics_of(games_a[key])["success"] for key in shared]
    if len(shared) < max(map(len, chosen)):
        return row | repeated_difference(differences)
    only_a, only_b = differences.count(-1), differences.count(1)
    interval = paired_difference(only_a, only_b, len(shared))
    return row | {"only_a": only_a, "only_b": only_b, "p": mcnemar(only_a, only_b), "interval": interval}


def report(compared: dict[str, Any]) -> str:
    """The differences as a table, and how they were made."""
    lines = [("task type", "n(a)", "n(b)", "a", "b", "b - a", "95% interval", "p", "turns")]
    for name, row in [("all", compared["all"]), *compared["by_label"].items()]:
        a, b = row["a"], row["b"]
        success = (f"{a['success']:.3f}", f"{b['success']:.3f}", f"{row['success']:+.3f}")
        interval, p = "[{:+.3f}, {:+.3f}]".format(*row["interval"]), f"{row['p']:.3f}" if row["paired"] else "-"
        lines.append((name, a["episodes"], b["episodes"], *success, interval, p, f"{row['turns']:+.1f}"))
    if not compared["all"]["paired"]:
        return f"{table(lines)}\nno game in common: compared as independent samples"
    test = "McNemar's exact test" if "only_a" in compared["all"] else "Student's t over the games' rates"
    text = f"{table(lines)}\npaired over the games that both played; p: {test}"
    left = compared["all"]["not_shared"]
    return text + (f"\nnot compared: {left} games that only one of the two has" if left else "")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("a", type=Path, help="JSON of evaluate.py")
    parser.add_argument("b", type=Path, help="JSON of evaluate.py")
    options = parser.parse_args()
    try:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in (options.a, options.b)]
        text = report(compare(*(result["episodes"] for result in results)))
        ours, theirs = (result["settings"] for result in results)
        about = [f"{name}: {of['model']} on {of['rows']}" for name, of in (("a", ours), ("b", theirs))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"compare_evals.py: name two results of evaluate.py ({words(error)})")
    different = [name for name in ours if ours[name] != theirs.get(name, ours[name]) and name not in ("model", "rows")]
    for name in different:
        about.append(f"note: the two were played with different settings, {name} {ours[name]} and {theirs[name]}")
    print(*about, text, sep="\n")


if __name__ == "__main__":
    main()
