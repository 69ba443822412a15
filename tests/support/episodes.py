"""Made-up transcripts, as saved_episodes.py writes them, in any number and size."""

import json
import random
from pathlib import Path
from typing import Any

PLACES = ("cabinet 1", "countertop 2", "drawer 3", "fridge 1", "shelf 2", "sinkbasin 1")
HOSTILE = "</script><script>window.broken = 1</script><!-- <img src=x onerror='window.broken = 1'>"
HOSTILE += " \u2028 \ud800 \u202e \x1b[31m 🐢"
WORDS = "I should look for the clean plate first and then go to where it belongs".split()


def made_up(
    number: int, n: int = 0, task: int | None = None, turns: int = 4, words: int = 8, **more: Any
) -> dict[str, Any]:
    """Transcript `number`, of so many turns with so many words of thought. The same arguments give the same one."""
    rng = random.Random(f"{number} {n} {task}")
    replayed = more.pop("replayed", 0)
    played = [_turn(rng, turn, words, turn < replayed) for turn in range(turns)]
    played[0]["context"][0] = "<|im_start|>system\nYou are in a house.<|im_end|>\n<|im_start|>user\n"
    task = number if task is None else task
    return {
        **{"arm": "f2b", "dataset": "train", "n": n, "index": number, "k": turns - replayed},
        **{"task": json.dumps({"game_file": f"games/{task}.tw-pddl"}), "task_type": ("put", "heat", "cool")[task % 3]},
        **{"goal": f"put a clean plate in {PLACES[task % 6]} ({task}).", "replayed": replayed},
        **{"budget": turns - replayed, "won": number % 2 == 0, "failure": None, "outcome": "Nothing happens."},
        **{"kl": round(sum(turn.get("kl") or 0.0 for turn in played), 4), "turns": played, **more},
    }


def save(folder: Path, episodes: list[dict[str, Any]], name: str = "train_000000") -> Path:
    """Write a run directory with these transcripts in one file."""
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(episode) + "\n" for episode in episodes)
    (folder / "rollouts" / f"{name}.jsonl").write_text(text)
    return folder


def _turn(rng: random.Random, turn: int, words: int, replayed: bool) -> dict[str, Any]:
    action = f"go to {rng.choice(PLACES)}"
    said = [f"{word} " for word in rng.choices(WORDS, k=words)] + [f"<action>{action}</action><|im_end|>"]
    shown = f"You arrive at {rng.choice(PLACES)}. On it you see a plate.\nAdmissible actions: {', '.join(PLACES * 4)}"
    common = {"turn": turn, "observation": shown, "action": action, "response_tokens": len(said)}
    common |= {"context": ["\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"], "context_tokens": 40}
    if replayed:
        return {**common, "role": "replayed", "response": "".join(said)}
    student = [round(-rng.expovariate(3), 4) for _ in said]
    teacher = [round(value - rng.gauss(0.2, 1.0), 4) for value in student]
    numbers = {"tokens": said, "student": student, "teacher": teacher, "kl": round(sum(student) - sum(teacher), 4)}
    return {**common, "role": "student", **numbers}
