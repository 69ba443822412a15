"""The statistics of evaluations, and compare_evals.py on results of evaluate.py."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from examples.tcod.records.repeats import grouped, statistics_of
from examples.tcod.tools import compare_evals
from examples.tcod.tools.compare_evals import difference, mcnemar, paired_difference, repeated_difference

NUM_GPUS = 0


def test_the_difference_is_newcombes_table():
    """R. G. Newcombe, Statistics in Medicine 17 (1998) 873-890, table II, method 10; b - a there as a - b."""
    for (a, n), (b, m), interval in (
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ):
        assert difference(b, m, a, n) == pytest.approx(interval, abs=5e-5)
        low, high = difference(a, n, b, m)
        assert (-high, -low) == pytest.approx(interval, abs=5e-5)


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(1, 6) == mcnemar(6, 1) == pytest.approx(0.125)
    assert mcnemar(4, 4) == mcnemar(0, 0) == 1.0


@pytest.mark.parametrize("p_a, p_b", [(0.1, 0.1), (0.1, 0.25), (0.02, 0.1)])
def test_the_paired_interval_covers_the_difference(p_a, p_b):
    """All outcomes of 40 games, in which only a wins with probability p_a and only b with p_b."""
    n, covered = 40, 0.0
    for a, b in itertools.product(range(n + 1), repeat=2):
        if a + b <= n:
            low, high = paired_difference(a, b, n)
            ways = math.comb(n, a) * math.comb(n - a, b)
            covered += (low <= p_b - p_a <= high) * ways * p_a**a * p_b**b * (1 - p_a - p_b) ** (n - a - b)
    assert 0.94 < covered < 0.99


def result(path: Path, games: dict[int, bool | list[bool]], **settings: object) -> Path:
    """A file of evaluate.py's, of games by their goal: whether each was won, or each of its repeats was."""
    episodes = [
        {"task": {"goal": goal}, "task_type": ("all", "odd")[goal % 2], "attempt": n, "won": won, "turns": 5 - 2 * won}
        for goal, plays in games.items()
        for n, won in enumerate(plays if isinstance(plays, list) else [plays])
    ]
    settings = {"model": path.stem, "rows": "rows.jsonl", "temperature": 0.4, **settings}
    path.write_text(json.dumps({"settings": settings, "episodes": episodes}))
    return path


def compared(monkeypatch, capsys, a: Path, b: Path) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["compare_evals.py", str(a), str(b)])
    compare_evals.main()
    return capsys.readouterr().out.splitlines()


def test_results_on_the_same_games_are_compared_in_pairs(tmp_path, monkeypatch, capsys):
    a = result(tmp_path / "a.json", {1: True, 2: False, 3: False, 4: False, 5: True, 7: True})
    b = result(tmp_path / "b.json", {5: False, 4: True, 3: True, 2: True, 1: True, 9: True}, temperature=1.0)
    lines = compared(monkeypatch, capsys, a, b)
    assert lines[:2] == ["a: a on rows.jsonl", "b: b on rows.jsonl"]
    assert lines[2] == "note: the two were played with different settings, temperature 0.4 and 1.0"
    low, high = paired_difference(1, 3, 5)
    assert lines[4].split() == [
        *("all", "5", "5", "0.400", "0.800", "+0.400", f"[{low:+.3f},", f"{high:+.3f}]", "0.625", "-0.8")
    ]
    # A task type may be called "all".
    assert lines[5].split()[:2] == ["all", "2"] and lines[6].split()[:2] == ["odd", "3"]
    assert lines[-1] == "not compared: 2 games that only one of the two has"


def test_games_that_were_played_repeatedly_are_compared_by_their_rates(tmp_path, monkeypatch, capsys):
    """The interval and p of scipy's paired t-test over the games' rates; a repeat of b's second game has failed."""
    wins = {"a": [[1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]], "b": [[1, 1, 0], [1, 1], [1, 1, 1], [1, 0, 0]]}
    files = [result(tmp_path / f"{name}.json", dict(enumerate(wins[name]))) for name in "ab"]
    lines = compared(monkeypatch, capsys, *files)
    rates = [[sum(game) / len(game) for game in wins[name]] for name in "ba"]
    test = ttest_rel(*rates)
    low, high = test.confidence_interval(0.95)
    mean = sum(rates[0]) / 4 - sum(rates[1]) / 4
    assert lines[3].split()[:3] == ["all", "12", "11"]
    assert lines[3].split()[5:9] == [f"{mean:+.3f}", f"[{low:+.3f},", f"{high:+.3f}]", f"{test.pvalue:.3f}"]
    assert lines[-1].endswith("p: Student's t over the games' rates")
    once = result(tmp_path / "once.json", dict(enumerate([1, 0, 1, 0])))
    assert compared(monkeypatch, capsys, once, files[0])[-1].endswith("p: Student's t over the games' rates")
    assert repeated_difference([0.5, 0.5])["p"] == 0 and repeated_difference([0.0, 0.0])["p"] == 1
    assert repeated_difference([0.5]) == {"success": 0.5, "interval": (-1.0, 1.0), "p": 1.0}


def test_the_statistics_of_repeats_by_an_oracle():
    """Five tasks of two types, four repeats; the fourth repeat of the last task has failed."""
    won = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, -1]])
    episodes = [
        {"task": f"{i}", "repeat": n, "task_type": "ab"[i % 2], "won": won[i, n] == 1, "turns": 1 + i + 10 * n}
        | {"score": None if i == 0 else i / 10 + n}
        for i, n in zip(*np.where(won >= 0), strict=True)
    ]
    numbers = statistics_of(episodes)
    turns, score = np.add.outer(1 + np.arange(5), 10 * np.arange(4)), np.add.outer(np.arange(5) / 10, np.arange(4))
    by_repeat = [won[:, n][won[:, n] >= 0].mean() for n in range(4)]
    assert numbers == pytest.approx(
        {
            **{"success": 8 / 19, "turns_won": turns[won == 1].mean(), "turns_lost": turns[won == 0].mean()},
            **{"score": score[1:][won[1:] >= 0].mean(), "repeats": 4, "success_sd": np.std(by_repeat, ddof=1)},
            "pass_at_k": 3 / 4,
        }
    )
    assert list(statistics_of(episodes[:1])) == ["success", "turns_won"]
    assert [len(group) for group in grouped(episodes, "task_type").values()] == [11, 8]


def test_results_on_different_games_are_compared_as_samples(tmp_path, monkeypatch, capsys):
    a = result(tmp_path / "a.json", {goal: goal < 9 for goal in range(10)})
    b = result(tmp_path / "b.json", {goal: goal < 23 for goal in range(20, 30)})
    row = compare_evals.compare(*(json.loads(path.read_text())["episodes"] for path in (b, a)))["all"]
    assert row["interval"] == pytest.approx((0.1705, 0.8090), abs=5e-5) and not row["paired"]
    assert compared(monkeypatch, capsys, a, b)[-1] == "no game in common: compared as independent samples"
    for text, said in (("{}", "KeyError: 'episodes'"), ('{"settings": {}, "episodes": []}', ""), ("{", "JSONDecode")):
        b.write_text(text)
        with pytest.raises(SystemExit, match=f"name two results of evaluate.py .{said}"):
            compared(monkeypatch, capsys, a, b)
    with pytest.raises(SystemExit, match="nowhere.json"):
        compared(monkeypatch, capsys, a, tmp_path / "nowhere.json")
