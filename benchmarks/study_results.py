"""The study's results: what is kept of a job's metrics, all of them as frames, and the interval over seeds."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.study_arms import TURNS_TO_WIN
from examples.tcod.tools.common.jsonl import read_lines
from examples.tcod.tools.plot_runs import by_turn

Result = dict[str, Any]  # of one job, see `result`
AT_04, AT_1 = "eval/tcod/heldout/", "eval/tcod/heldout_t1/"
CHECKS = ("teacher", "shuffled")  # arms that are not compared with others
COURSE = ("updates", "evaluations")  # the lists of a result
SPENT = ("steps", "teacher_tokens")  # what success is measured against beside updates
LATE = 6  # updates at the end whose training episodes are shown; in the second part F2B plays whole ones by then


def result(lines: list[dict[str, Any]], batch: int) -> Result:
    """What is kept of a job's metrics.jsonl: a line per evaluation and a line per update.

    Evaluations: success at temperatures 0.4 and 1, KL in nats of whole trajectories and by turn (with the number of
    episodes that reached the turn), at temperature 1. Updates: depth, success and KL of the training episodes, the
    environment's steps in all (of dropped groups too), by the student and by replay, samples without a signal, tokens
    (`read` by the teacher: whole sequences and notes), and seconds of rollout and training. What was not there is
    null: a KL without a teacher, success without episodes.
    """
    evaluations = [
        {
            "n": line["n"],
            "success": line[f"{AT_04}success"],
            "success_t1": line[f"{AT_1}success"],
            "turns": line[f"{AT_04}turns/student"],
            "kl": line.get(f"{AT_1}kl/trajectory"),
            "episodes": line[f"{AT_04}episodes"],
            "kl_by_turn": [kl for _, kl in sorted(by_turn(line, f"{AT_1}kl_by_turn/").items())],
            "kl_by_turn_episodes": [n for _, n in sorted(by_turn(line, f"{AT_1}kl_by_turn_count/").items())],
        }
        for line in lines
        if line["kind"] == "eval"
    ]
    rollouts = [{key.removeprefix("rollout/tcod/"): value for key, value in line.items()} for line in lines]
    updates = [
        {
            "n": of["n"],
            "k": of.get("k"),
            "success": of.get("success"),
            "kl": of.get("kl/trajectory"),
            "steps": of.get("steps", 0),
            "student_steps": round(of.get("turns/student", 0) * batch),
            "replayed_steps": round(of.get("turns/replayed", 0) * batch),
            "no_signal": of.get("no_signal", 0),
            "scored": of["tokens/scored"],
            "read": round(of["tokens/total"] + of.get("note_tokens", 0) * of["samples"]) if of["tokens/scored"] else 0,
            "trained": of["tokens/trained"],
            "failed": of["failed"],
            "s": of["rollout_s"] + following["train_s"],
        }
        for of, following in pairwise(rollouts)  # the last line is an evaluation's
        if of["kind"] == "rollout"
    ]
    return {"evaluations": _rounded(evaluations), "updates": _rounded(updates)}


def add_episodes(one: Result, rollouts: Path) -> None:
    """Add to a job's evaluations what its saved episodes at temperature 0.4 say, all of which were saved.

    `within`: success within so many turns; `turns_won`: those of a won episode, None without one; `blind`: share of
    the episodes in which the agent reached for a thing that it had not seen.
    """
    for point in one["evaluations"]:
        episodes = [line for _, line in read_lines(rollouts / f"eval_heldout_{point['n']:06d}.jsonl")]
        if len(episodes) != point["episodes"]:
            raise RuntimeError(f"{len(episodes)} of {point['episodes']} episodes were saved in {rollouts}")
        won = [len(episode["turns"]) for episode in episodes if episode["won"]]
        point["within"] = {turns: sum(n <= turns for n in won) / len(episodes) for turns in TURNS_TO_WIN}
        point["turns_won"] = sum(won) / len(won) if won else None
        point["blind"] = sum(any(_blind_takes(episode["turns"])) for episode in episodes) / len(episodes)


def _blind_takes(turns: list[dict[str, Any]]) -> Iterator[bool]:
    seen = ""
    for turn in turns:
        seen += turn["observation"]
        if taken := re.match(r"take (\w+ \d+) from", turn["action"]):
            yield taken[1] not in seen


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def one_line(one: Result) -> str:
    first, last = one["evaluations"][0], one["evaluations"][-1]
    kl = "" if last["kl"] is None else f", KL {first['kl']:.1f} -> {last['kl']:.1f} nats"
    return (
        f"{last['n']} updates, success {first['success']:.2f} -> {last['success']:.2f} at temperature 0.4, "
        f"{first['success_t1']:.2f} -> {last['success_t1']:.2f} at 1{kl}"
    )


class Results:
    """All results of a folder, as frames with a row per (arm, seed, n).

    `evaluations` has the environment's steps up to each, replayed ones and those of dropped episodes included, and the
    tokens that the teacher scored, or said in demonstrations. `updates` has the KL of the training episodes also as a
    mean over their tokens. A job that went on with another's weights is shown behind that one. A seed's evaluation
    before the first update, which only one of its arms may have, is that of all its arms, since all start from one
    checkpoint but the teacher as its own student.
    """

    def __init__(self, results: Sequence[Result], first: Sequence[str] = ()) -> None:
        rank = {name: i for i, name in enumerate(first)}
        ordered = sorted(results, key=lambda one: (rank.get(one["arm"], len(rank)), one["arm"]))
        self.jobs = {(one["arm"], one["settings"]["seed"]): one for one in ordered}
        self.arms = list(dict.fromkeys(arm for arm, _ in self.jobs))
        starts = {
            seed: one["evaluations"][0]
            for (arm, seed), one in self.jobs.items()
            if one["evaluations"][0]["n"] == 0 and arm not in CHECKS
        }
        self._courses = {key: self._course(one) for key, one in self.jobs.items()}
        self.updates = self._frame(lambda seed, one: self._updates(one))
        self.evaluations = self._frame(lambda seed, one: self._evaluations(one, starts.get(seed)))

    @classmethod
    def load(cls, folder: Path, first: Sequence[str] = ()) -> "Results":
        return cls([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))], first)

    def _course(self, one: Result) -> Result:
        """A job's result behind that of the job whose weights it began with."""
        if not (name := one["settings"].get("after")):
            return one
        first = self.jobs[name, one["settings"]["seed"]]
        n = first["settings"]["keep"]
        before = {key: [of for of in first[key] if of["n"] < n + (key == "evaluations")] for key in COURSE}
        return one | {key: before[key] + [{**of, "n": of["n"] + n} for of in one[key]] for key in COURSE}

    def _frame(self, of: Callable[[int, Result], pd.DataFrame]) -> pd.DataFrame:
        return pd.concat({key: of(key[1], one) for key, one in self._courses.items()}, names=["arm", "seed"])

    @staticmethod
    def _updates(one: Result) -> pd.DataFrame:
        frame = pd.DataFrame(one["updates"]).set_index("n").astype(float)
        if "steps" not in frame:  # as in the first results, none of whose episodes was lost
            frame["steps"] = frame["student_steps"] + frame["replayed_steps"]
        frame["teacher_tokens"] = frame["scored"] if "scored" in frame else 0.0
        if "demonstration_steps" in frame:
            made = frame[["demonstration_steps", "demonstration_tokens"]].fillna(0.0)
            frame[["steps", "teacher_tokens"]] += made.to_numpy()
        frame["token_kl"] = frame["kl"] * one["settings"]["batch"] / frame["trained"]
        return frame

    @classmethod
    def _evaluations(cls, one: Result, start: dict[str, Any] | None) -> pd.DataFrame:
        points = one["evaluations"]
        missing = [start] if start and points[0]["n"] > 0 else []
        frame = pd.DataFrame(missing + points).set_index("n")
        spent = cls._updates(one)[list(SPENT)].cumsum()
        spent.index += 1
        return frame.join(spent).fillna(dict.fromkeys(SPENT, 0))

    def final(self) -> pd.DataFrame:
        """A row per (arm, seed): the last evaluation, and the training episodes of the last updates."""
        runs = self.updates.groupby(["arm", "seed"], sort=False)
        late = runs.tail(LATE).groupby(["arm", "seed"], sort=False)[["success", "kl"]].mean()
        doubled = runs["token_kl"].apply(lambda kl: (kl > 2 * kl.shift()).sum())
        last = self.evaluations.groupby(["arm", "seed"], sort=False)[["success", "success_t1", "kl"]].last()
        return last.join(late.add_suffix("_training")).assign(doublings=doubled)

    def before(self, arm: str) -> float:
        """Success before the first update, a mean over seeds of the mean over all arms; nan where a seed has none."""
        starts = self.evaluations["success"].xs(0, level="n")
        own = starts.index.get_level_values("arm").isin([arm] if arm in CHECKS else set(self.arms) - set(CHECKS))
        return starts[own].groupby("seed").mean().reindex(self.common_seeds(arm)).mean(skipna=False)

    def success_at(self, arm: str, seed: int, spent: float, of: str = "steps") -> float:
        """Success at temperature 0.4 when so much was spent (`of` SPENT), linear between evaluations."""
        points = self.evaluations.loc[arm].loc[seed]
        return float(np.interp(spent, points[of], points["success"]))

    def leads(self, arm: str, base: str, of: str = "steps") -> list[float]:
        """Success minus the base's, by seed, after as much (`of` SPENT) as the cheaper of the two took in all."""
        found = []
        for seed in self.common_seeds(arm, base):
            spent = min(self.evaluations.loc[name].loc[seed][of].iloc[-1] for name in (arm, base))
            found.append(self.success_at(arm, seed, spent, of) - self.success_at(base, seed, spent, of))
        return found

    def common_seeds(self, *arms: str) -> list[int]:
        return sorted(set.intersection(*({seed for name, seed in self.jobs if name == arm} for arm in arms)))


def kl_by_turn(evaluations: pd.DataFrame) -> pd.DataFrame:
    """By turn, from 1: `kl`, the mean over the episodes that reached it, in nats, and how many they are."""
    turns = evaluations[["kl_by_turn", "kl_by_turn_episodes"]].explode(["kl_by_turn", "kl_by_turn_episodes"])
    number = turns.groupby(turns.index.names).cumcount() + 1
    frame = pd.DataFrame({"turn": number, "episodes": turns["kl_by_turn_episodes"].astype(int)})
    frame["sum"] = turns["kl_by_turn"].astype(float) * frame["episodes"]
    sums = frame.groupby("turn").sum()
    return sums.assign(kl=sums["sum"] / sums["episodes"])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% percentile interval of the mean over seeds that are drawn with replacement.

    With five seeds it is too narrow: it covers the true mean of a normal in about 83 of 100 studies rather than 95.
    """
    if len(set(values)) == 1:
        return values[0], values[0]  # scipy says nan
    done = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=99_999, rng=0)
    return tuple(done.confidence_interval)
