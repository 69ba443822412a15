"""metrics.jsonl as the hooks write it, and the figures drawn from it."""

import json
from argparse import Namespace

import matplotlib.image
from examples.tcod.tools import plot_runs
import pytest
from examples.tcod import run_log

NUM_GPUS = 0


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The hooks in a process of their own: nothing was logged yet."""
    monkeypatch.setenv("TCOD_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(run_log, "_last_line_at", None)
    clock = [100.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: clock[0])

    def after(seconds):
        clock[0] += seconds
        return run_log

    return after


def written(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_rollout_and_evaluation_is_a_line(log, tmp_path):
    args = Namespace()
    assert log(9).log_eval(0, args, {}, {"eval/tcod/eval_s": 4.0}) is False  # slime logs too
    assert log(5).log_rollout(0, args, [], {"rollout/tcod/k": 1}, 5.0) is False
    log(10).log_eval(0, args, {}, {"eval/tcod/eval_s": 4.0})
    log(6).log_rollout(1, args, [], None, 5.0)
    assert written(tmp_path) == [
        {"kind": "eval", "n": 0, "train_s": 0.0, "eval/tcod/eval_s": 4.0},
        {"kind": "rollout", "n": 0, "train_s": 0.0, "rollout/tcod/k": 1},
        {"kind": "eval", "n": 1, "train_s": 6.0, "eval/tcod/eval_s": 4.0},
        {"kind": "rollout", "n": 1, "train_s": 1.0},
    ]


def run_dir(folder, seed, updates=3, scored=True):
    """A run with numbers that tell it from others."""
    folder.mkdir()
    lines = []
    for n in range(updates):
        lines.append({"kind": "rollout", "n": n, "train_s": 30.0, "rollout/tcod/rollout_s": 60.0})
        lines[-1] |= {"rollout/tcod/kl/trajectory": n + seed, "rollout/tcod/kl_by_turn/00": seed}
        lines.append({"kind": "eval", "n": n + 1, "train_s": 0.0, "eval/tcod/eval_s": 30.0})
        lines[-1]["eval/tcod/seen/success"] = n / updates
        if scored:
            lines[-1] |= {"eval/tcod/seen/kl/trajectory": n * seed, "eval/tcod/seen/kl_by_turn/03": n}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_of_lines_written_twice_the_last_counts(tmp_path):
    folder = run_dir(tmp_path / "a", seed=1)
    with (folder / "metrics.jsonl").open("a") as file:  # resumed from a checkpoint after rollout 1
        file.write(json.dumps({"kind": "rollout", "n": 2, "rollout/tcod/kl/trajectory": 9.0}) + "\n")
    lines = plot_runs.read_run(folder)
    assert plot_runs.curve(lines, "rollout", "rollout/tcod/kl/trajectory") == {0: 1, 1: 2, 2: 9.0}
    assert plot_runs.curve(lines, "eval", "eval/tcod/seen/success") == {1: 0.0, 2: 1 / 3, 3: 2 / 3}
    assert plot_runs.by_turn(lines[-1], "eval/tcod/seen/kl_by_turn/") == {4: 2}
    assert plot_runs.work_minutes(lines) == {"rollouts": 2.0, "training": 1.0, "evaluation": 1.5}


def test_a_band_reaches_from_the_lowest_to_the_highest_seed(tmp_path):
    runs = [plot_runs.read_run(run_dir(tmp_path / str(seed), seed)) for seed in (1, 2, 6)]
    _, axes = plot_runs.plt.subplots()
    metric = "rollout/tcod/kl/trajectory"
    plot_runs.draw_curves(axes, {"f2b": runs}, lambda lines: plot_runs.curve(lines, "rollout", metric))
    [line], [band] = axes.lines, axes.collections
    assert list(line.get_xdata()) == [0, 1, 2] and list(line.get_ydata()) == [3, 4, 5]
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(0, 1), (0, 6), (2, 3), (2, 8)}
    assert axes.get_legend_handles_labels()[1] == ["f2b, 3 seeds"]


@pytest.mark.parametrize("scored", [True, False])
def test_the_command_draws_all_arms(tmp_path, monkeypatch, scored):
    one, two, other = (run_dir(tmp_path / name, seed, scored=scored) for seed, name in enumerate(("a", "b", "c"), 1))
    monkeypatch.setattr("sys.argv", ["plot_runs.py", f"{tmp_path}/x.png", f"f2b={one}", f"f2b={two}", f"b2f={other}"])
    plot_runs.main()
    assert matplotlib.image.imread(tmp_path / "x.png").std() > 0


def test_what_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plot_runs.py", "x.png", f"f2b={tmp_path}"])
    with pytest.raises(SystemExit):
        plot_runs.main()
    assert "is not ARM=DIR with a metrics.jsonl in DIR" in capsys.readouterr().err
