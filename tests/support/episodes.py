"""Made-up transcripts, as episode_log.py saves them, in any number and size."""

import json
import random
from pathlib import Path
from typing import Any

PLACES = ("cabinet 1", "countertop 2", "drawer 3", "fridge 1", "shelf 2", "sinkbasin 1")
WORDS = "I should look for the clean plate first and then go to where it belongs".split()


def made_up(
    number: int, n: int = 0, task: int | None = None, turns: int = 4, words: int = 8, **more: Any
) -> dict[str, Any]:
    """Transcript `number`, of so many turns with so many words of thought. The same arguments give the same one."""
    rng = random.Random(f"{number} {n} {task}")
    replayed = more.pop("replayed", 0)
    played = [_turn(rng, turn, words, turn < replayed) for turn in range(turns)]
    spans = [{"role": "prompt", "count": 60, "text": "<|im_start|>system\nYou are in a house.<|im_end|>\n"}]
    for turn in played:
        spans.append(_span(turn, rng))
        spans.append({"role": "prompt" if turn["turn"] < replayed else "context", "count": 40, "text": "\nNext: "})
    total = sum(turn.get("kl") or 0.0 for turn in played)
    task = number if task is None else task
    record = {
        **{"task": {"game_file": f"games/{task}.tw-pddl"}, "task_type": ("put", "heat", "cool")[task % 3]},
        **{
            "goal": f"put a clean plate in {PLACES[task % 6]} ({task}).",
            "index": number,
            "n": n,
            "k": turns - replayed,
        },
        **{"evaluation": False, "replayed": replayed, "budget": turns - replayed, "won": number % 2 == 0},
        **{"failure": None, "detail": "", "unscored": None, "context_limited": False, "outcome": "Nothing happens."},
        **{"arm": "f2b", "dataset": "train", "kl": round(total, 4), "turns": played, "spans": spans},
    }
    return {**record, **more}


def save(folder: Path, episodes: list[dict[str, Any]], name: str = "train_000000") -> Path:
    """Write a run directory with these transcripts in one file."""
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(episode) + "\n" for episode in episodes)
    (folder / "rollouts" / f"{name}.jsonl").write_text(text)
    return folder


def _turn(rng: random.Random, turn: int, words: int, replayed: bool) -> dict[str, Any]:
    action = f"go to {rng.choice(PLACES)}"
    thought = " ".join(rng.choices(WORDS, k=words))
    shown = f"You arrive at {rng.choice(PLACES)}. On it you see a plate.\nAdmissible actions: {', '.join(PLACES * 4)}"
    common = {"turn": turn, "observation": shown, "action": action}
    common["response"] = f"{thought} <action>{action}</action><|im_end|>"
    if replayed:
        return {**common, "role": "replayed"}
    judged = {"valid": True, "admissible": True, "cut": False, "weight_version": "0"}
    return {**common, "role": "student", **judged, "kl": None}


def _span(turn: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Its numbers, which also give the turn its KL."""
    pieces = [f"{word} " for word in turn["response"].split(" ")]
    if turn["role"] == "replayed":
        return {"role": "replayed", "turn": turn["turn"], "count": len(pieces), "text": "".join(pieces)}
    student = [round(-rng.expovariate(3), 4) for _ in pieces]
    teacher = [round(value - rng.gauss(0.2, 1.0), 4) for value in student]
    turn["kl"] = round(sum(student) - sum(teacher), 4)
    numbers = {"student": student, "teacher": teacher}
    return {"role": "sampled", "turn": turn["turn"], "count": len(pieces), "tokens": pieces, **numbers}
