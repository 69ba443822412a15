"""Made-up transcripts, as saved_episodes.py writes them."""

import json
from pathlib import Path
from typing import Any

PLACES = ("cabinet 1", "countertop 2", "drawer 3", "fridge 1", "shelf 2", "sinkbasin 1")
HOSTILE = "</script><script>window.broken = 1</script><!-- <img src=x onerror='window.broken = 1'>"
HOSTILE += " \u2028 \ud800 \u202e \x1b[31m 🐢"


def made_up(
    number: int, n: int = 0, task: int | None = None, turns: int = 4, replayed: int = 0, **more: Any
) -> dict[str, Any]:
    """Transcript `number` of rollout n. The same arguments give the same one."""
    task = number if task is None else task
    played = [_turn(number, turn, turn < replayed) for turn in range(turns)]
    played[0]["context"][0] = "<|im_start|>system\nYou are in a house.<|im_end|>\n<|im_start|>user\n"
    return {
        **{"arm": "f2b", "dataset": "train", "n": n, "index": number, "k": turns - replayed, "replayed": replayed},
        **{"task": json.dumps({"game_file": f"games/{task}.tw-pddl"}), "task_type": ("put", "heat", "cool")[task % 3]},
        **{"goal": f"put a clean plate in {PLACES[task % 6]} ({task}).", "budget": turns - replayed},
        **{"won": number % 2 == 0, "failure": None, "outcome": "Nothing happens.", "turns": played},
        **{"kl": sum(turn["kl"] for turn in played[replayed:]), **more},
    }


def save(folder: Path, episodes: list[dict[str, Any]], name: str = "train_000000") -> Path:
    """Write a run directory with these transcripts in one file."""
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(episode) + "\n" for episode in episodes)
    (folder / "rollouts" / f"{name}.jsonl").write_text(text)
    return folder


def _turn(number: int, turn: int, replayed: bool) -> dict[str, Any]:
    action = f"go to {PLACES[(number + turn) % 6]}"
    said = ["I ", "should ", "look ", f"<action>{action}</action><|im_end|>"]
    one = {"turn": turn, "observation": f"You see a plate.\nActions: {', '.join(PLACES)}", "action": action}
    one |= {"context": ["\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"], "context_tokens": 40}
    if replayed:
        return {**one, "role": "replayed", "response": "".join(said), "response_tokens": 4}
    student = [-0.125 * (i + 1) for i in range(4)]
    kls = [(7 * number + 3 * turn + 5 * i) % 11 / 4 - 1 for i in range(4)]
    teacher = [score - kl for score, kl in zip(student, kls, strict=True)]
    numbers = {"tokens": said, "student": student, "teacher": teacher, "kl": sum(kls), "response_tokens": 4}
    return {**one, "role": "student", **numbers}
