"""Where the time of a training step goes on GPUs, and how to split them: arithmetic from the inputs below, no run.

benchmarks/SCALE.md explains the formulas and says what is assumed. The student's part of an episode is sequential
(turn after turn, token after token), so its time is that of the longest episode; everything else is a number of
floating point operations over what its GPUs do per second.
"""

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import report

ARMS = ("f2b", "b2f")
# The run script's MODE, COLOCATE=1, and TEACHER=self.
MODES = ("sync", "async", "fully_async", "colocated", "self")


@dataclass(frozen=True)
class Split:
    """GPUs that train, that generate in engines of `tp` GPUs each, and that score; with 0 of these the engines do."""

    actor: int
    rollout: int
    tp: int
    teacher: int

    def __str__(self) -> str:
        return f"{self.actor}+{self.rollout // self.tp}x{self.tp}+{self.teacher}"


def turns(o: Namespace, arm: str, k: int) -> tuple[float, float, float]:
    """(replayed turns, the student's turns in the longest episode, in the mean episode) at depth k.

    A share o.success of the episodes is won, after o.solved_turns turns where the plan allows as many; the others use
    all turns that they have. b2f hands over o.solved_turns - k turns from a demonstration's start.
    """
    replayed = max(o.solved_turns - k, 0) if arm == "b2f" else 0
    longest = min(k, o.horizon) if arm == "f2b" else o.horizon if not replayed else k + o.slack
    won = min(o.solved_turns - replayed, longest)
    return replayed, longest, o.success * won + (1 - o.success) * longest


def step(o: Namespace, arm: str, k: int, split: Split, continuous: bool = False) -> dict[str, float]:
    """Seconds of one synchronous training step, by what the wall clock waits for.

    Continuous: for the next episode to begin when one ends, so that a batch takes as long as its mean episode.
    """
    replayed, longest, mean = turns(o, arm, k)
    longest = mean if continuous else longest
    speed = {"flops": o.peak_tflops * 1e12, "bytes": o.bandwidth_tb * 1e12}
    per_turn = o.sampled + o.observed
    prompt = o.prompt + replayed * per_turn
    tokens = prompt + mean * per_turn  # of a mean episode

    # The student's engines: weights and cached tokens are read for every token, once for all episodes of an engine.
    at_once = o.batch * (mean / longest) * split.tp / split.rollout
    gain = split.tp * o.tp_efficiency ** math.log2(split.tp)
    read = (2 * o.student * 1e9 + at_once * (prompt + longest * per_turn / 2) * o.student_kv) / speed["bytes"]
    compute = 2 * o.student * 1e9 * at_once / speed["flops"]
    per_token = max(read / o.bandwidth_share, compute / o.prefill_mfu) / gain + o.token_overhead_ms / 1000
    decode = longest * o.sampled * per_token
    fresh = o.batch * (prompt + mean * o.observed) / split.rollout  # tokens; what was sampled is in the cache
    prefill = 2 * o.student * 1e9 * fresh / (speed["flops"] * o.prefill_mfu)
    per_process = math.ceil(o.batch / o.env_processes)
    environment = per_process * (o.reset_ms + (replayed + longest) * o.step_ms) / 1000

    scorer, scored, gpus = o.teacher, tokens, split.teacher
    if not split.teacher:
        scorer, scored, gpus = o.student, tokens + o.note, split.rollout
    scoring = 2 * scorer * 1e9 * o.batch * scored / (gpus * speed["flops"] * o.prefill_mfu)
    # Episodes that end early are scored while others play; those that use all their turns end together.
    last = 1 - o.success if o.solved_turns - replayed < longest else 1.0
    training = 10 * o.student * 1e9 * o.batch * tokens / (split.actor * speed["flops"] * o.training_mfu)
    return {
        "decode": decode,
        "prefill": prefill,
        "environment": environment,
        "scoring": scoring * last,
        "training": training,
        "fixed": o.fixed_s,
        "scoring, hidden": scoring * (1 - last),
    }


def wall(seconds: dict[str, float]) -> float:
    return sum(value for name, value in seconds.items() if "hidden" not in name)


def mode_step(o: Namespace, arm: str, k: int, split: Split, mode: str) -> tuple[float, float]:
    """(seconds of a training step, how many steps old the weights are that a mean token was sampled with)."""
    seconds = step(o, arm, k, split, continuous=mode == "fully_async")
    training, fixed = seconds["training"], seconds["fixed"]
    playing = wall(seconds) - training - fixed
    if mode == "async":  # weights are pushed when both have ended
        return max(playing, training) + fixed, 1.0
    if mode == "fully_async":  # an episode is scored while others play
        scoring = seconds["scoring"] + seconds["scoring, hidden"]
        episode, playing = playing - seconds["scoring"] + scoring / o.batch, playing - seconds["scoring"]
        whole = max(playing, scoring, training + fixed)
        return whole, 1 + episode / 2 / whole
    return wall(seconds) + (o.switch_s if mode == "colocated" else 0.0), 0.0


def idle(seconds: dict[str, float], split: Split) -> float:
    """Share of all GPU time in which a GPU has nothing to do."""
    busy = split.actor * seconds["training"] + split.rollout * (seconds["decode"] + seconds["prefill"])
    busy += (split.teacher or split.rollout) * (seconds["scoring"] + seconds["scoring, hidden"])
    return 1 - busy / (wall(seconds) * (split.actor + split.rollout + split.teacher))


def splits(o: Namespace, gpus: int, mode: str = "sync") -> Iterator[Split]:
    """All splits that fit: 18 bytes per trained parameter and 2 per served one take at most 60 % of a GPU's memory.

    Colocated: the engines have the GPUs that train.
    """

    def smallest(gb: float) -> int:
        return 2 ** max(0, math.ceil(math.log2(gb / (0.6 * o.memory_gb))))

    actor, engine, teacher = smallest(18 * o.student), smallest(2 * o.student), smallest(2 * o.teacher)
    for actors in range(actor, gpus, actor):
        for teachers in [0] if mode == "self" else range(teacher, gpus - actors, teacher):
            left, tp = actors if mode == "colocated" else gpus - actors - teachers, engine
            while tp <= min(left, 8):
                yield Split(actors, left // tp * tp, tp, teachers)
                tp *= 2


def best(o: Namespace, arm: str, depths: list[int], gpus: int, mode: str = "sync") -> Split:
    """The split with the shortest sum of steps at these depths."""
    return min(splits(o, gpus, mode), key=lambda split: total(o, arm, depths, split, mode))


def total(o: Namespace, arm: str, depths: list[int], split: Split, mode: str = "sync") -> float:
    """Seconds of one step at each of these depths."""
    return sum(count * mode_step(o, arm, k, split, mode)[0] for k, count in Counter(depths).items())


def row(o: Namespace, arm: str, k: int, split: Split, **labels: Any) -> dict[str, Any]:
    seconds = step(o, arm, k, split)
    parts = {name: value for name, value in seconds.items() if "hidden" not in name}
    return {
        "arm": arm,
        "k": k,
        **labels,
        "split": str(split),
        **parts,
        "wall s": wall(seconds),
        "idle": idle(seconds, split),
    }


def by_mode(o: Namespace, gpus: int, schedule: list[int]) -> Iterator[dict[str, Any]]:
    """Each mode with the split that is best for a run of f2b."""
    for mode in MODES:
        split = best(o, "f2b", schedule, gpus, mode)
        yield {
            "GPUs": gpus,
            "episodes": o.batch,
            "mode": mode,
            "split": str(split),
            **{f"step s at k={k}": mode_step(o, "f2b", k, split, mode)[0] for k in (1, o.horizon)},
            "hours of f2b": total(o, "f2b", schedule, split, mode) / 3600,
            "steps behind at T": mode_step(o, "f2b", o.horizon, split, mode)[1],
        }


def tables(o: Namespace) -> dict[str, list[dict[str, Any]]]:
    depths = sorted({k for k in (1, 2, 4, 8, 16) if k < o.horizon} | {o.horizon})
    default = Split(o.actor_gpus, o.gpus - o.actor_gpus - o.teacher_gpus, 1, o.teacher_gpus)
    by_part = [row(o, arm, k, default) for arm in ARMS for k in depths]
    by_split = [row(o, arm, k, best(o, arm, [k], o.gpus)) for arm in ARMS for k in depths]
    large, schedule = 8 * o.gpus, [min(1 + n // o.eta, o.horizon) for n in range(o.steps)]
    more = Namespace(**{**vars(o), "batch": 8 * o.batch, "env_processes": 8 * o.env_processes})
    by_size = [
        row(of, "f2b", k, best(of, "f2b", [k], gpus), GPUs=gpus, episodes=of.batch)
        for k in depths
        for gpus, of in ((o.gpus, o), (large, o), (large, more))
    ]
    runs = []
    for arm, ks in (("opd", [o.horizon] * o.steps), ("f2b", schedule), ("b2f", schedule)):
        plan = "f2b" if arm == "opd" else arm
        for name, split in (("default", default), ("best", best(o, plan, ks, o.gpus))):
            hours = total(o, plan, ks, split) / 3600
            runs.append({"arm": arm, "split": f"{split} ({name})", "hours": hours})
    for run in runs:
        run["/ opd"] = run["hours"] / next(r["hours"] for r in runs if "default" in r["split"])
    modes = [row for gpus, of in ((o.gpus, o), (large, o), (large, more)) for row in by_mode(of, gpus, schedule)]
    return {
        f"{o.gpus} and {large} GPUs, the modes": modes,
        f"{o.gpus} GPUs, the run script's split": by_part,
        f"{o.gpus} GPUs, the best split at each depth": by_split,
        f"{o.gpus} and {large} GPUs, the best splits, f2b": by_size,
        f"{o.steps} steps on {o.gpus} GPUs, one split throughout": runs,
    }


INPUTS: dict[str, tuple[Any, str]] = {
    # models
    "student": (8.2, "parameters of the student, in billions"),
    "student-kv": (147_456, "bytes of its cache per token: 36 layers x 8 heads x 128 x 2 x 2 bytes"),
    "teacher": (32.8, "parameters of the teacher, in billions"),
    # GPUs
    "gpus": (8, "GPUs in all; the larger case is 8 times as many"),
    "actor-gpus": (4, "of them for training in the run script"),
    "teacher-gpus": (2, "of them for the teacher in the run script; the rest are the student's engines"),
    "peak-tflops": (989.0, "peak of one GPU in bfloat16"),
    "bandwidth-tb": (3.35, "its memory bandwidth in TB/s"),
    "memory-gb": (80.0, "its memory"),
    "training-mfu": (0.35, "share of the peak that training reaches"),
    "prefill-mfu": (0.5, "share of the peak that prefill and scoring reach"),
    "bandwidth-share": (0.7, "share of the bandwidth that decoding reaches"),
    "tp-efficiency": (0.8, "of an engine, for each doubling of its GPUs"),
    "token-overhead-ms": (1.0, "of an engine per decoded token: scheduling, sampling"),
    "fixed-s": (4.0, "of a step: weights pushed, batch shipped, optimizer"),
    "switch-s": (12.0, "of a colocated step: training and engines give up and take back memory"),
    # episodes
    "batch": (16, "episodes per step"),
    "horizon": (30, "T, in turns"),
    "prompt": (500, "tokens of the first context"),
    "sampled": (80, "tokens that the student samples per turn"),
    "note": (2000, "tokens of the note that the student's engines score behind, with TEACHER=self"),
    "observed": (200, "tokens of an observation with its admissible actions"),
    "success": (0.5, "share of the episodes that are won where the depth allows it"),
    "solved-turns": (9, "turns that a win takes, and those of a demonstration"),
    "slack": (2, "b2f's turns beyond k"),
    "step-ms": (10.0, "one environment step"),
    "reset-ms": (200.0, "one environment reset"),
    "env-processes": (16, "processes of the pool with a core each"),
    "eta": (5, "steps per turn of depth"),
    "steps": (250, "of a run"),
}


def main() -> None:
    options = report.options(__doc__, INPUTS)
    found = tables(options)
    for title, rows in found.items():
        print(f"{title}\n{report.table(rows)}\n")
    rows = [{"table": title, **row} for title, rows in found.items() for row in rows]
    print(f"written to {report.write('scale', rows, inputs=vars(options))}")


if __name__ == "__main__":
    main()
