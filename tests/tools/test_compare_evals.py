"""The statistics of evaluations, and compare_evals.py on results of evaluate.py."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest

from examples.tcod.tools import compare_evals
from examples.tcod.tools.compare_evals import difference, mcnemar, paired_difference

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


def result(path: Path, games: dict[int, bool], **settings: object) -> Path:
    episodes = [
        {"task": {"goal": goal}, "task_type": ("all", "odd")[goal % 2], "won": won, "turns": 3 if won else 5}
        for goal, won in games.items()
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
    assert lines[-1] == "not compared: 2 episodes of games that only one of the two has"


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
