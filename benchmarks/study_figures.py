"""The study's figures."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.study_arms import TURNS_TO_WIN
from benchmarks.study_results import SPENT, Results, kl_by_turn
from examples.tcod.tools.plot_runs import BEFORE, Curve, draw_curve, finish, styles

DOCS = Path(__file__).resolve().parents[1] / "docs"
MAIN = ("opd", "f2b", "b2f")
TURNS = (1, 3, 5, 8, 12, 16, 20)
COLUMNS = {  # of the second part's arms: title
    "token": "mean over tokens",
    "turn": "mean over turns",
    "trajectory": "mean over trajectories",
    "token-calm": "mean over tokens,\na quarter of the rate",
}


def curves(frame: pd.DataFrame, arm: str, metric: str, first: int = 0) -> list[Curve]:
    """Of each seed {n: metric}; n counts from `first`."""
    return [{n + first: of[metric] for (_, n), of in seed.iterrows()} for _, seed in frame.loc[arm].groupby("seed")]


def turn_curve(evaluations: pd.DataFrame) -> Curve:
    return kl_by_turn(evaluations)["kl"].to_dict()


def draw_first(results: Results, path: Path = DOCS / "study.png") -> None:
    """Success against updates and environment steps, KL against updates, and KL by turn before and after."""
    points = results.evaluations
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    (success, by_steps), (kl, turns) = figure.subplots(2, 2)
    for name, style in styles({name: results.common_seeds(name) for name in MAIN}).items():
        draw_curve(success, curves(points, name, "success"), style)
        draw_curve(kl, curves(points, name, "kl"), style)
        means = points.loc[name].groupby("n")[["steps", "success"]].mean()
        draw_curve(by_steps, [dict(zip(means["steps"], means["success"], strict=True))], style)
        draw_curve(turns, [turn_curve(points.loc[name].groupby("seed").tail(1))], style)
    draw_curve(turns, [turn_curve(points.loc[list(MAIN)].groupby(["arm", "seed"]).head(1))], BEFORE)
    finish(success, xlabel="update", ylabel="success", title="held-out success, mean and range of the seeds")
    finish(by_steps, xlabel="environment steps", ylabel="success", title="the same against environment steps, mean")
    finish(kl, xlabel="update", ylabel="KL, nats", ylim=(0, None), title="trajectory KL to the teacher, full horizon")
    finish(turns, xlabel="turn", xticks=TURNS, ylabel="KL of the turn, nats", title="KL by turn, after training")
    figure.savefig(path, dpi=110)  # on white: it is read on dark pages and printed as well


def draw_second(results: Results, path: Path = DOCS / "study_losses.png") -> None:
    """KL per token and success of the training episodes against the update: a column per loss and learning rate."""
    columns = {
        title: {name: f"{name}-{suffix}" for name in (*MAIN, "reopd") if f"{name}-{suffix}" in results.arms}
        for suffix, title in COLUMNS.items()
    }
    columns = {title: arms for title, arms in columns.items() if arms}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, len(columns), sharey="row", squeeze=False)
    for (kl, success), (title, arms) in zip(panels.T, columns.items(), strict=True):
        for name, style in styles({name: results.common_seeds(arm) for name, arm in arms.items()}).items():
            draw_curve(kl, curves(results.updates, arms[name], "token_kl", first=1), style)
            draw_curve(success, curves(results.updates, arms[name], "success", first=1), style)
        finish(kl, xlabel="update", yscale="log", title=title)
        finish(success, xlabel="update")
    panels[0, 0].set_ylabel("KL per token, nats")
    panels[1, 0].set_ylabel("success, at depth k")
    figure.suptitle("training episodes")
    figure.savefig(path, dpi=110)


def draw_third(results: Results, path: Path = DOCS / "study_baselines.png") -> None:
    """Success against what was spent, means over seeds: the environment's steps, and the teacher's tokens."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = dict(zip(SPENT, figure.subplots(1, 2, sharey=True), strict=True))
    for arm, marker in zip(results.arms, "osD^vP", strict=False):
        means = results.evaluations.loc[arm].groupby("n")[[*SPENT, "success"]].mean()
        for of, panel in panels.items():  # reward alone costs no tokens: a line straight up
            panel.plot(means[of], means["success"], marker=marker, label=arm)
    finish(panels["steps"], xlabel="environment steps", ylabel="held-out success")
    finish(panels["teacher_tokens"], xlabel="tokens that the teacher scored, or said in demonstrations")
    figure.savefig(path, dpi=110)


def draw_fourth(results: Results, path: Path = DOCS / "study_notes.png") -> None:
    """Success within fewer and more turns before and after training: each seed, and their mean."""
    last = results.evaluations.groupby(["arm", "seed"], sort=False).last()["within"]
    before = results.evaluations.query("n == 0").groupby("seed").first()["within"]
    rows = {"before": before, **{arm: last.loc[arm] for arm in results.arms}}
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for panel, turns in zip(figure.subplots(1, len(TURNS_TO_WIN), sharey=True), TURNS_TO_WIN, strict=True):
        for height, of in enumerate(rows.values()):
            values = [within[f"{turns}"] for within in of]
            panel.plot(values, [height] * len(values), "o", color="C0", alpha=0.35)
            panel.plot(sum(values) / len(values), height, "|", color="C0", markersize=16, markeredgewidth=2)
        ticks = {"yticks": range(len(rows)), "yticklabels": list(rows)}
        finish(panel, xlabel="held-out success", title=f"within {turns} turns", **ticks)
    panel.invert_yaxis()
    figure.savefig(path, dpi=110)
