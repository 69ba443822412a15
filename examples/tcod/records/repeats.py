"""Success over repeated plays of the same tasks, as papers report it: of evaluations in training and of evaluate.py.

An episode is a mapping with task (a text, see task_key), repeat (0, 1, ..), task_type, won, turns (the student's) and
score (its best grade, or None).
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from statistics import fmean, stdev
from typing import Any

Episodes = Sequence[Mapping[str, Any]]


def grouped(episodes: Episodes, key: str) -> dict[Any, list[Mapping[str, Any]]]:
    """{value of the key: its episodes}, in order."""
    value = itemgetter(key)
    return {one: list(group) for one, group in groupby(sorted(episodes, key=value), value)}


def statistics_of(episodes: Episodes) -> dict[str, float]:
    """The numbers of at least one episode. What cannot be computed of these episodes is left out.

    success, score           means over the episodes
    turns_won, turns_lost    mean turns of the episodes that were won, and of the others
    repeats, success_sd      how many; the standard deviation (n - 1) of the success of one repeat
    pass_at_k                share of the tasks with all k repeats that were won in at least one of them
    """
    values = {
        "success": [one["won"] for one in episodes],
        "turns_won": [one["turns"] for one in episodes if one["won"]],
        "turns_lost": [one["turns"] for one in episodes if not one["won"]],
        "score": [one["score"] for one in episodes if one.get("score") is not None],
    }
    numbers = {name: fmean(of_it) for name, of_it in values.items() if of_it}
    repeats = [fmean(one["won"] for one in group) for group in grouped(episodes, "repeat").values()]
    if (k := len(repeats)) > 1:
        whole = [group for group in grouped(episodes, "task").values() if len(group) == k]
        numbers |= {"repeats": k, "success_sd": stdev(repeats)}
        numbers |= {"pass_at_k": fmean(any(one["won"] for one in group) for group in whole)} if whole else {}
    return numbers
