"""The smoke run with models that think: real SGLang, real ALFWorld, both arms, and what they leave behind."""

import json
import os
import subprocess
import sys

import pytest

from smoke import hooks

KL = "eval/tcod/heldout_t1/kl/token"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_student_that_thinks_learns_and_later_prompts_have_no_thoughts(tmp_path):
    env = os.environ | {"PYTHONPATH": hooks.python_path(), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "smoke.run", "--thoughts", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    runs = {arm: tmp_path / "runs" / f"alfworld-thoughts-{arm}-1" for arm in ("f2b", "b2f")}
    before, *_, after = lines(runs["f2b"] / "metrics.jsonl")
    assert after[KL] < 0.7 * before[KL]  # b2f's five updates end before its student plays much
    for run_dir in runs.values():
        saved = [one for file in sorted(run_dir.glob("rollouts/train_*.jsonl")) for one in lines(file)]
        assert len(saved) == 5 * 8
        thoughts = []
        for episode in saved:
            played = [turn for turn in episode["turns"] if turn["role"] == "student"]
            assert not any("</think>" in text for turn in played for text in turn["context"])
            assert all(len(turn["student"]) == len(turn["teacher"]) == turn["response_tokens"] for turn in played)
            thoughts += ["".join(turn["tokens"]).startswith("<think>\n") for turn in played]
        assert sum(thoughts) > 0.9 * len(thoughts)
