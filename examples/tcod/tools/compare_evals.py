"""The statistics of evaluations, and the difference of two results of evaluate.py.

    python -m examples.tcod.tools.compare_evals opd.json f2b.json

prints the success of the second minus that of the first, by task type, with 95% intervals: paired where the two played
the same games, which removes the differences between games from the comparison. One run of each arm says little about
the arms: training itself varies from seed to seed.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import binomtest, norm

Episode = dict[str, Any]  # task, task_type, won, turns, context_limited
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


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test: how surprising this split is where both are equally good."""
    return binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Success with its interval, and mean turns, of at least one episode."""
    wins, n = sum(episode["won"] for episode in episodes), len(episodes)
    return {
        "episodes": n,
        "won": wins,
        "success": wins / n,
        "interval": wilson(wins, n),
        "turns": fmean(episode["turns"] for episode in episodes),
    }


def by_type(episodes: Iterable[Episode]) -> dict[str, list[Episode]]:
    """All episodes, then those of each task type."""
    groups = defaultdict(list)
    for episode in episodes:
        groups["all"].append(episode)
        groups[episode["task_type"]].append(episode)
    return dict(sorted(groups.items(), key=lambda group: (group[0] != "all", group[0])))


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Success of b minus success of a, by task type.

    Where the two share games, over those games and paired; where they share none, as independent samples. Types that
    only one of the two has are not compared.
    """
    groups_a, groups_b = by_type(a["episodes"]), by_type(b["episodes"])
    rows = {}
    for name in groups_a.keys() & groups_b.keys():
        games_a, games_b = _by_game(groups_a[name]), _by_game(groups_b[name])
        shared = games_a.keys() & games_b.keys()
        pair_a = [games_a[key] for key in shared or games_a]
        pair_b = [games_b[key] for key in shared or games_b]
        one, other = summarise(pair_a), summarise(pair_b)
        row = {"paired": bool(shared), "a": one, "b": other}
        row |= {"success": other["success"] - one["success"], "turns": other["turns"] - one["turns"]}
        if shared:
            only_a = sum(x["won"] > y["won"] for x, y in zip(pair_a, pair_b, strict=True))
            only_b = sum(x["won"] < y["won"] for x, y in zip(pair_a, pair_b, strict=True))
            row |= {"only_a": only_a, "only_b": only_b, "p": mcnemar(only_a, only_b)}
            row["interval"] = paired_difference(only_a, only_b, len(shared))
            row["not_shared"] = len(games_a) + len(games_b) - 2 * len(shared)
        else:
            row["interval"] = difference(one["won"], one["episodes"], other["won"], other["episodes"])
        rows[name] = row
    return {name: rows[name] for name in groups_a if name in rows}


def _by_game(episodes: Iterable[Episode]) -> dict[str, Episode]:
    return {json.dumps(episode["task"], sort_keys=True): episode for episode in episodes}


def comparison_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{'task type':<32}{'n(a)':>6}{'n(b)':>6}{'a':>7}{'b':>7}{'b - a':>8}{'95% interval':>19}{'p':>8}{'turns':>7}"
    ]
    for name, row in rows.items():
        interval = "[{:+.3f}, {:+.3f}]".format(*row["interval"])
        p = f"{row['p']:.3f}" if row["paired"] else "-"
        lines.append(
            f"{name:<32}{row['a']['episodes']:>6}{row['b']['episodes']:>6}{row['a']['success']:>7.3f}"
            f"{row['b']['success']:>7.3f}{row['success']:>+8.3f}{interval:>19}{p:>8}{row['turns']:>+7.1f}"
        )
    if rows["all"]["paired"]:
        lines.append("paired over the games that both played; p: McNemar's exact test")
    else:
        lines.append("no game in common: compared as independent samples")
    if left := rows["all"].get("not_shared"):
        lines.append(f"not compared: {left} episodes of games that only one of the two has")
    return "\n".join(lines)


def different_settings(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The settings, model and rows aside, in which two results differ."""
    ours, theirs = a["settings"], b["settings"]
    names = [name for name in ours if name not in ("model", "rows") and ours[name] != theirs.get(name)]
    return [f"{name} {ours[name]} and {theirs.get(name)}" for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description="The success of the second result minus that of the first.")
    parser.add_argument("a", type=Path, help="JSON of evaluate.py")
    parser.add_argument("b", type=Path, help="JSON of evaluate.py")
    options = parser.parse_args()
    try:
        a, b = (json.loads(path.read_text()) for path in (options.a, options.b))
        rows, different = compare(a, b), different_settings(a, b)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"compare_evals.py: name two results of evaluate.py ({error!r})")
    for name, result in (("a", a), ("b", b)):
        print(f"{name}: {result['settings']['model']} on {result['settings']['rows']}")
    for setting in different:
        print(f"note: the two were played with different settings, {setting}")
    print(comparison_table(rows))


if __name__ == "__main__":
    main()
