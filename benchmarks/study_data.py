"""The study's games and students: functions of the teacher and of seeds, made once in its working folder."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from benchmarks.study_arms import CONTEXT_LEN, GAMES, KEPT, NOTE_GAMES, OPD, RESPONSE_LEN, SETTINGS, Job
from examples.tcod.model.chat_tokens import ChatTokens
from smoke import hooks, lessons, make_games, make_models, note_teacher, plays
from smoke.servers import Process, SGLangServer

TRAIN_GAMES = 128
HELDOUT_GAMES = max(games for games, _ in GAMES.values())

# The late student: the teacher, trained on with the first turns of the scripted searcher until it has lost the later
# ones. The weak one: the teacher after training steps on random actions; the damaged one: after fewer.
STUDENT_TURNS, STUDENT_STEPS, STUDENT_RATE = 4, 300, 3e-3
STUDENT_GAMES = 80  # games that neither the teacher nor any arm has seen, several demonstrations of each
DAMAGES = {"weak": [1e-3] * 40, "damaged": [1e-3] * 8}


def child_environment(out: Path) -> dict[str, str]:
    return {"SMOKE_GAMES": str(out / "games"), "PYTHONPATH": hooks.python_path(), "OMP_NUM_THREADS": "1"}


def make_data(out: Path, teacher: SGLangServer) -> None:
    """Games and demonstrations in the folders of GAMES: train.jsonl, heldout.jsonl and heldout_kl.jsonl.

    A training game, for every arm, is one that the teacher solved in a single episode, which is its demonstration.
    """
    if all((out / name).exists() for name in GAMES):
        return
    games = out / "games"
    make_games.make_games(games, TRAIN_GAMES, HELDOUT_GAMES)
    config = plays.write_settings(out / "demonstrations.yaml", {**SETTINGS, **OPD})
    command = [sys.executable, "-m", "examples.tcod.tools.collect_demos", "--out", str(out / "demos.jsonl")]
    command += ["--rows", str(games / "train.jsonl"), "--url", teacher.url, "--model", str(make_models.SHIPPED)]
    command += ["--samples", "1", "--max-turn-len", str(RESPONSE_LEN), "--max-context-len", str(CONTEXT_LEN)]
    command += ["--config", str(config), "--concurrency", "32"]
    with Process("demonstrations", command, out / "logs" / "demonstrations.log", child_environment(out)) as process:
        process.popen.wait()
        process.check()
    demos = (out / "demos.jsonl").read_text().splitlines(keepends=True)
    train = [line for line in demos if json.loads(line)["metadata"]["demo"]["actions"]]
    for name, sizes in GAMES.items():
        write_rows(out, name, train, sizes)


def make_note_data(out: Path) -> None:
    """Games with the planner's demonstrations in the folders of NOTE_GAMES, and what the environment says in them."""
    if all((out / name).exists() for name in NOTE_GAMES):
        return
    games, offset = out / "games", len(make_games.goals(make_games.SIMPLE)) // 2
    make_games.make_games(games, TRAIN_GAMES, HELDOUT_GAMES)
    plays.record(games, {**SETTINGS, **OPD, "tcod_data_root": str(games)})
    rows = [json.loads(line) for line in (games / "train.jsonl").read_text().splitlines()]
    # Goals take turns, those of a thing side by side: so far off, it is about another thing.
    others = [
        row | {"metadata": {**row["metadata"], "demo": other["metadata"]["demo"]}}
        for row, other in zip(rows, [*rows[offset:], *rows[:offset]], strict=True)
    ]
    for (name, sizes), train in zip(NOTE_GAMES.items(), (rows, others), strict=True):
        write_rows(out, name, [json.dumps(row) + "\n" for row in train], sizes)


def write_rows(out: Path, name: str, train: list[str], sizes: tuple[int, int]) -> None:
    """A folder of rows: these to train on, and so many held-out games at temperatures 0.4 and 1."""
    heldout = (out / "games" / "heldout.jsonl").read_text().splitlines(keepends=True)
    partial = out / f"{name}.partial"
    partial.mkdir(exist_ok=True)
    for file, lines in {"train": train, "heldout": heldout[: sizes[0]], "heldout_kl": heldout[: sizes[1]]}.items():
        (partial / f"{file}.jsonl").write_text("".join(lines))
    shutil.rmtree(out / name, ignore_errors=True)
    partial.rename(out / name)


def cost_of_demonstrations(out: Path) -> dict[str, int]:
    """The environment's steps in all the episodes that the teacher played for them, and its tokens in those it won."""
    entries = [json.loads(line) for line in (out / "demos.journal.jsonl").read_text().splitlines()]
    played = [entry for entry in entries if "turns" in entry]
    tokens = sum(len(ids) for entry in played for ids in entry.get("ids", ()))
    return {"demonstration_steps": sum(entry["turns"] for entry in played), "demonstration_tokens": tokens}


def run_folder(out: Path, games: str, name: str) -> Path:
    """The working folder of a job."""
    return out / "runs" / games / name


def student_of(out: Path, job: Job) -> Path:
    """The checkpoint that a job begins with. Raises RuntimeError where another job's weights are gone."""
    if job.first is None:
        return make_student(out, job.arm.student, job.seed)
    kept = run_folder(out, job.games, job.first) / KEPT
    if not kept.exists():
        raise RuntimeError(f"{kept} is gone: move {job.first}.json away, and {job.first} is run again")
    return kept


def make_student(out: Path, kind: str, seed: int) -> Path:
    """The folder of a student of STUDENTS, which is made where it is not there yet."""
    if kind == "teacher":
        return make_models.SHIPPED
    folder = out / "students" / (kind if kind == "reader" else f"{kind}-{seed}")
    if folder.exists():
        return folder
    print(f"training the {kind} student of seed {seed}", flush=True)
    torch.set_num_threads(os.cpu_count() or 1)
    model, tokenizer = make_models.load(make_models.SHIPPED)
    if kind == "reader":
        note_teacher.learn(model, tokenizer)
    elif kind in DAMAGES:
        make_models.damage(model, tokenizer, seed, DAMAGES[kind])
    else:
        lose_late_turns(model, ChatTokens(tokenizer, make_models.CHAT), seed)
    partial = folder.with_name(f"{folder.name}.partial")
    make_models.save(model, tokenizer, partial)
    partial.rename(folder)
    return folder


def lose_late_turns(model: torch.nn.Module, chat: ChatTokens, seed: int) -> None:
    """STUDENT_STEPS steps on the first STUDENT_TURNS turns of the teacher's kind of demonstrations."""
    first = make_models.GAMES + 1000 * seed
    plays = lessons.demonstrations(range(first, first + STUDENT_GAMES))
    examples = [lessons.encode(chat, text, steps[:STUDENT_TURNS]) for text, steps in plays]
    make_models.train(model, lessons.batches(examples, seed), [STUDENT_RATE] * STUDENT_STEPS)
