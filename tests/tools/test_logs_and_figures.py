"""metrics.jsonl as the hooks write it, and the figures drawn from it."""

import json
from argparse import Namespace

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from examples.tcod.records import run_dir as run_dir_module
from examples.tcod.records import run_log
from examples.tcod.tools import plot_runs, plotting

NUM_GPUS = 0


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The hooks in a process of their own: nothing was logged yet."""
    monkeypatch.setenv("TCOD_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(run_log, "_last_line_at", None)
    monkeypatch.setattr(run_log, "_rollout_played", False)
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


def test_a_folder_that_cannot_be_written_loses_lines_and_counts_them(log, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_dir_module, "_warned", set())
    monkeypatch.setattr(run_log, "_unsaved", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TCOD_RUN_DIR", str(tmp_path / "file"))
    metrics = [{}, {}, {}]
    for n in (0, 1):
        log(9).log_rollout(n, Namespace(), [], metrics[n], 5.0)
    monkeypatch.setenv("TCOD_RUN_DIR", str(tmp_path))
    log(9).log_rollout(2, Namespace(), [], metrics[2], 5.0)
    assert metrics == [{}, {"rollout/tcod/unsaved_lines": 1}, {"rollout/tcod/unsaved_lines": 2}]
    assert [line["n"] for line in written(tmp_path)] == [2] and len(caplog.messages) == 1
    monkeypatch.delenv("TCOD_RUN_DIR")
    log(9).log_rollout(3, Namespace(), [], {}, 5.0)
    assert run_log._unsaved == 2 and len(written(tmp_path)) == 1


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
    assert plot_runs.curve(lines, "rollout/tcod/kl/trajectory") == {0: 1, 1: 2, 2: 9.0}
    assert plot_runs.curve(lines, "eval/tcod/seen/success") == {1: 0.0, 2: 1 / 3, 3: 2 / 3}
    assert plot_runs.by_turn(lines[-1], "eval/tcod/seen/kl_by_turn/") == {4: 2}
    assert plot_runs.work_minutes(lines) == {"rollouts": 2.0, "training": 1.0, "evaluation": 1.5}


def test_a_band_reaches_from_the_lowest_to_the_highest_seed(tmp_path):
    axes = Figure().subplots()
    plotting.draw_curve(axes, [{0: seed, 1: 1 + seed} for seed in (1, 2, 6)], plotting.styles({"f2b": "123"})["f2b"])
    plotting.finish(axes, ylabel="KL")
    [line], [band] = axes.lines, axes.collections
    assert list(line.get_xdata()) == [0, 1] and list(line.get_ydata()) == [3, 4]
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(0, 1), (0, 6), (1, 2), (1, 7)}
    assert axes.get_legend_handles_labels()[1] == ["F2B, 3 seeds"]
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_an_arm_looks_the_same_in_every_figure():
    few, many = (plotting.styles(dict.fromkeys(names, "1")) for names in (["b2f", "f2b"], ["x", "b2f", "y", "opd"]))
    assert list(few) == ["f2b", "b2f"] and list(many) == ["opd", "b2f", "x", "y"]
    assert few["b2f"] == many["b2f"]
    for part in ("color", "marker", "linestyle", "label"):
        assert len({style[part] for style in many.values()}) == 4
    with pytest.raises(ValueError, match="only 3 arms can be told apart, not 4"):
        plotting.styles(dict.fromkeys("abcd", "1"))


def test_training_episodes_are_thin_lines_beside_the_evaluations(tmp_path):
    runs = {"opd": [plot_runs.read_run(run_dir(tmp_path / str(seed), seed)) for seed in (1, 2)]}
    axes = Figure().subplots()
    plot_runs.draw_metric(axes, runs, "kl/trajectory", "seen", "KL")
    evaluated, trained, entry = axes.lines
    assert list(evaluated.get_ydata()) == [0, 1.5, 3] and list(trained.get_ydata()) == [1.5, 2.5, 3.5]
    assert trained.get_linewidth() < evaluated.get_linewidth() and len(axes.collections) == 1
    assert axes.get_legend_handles_labels()[1] == ["OPD, 2 seeds", entry.get_label()]
    axes = Figure().subplots()
    plot_runs.draw_metric(axes, runs, "kl/trajectory", None, "KL")
    assert axes.get_legend_handles_labels()[1] == ["OPD, 2 seeds"] and len(axes.collections) == 1


def test_kl_by_turn_is_shown_before_and_after_training(tmp_path):
    lines = plot_runs.read_run(run_dir(tmp_path / "a", seed=1))
    for run, labels in (lines, ["F2B"]), ([{**lines[1], "n": 0}, *lines], ["before training", "F2B"]):
        axes = Figure().subplots()
        plot_runs.draw_by_turn(axes, {"f2b": [run]}, "seen", "KL by turn")
        assert axes.get_legend_handles_labels()[1] == labels
        assert [list(line.get_xdata()) for line in axes.lines] == [[4]] * len(labels)


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
    run_dir(tmp_path / "a", seed=1)
    monkeypatch.setattr("sys.argv", ["plot_runs.py", "x.png", *(f"{name}={tmp_path}/a" for name in "abcd")])
    with pytest.raises(SystemExit):
        plot_runs.main()
    assert "only 3 arms can be told apart, not 4: name fewer" in capsys.readouterr().err
