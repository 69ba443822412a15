"""The smoke run with models that think: real SGLang, real ALFWorld, both arms, and what they leave behind."""

import json
import os
import subprocess
import sys

import pytest

from smoke import hooks

NUM_GPUS = 0


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    env = os.environ | {"PYTHONPATH": hooks.python_path(), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "smoke.run", "--thoughts", "--quick", "--out", str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["f2b", "b2f"])
def test_a_student_that_thinks_learns_and_later_prompts_have_no_thoughts(out, arm):
    run_dir = out / "runs" / f"{arm}-1"
    first, *rollouts, last = lines(run_dir / "metrics.jsonl")
    assert (first["kind"], last["kind"], len(rollouts)) == ("eval", "eval", 5)
    assert last["eval/tcod/heldout_t1/kl/token"] < 0.7 * first["eval/tcod/heldout_t1/kl/token"]
    turns = 0
    for n in range(5):
        for episode in lines(run_dir / "rollouts" / f"train_{n:06d}.jsonl"):
            spans = episode["spans"]
            assert [span["role"] for span in spans] == [
                "prompt",
                "sampled",
                *["context", "sampled"] * (len(spans) // 2 - 1),
            ]
            for shown, said in zip(spans[::2], spans[1::2], strict=True):
                assert "<think>" not in shown["text"] and shown["text"].endswith("<|im_start|>assistant\n")
                assert len(said["teacher"]) == len(said["student"]) == said["count"]
                turns += "".join(said["tokens"]).startswith("<think>\n")
    assert turns > 0.9 * sum(
        turn["role"] == "student"
        for n in range(5)
        for episode in lines(run_dir / "rollouts" / f"train_{n:06d}.jsonl")
        for turn in episode["turns"]
    )
