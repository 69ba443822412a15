"""What a curriculum saves: tokens and wall time of the three arms at equal numbers of updates.

Real training runs of the smoke run's arms (real SGLang, real ALFWorld games, tiny models) from the same damaged
checkpoint on the same games, 20 updates of 16 episodes each: F2B and B2F to the end of their schedules, OPD at the
full horizon throughout. The student recovers, and the episodes of all arms get shorter with it; with --frozen it
does not learn: what the schedules alone save while a student does not solve its tasks.

The numbers are those of the runs' own metrics.jsonl, summed over the updates:

    steps      environment steps, replayed ones included
    sampled    tokens that the student sampled: what is trained on
    scored     response tokens with a teacher's score
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from benchmarks import report
from smoke import hooks, make_games, make_models, run
from smoke.servers import HERE, Process, SGLangServer
from smoke.train_arm import option_parser

ARMS = ("opd", "f2b", "b2f")
GAMES, BATCH = 64, option_parser().get_default("batch")


def train(arm: str, options: Any, student: Path, ports: list[int]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    run_dir = options.out / arm
    settings = yaml.safe_load((HERE / "configs" / f"{'b2f' if arm == 'b2f' else 'f2b'}.yaml").read_text())
    config = options.out / f"{arm}.yaml"
    config.write_text(yaml.safe_dump({**settings, "tcod_variant": arm}))
    command = [sys.executable, "-m", "smoke.train_arm", "--config", config, "--student", student]
    command += ["--data", options.out, "--run-dir", run_dir, "--student-port", ports[0], "--teacher-port", ports[1]]
    command += ["--updates", options.updates, "--skip-first-evaluation"] + (["--lr", 0] if options.frozen else [])
    env = {"SMOKE_GAMES": str(options.out), "PYTHONPATH": hooks.python_path()}
    with Process(f"{arm} training", [str(part) for part in command], run_dir / "train.log", env) as process:
        process.popen.wait()
        process.check()
    return run.new_lines(run_dir / "metrics.jsonl", 0)


def costs(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Per update."""
    rollouts = [line for line in lines if line["kind"] == "rollout"]
    times = [(line["rollout/tcod/rollout_s"], line["train/s"]) for line in rollouts]
    return {
        "depth": [line["rollout/tcod/k"] for line in rollouts],
        "success": [line["rollout/tcod/success"] for line in rollouts],
        "steps": [BATCH * line["rollout/tcod/turns/total"] for line in rollouts],
        "sampled": [line["rollout/tcod/tokens/trained"] for line in rollouts],
        "scored": [line["rollout/tcod/tokens/scored"] for line in rollouts],
        "rollout s": [rollout_s for rollout_s, _ in times],
        "training s": [train_s for _, train_s in times],
        "wall s": [sum(both) for both in times],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens and wall time of the three arms at equal updates.")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--frozen", action="store_true", help="a student that does not learn")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "curriculum_cost", help="games, models, runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    make_games.make_games(options.out, GAMES, 1)
    weak = options.out / "student"
    if not (weak / "model.safetensors").exists():
        make_models.make_student(make_models.SHIPPED, weak, seed=1)
    with ExitStack() as stack:
        student = stack.enter_context(SGLangServer("student server", weak, options.out / "student.log"))
        teacher = stack.enter_context(SGLangServer("teacher server", make_models.SHIPPED, options.out / "teacher.log"))
        student.wait_ready()
        teacher.wait_ready()
        updates = {arm: costs(train(arm, options, weak, [student.port, teacher.port])) for arm in ARMS}
    rows = []
    for arm, of in updates.items():
        row: dict[str, Any] = {"arm": arm, "success at the end": of["success"][-1]}
        for what in ("steps", "sampled", "scored", "rollout s", "training s", "wall s"):
            row |= {what: sum(of[what]), f"{what} / opd": sum(of[what]) / sum(updates["opd"][what])}
        rows.append(row)
    print(report.table(rows))
    variant = "frozen" if options.frozen else ""
    print(f"written to {report.write('curriculum_cost', rows, variant, episodes=BATCH, updates=updates)}")


if __name__ == "__main__":
    main()
