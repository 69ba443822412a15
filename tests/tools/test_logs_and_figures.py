"""metrics.jsonl as a run writes it, and the figures drawn from it."""

import json

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from examples.tcod.records import run_folder
from examples.tcod.tools import plot_runs
from examples.tcod.tools.common.jsonl import read_lines

NUM_GPUS = 0


@pytest.fixture
def log(tmp_path, monkeypatch):
    """log(its seconds, seconds since the one before, ..) in a process of its own: nothing was logged yet."""
    monkeypatch.setenv("TCOD_RUN_DIR", str(tmp_path))
    for name, value in {"_last_line_at": None, "_rollout_played": False, "_warned": set(), "_unsaved": 0}.items():
        monkeypatch.setattr(run_folder, name, value)
    clock = [100.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: clock[0])

    def log(seconds, pause, *line):
        started = clock[0] + pause
        clock[0] = started + seconds
        run_folder.write_metrics(*line, started)

    return log


def written(folder):
    return [line for _, line in read_lines(folder / "metrics.jsonl", leave_out=lambda line: None)]


def test_each_rollout_and_evaluation_is_a_line(log, tmp_path):
    assert run_folder.rollouts_before(0) == 0
    (tmp_path / "metrics.jsonl").write_text('{"kind": "ro')  # a crash has left half a line
    log(4, 5, "eval", 0, {"eval/tcod/eval_s": 4.0})
    log(5, 0, "rollout", 0, {"rollout/tcod/k": 1})
    assert run_folder.rollouts_before(0) == 1
    log(4, 6, "eval", 1, {"eval/tcod/eval_s": 4.0})
    log(5, 1, "rollout", 1, {})
    assert written(tmp_path) == [
        {"kind": "eval", "n": 0, "train_s": 0.0, "eval/tcod/eval_s": 4.0},
        {"kind": "rollout", "n": 0, "train_s": 0.0, "rollout/tcod/k": 1},
        {"kind": "eval", "n": 1, "train_s": 6.0, "eval/tcod/eval_s": 4.0},
        {"kind": "rollout", "n": 1, "train_s": 1.0},
    ]


def test_a_folder_that_cannot_be_written_loses_lines_and_counts_them(log, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TCOD_RUN_DIR", str(tmp_path / "file"))
    metrics = [{}, {}, {}]
    for n in (0, 1):
        log(5, 4, "rollout", n, metrics[n])
    monkeypatch.setenv("TCOD_RUN_DIR", str(tmp_path))
    log(5, 4, "rollout", 2, metrics[2])
    assert metrics == [{}, {"rollout/tcod/unsaved_lines": 1}, {"rollout/tcod/unsaved_lines": 2}]
    assert [line["n"] for line in written(tmp_path)] == [2] and len(caplog.messages) == 1
    monkeypatch.delenv("TCOD_RUN_DIR")
    log(5, 4, "rollout", 3, {})
    assert run_folder._unsaved == 2 and len(written(tmp_path)) == 1


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


def test_of_lines_written_twice_the_last_counts_and_odd_ones_are_named(tmp_path, caplog):
    folder = run_dir(tmp_path / "a", seed=1)
    with (folder / "metrics.jsonl").open("a") as file:  # resumed from a checkpoint after rollout 1
        file.write(json.dumps({"kind": "rollout", "n": 2, "rollout/tcod/kl/trajectory": 9.0}) + "\n")
        file.write('{"n": 3}\n{"kind": "eval", "n": "4"}\n[]\n{"kind": "rollout", "n": 3, "rollout/tc')
    lines = plot_runs.read_run(folder)
    assert plot_runs.curve(lines, "rollout/tcod/kl/trajectory") == {0: 1, 1: 2, 2: 9.0}
    assert plot_runs.curve(lines, "eval/tcod/seen/success") == {1: 0.0, 2: 1 / 3, 3: 2 / 3}
    assert plot_runs.by_turn(lines[-1], "eval/tcod/seen/kl_by_turn/") == {4: 2}
    assert plot_runs.work_minutes(lines) == {"rollouts": 2.0, "training": 1.0, "evaluation": 1.5}
    left_out = [f"line {number} of {folder / 'metrics.jsonl'} is no line of metrics: " for number in (8, 9, 10, 11)]
    assert [message[: len(words)] for message, words in zip(caplog.messages, left_out, strict=True)] == left_out
    assert all(message.endswith("; it is left out") for message in caplog.messages)


def test_an_arm_looks_the_same_in_every_figure():
    few, many = (plot_runs.styles(dict.fromkeys(names, "1")) for names in (["b2f", "f2b"], ["x", "b2f", "y", "opd"]))
    assert few["b2f"] == many["b2f"]
    for part in ("color", "marker", "linestyle", "label"):
        assert len({style[part] for style in many.values()}) == 4
    arms = [f"arm {number}" for number in range(12)]
    looks = plot_runs.styles({name: "1" for name in ("opd", "f2b", "b2f", *arms)}).values()
    assert len({(look["color"], look["marker"], look["linestyle"]) for look in looks}) == 15


def test_seeds_are_a_mean_with_a_band_and_training_episodes_are_thin_lines(tmp_path):
    runs = {"opd": [plot_runs.read_run(run_dir(tmp_path / str(seed), seed)) for seed in (1, 2, 6)]}
    axes = Figure().subplots()
    plot_runs.draw_metric(axes, runs, "kl/trajectory", "seen")
    (evaluated, trained, entry), [band] = axes.lines, axes.collections
    assert list(evaluated.get_xdata()) == [1, 2, 3] and list(evaluated.get_ydata()) == [0, 3, 6]
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(2, 1), (2, 6), (3, 2), (3, 12)}
    assert list(trained.get_ydata()) == [3, 4, 5] and trained.get_linewidth() < evaluated.get_linewidth()
    assert axes.get_legend_handles_labels()[1] == ["OPD, 3 seeds", entry.get_label()]
    assert all(tick == int(tick) for tick in axes.get_xticks())
    axes = Figure().subplots()
    plot_runs.draw_metric(axes, runs, "kl/trajectory", None)
    assert axes.get_legend_handles_labels()[1] == ["OPD, 3 seeds"] and len(axes.collections) == 1


def test_kl_by_turn_is_shown_before_and_after_training(tmp_path):
    lines = plot_runs.read_run(run_dir(tmp_path / "a", seed=1))
    for run, labels in (lines, ["F2B"]), ([{**lines[1], "n": 0}, *lines], ["before training", "F2B"]):
        axes = Figure().subplots()
        plot_runs.draw_by_turn(axes, {"f2b": [run]}, "seen")
        assert axes.get_legend_handles_labels()[1] == labels
        assert [list(line.get_xdata()) for line in axes.lines] == [[4]] * len(labels)


def test_wall_time_is_stacked_and_the_range_of_the_seeds_stands_over_it(tmp_path):
    runs = [plot_runs.read_run(run_dir(tmp_path / str(updates), 1, updates)) for updates in (2, 4)]
    axes = Figure().subplots()
    plot_runs.draw_work(axes, {"opd": runs})
    assert [bar.get_height() for bar in axes.patches] == [3.0, 1.5, 1.5]  # rollouts, training, evaluation
    assert axes.collections[0].get_segments()[0][:, 1].tolist() == [4.0, 8.0]


def test_the_command_draws_all_arms(tmp_path, monkeypatch, caplog):
    folders = [run_dir(tmp_path / name, seed, scored=seed > 1) for seed, name in enumerate("abc")]
    for number, arms in enumerate((["f2b", "f2b", "b2f"], ["opd"])):  # the last one without the teacher's scores
        runs = [f"{arm}={folder}" for arm, folder in zip(arms, folders, strict=False)]
        monkeypatch.setattr("sys.argv", ["plot_runs.py", f"{tmp_path}/{number}.png", *runs])
        plot_runs.main()
        assert matplotlib.image.imread(tmp_path / f"{number}.png").std() > 0
        assert "no run has a KL" not in caplog.text
    draw_by_turn = []
    monkeypatch.setattr(plot_runs, "draw_by_turn", lambda *_: draw_by_turn.append(1))
    plot_runs.draw({"reward": [[{"kind": "rollout", "n": 0, "rollout/tcod/success": 0.5}]]}, tmp_path / "reward.png")
    assert "no run has a KL to a teacher: its panels are left out" in caplog.text and not draw_by_turn


@pytest.mark.parametrize(
    "figure, runs, why",
    [
        ("x.png", ["f2b={0}"], "is not ARM=DIR with metrics in DIR/metrics.jsonl: name a run directory"),
        ("x.png", ["f2b={0}/torn"], "/torn is not ARM=DIR with metrics"),
        ("none/x.png", ["f2b={0}/a"], "No such file or directory: 'none/x.png'"),
        ("x.doc", ["f2b={0}/a"], "'doc' is not supported"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys, figure, runs, why):
    run_dir(tmp_path / "a", seed=1)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"kind": "ro')
    monkeypatch.setattr("sys.argv", ["plot_runs.py", figure, *(run.format(tmp_path) for run in runs)])
    with pytest.raises(SystemExit):
        plot_runs.main()
    assert why in capsys.readouterr().err
