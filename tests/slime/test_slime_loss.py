"""What slime trains on our samples, token by token: needs SLIME_DIR and MEGATRON_DIR.

Episodes of a scripted engine go through slime's own conversion, data-parallel split, advantages and policy loss, in
gloo groups of one and two processes with Megatron's real parallel state.
"""

import os
import subprocess
import sys
from argparse import Namespace

import pytest

if not (os.environ.get("SLIME_DIR") and os.environ.get("MEGATRON_DIR")):
    pytest.skip(
        "slime's loss: run with SLIME_DIR=/path/to/slime MEGATRON_DIR=/path/to/Megatron-LM", allow_module_level=True
    )


import torch

from smoke import hooks, make_models, train_arm, train_slime
from smoke.trainer import clipped_policy_loss, opd_advantages
from tests.support.rig import LEFT, RIGHT
from tests.support.toys import random_logits, response_log_probs

NUM_GPUS = 0
# No worker processes.
pytestmark = pytest.mark.usefixtures("local_pool")


def flags(folder, batch):
    """The flags of train_slime.py for a batch of this size; nothing that they point to is used."""
    options = train_arm.option_parser().parse_args(
        ["--config", str(folder / "tcod.yaml"), "--student", str(make_models.SHIPPED), "--student-port", "9"]
        + ["--teacher-port", "9", "--data", str(folder), "--run-dir", str(folder), "--batch", str(batch)]
    )
    options = Namespace(**vars(options), data_parallel=1)
    settings = {**train_slime.model_settings(make_models.SHIPPED), **train_slime.slime_settings(options)}
    # No engines: slime would ask them for their sizes.
    del settings["rollout-external-engine-addrs"]
    return train_slime.as_flags({**settings, **train_slime.CPU_SETTINGS})


@pytest.mark.parametrize("world", [1, 2])
def test_advantage_and_gradient_of_every_token(rig, tmp_path, world):
    rig.script = [RIGHT, "not an action", LEFT, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT]
    rows = [{"goal": goal, "demo": {"actions": ["right"] * goal}} for goal in (1, 2, 3, 4)] * 2
    samples, _ = rig.rollout(rows, 1, tcod_variant="b2f", tcod_horizon=8)
    assert len({len(sample.tokens) for sample in samples}) > 2
    torch.save([sample.to_dict() for sample in samples], tmp_path / "samples.pt")

    env = {**os.environ, "PYTHONPATH": hooks.python_path(os.environ["MEGATRON_DIR"])}
    env |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    command = [sys.executable, "-m", "tests.support.slime_loss", str(tmp_path / "samples.pt")]
    ranks = [
        subprocess.Popen(
            [*command, str(tmp_path / f"out{r}.pt"), str(r), str(world), str(tmp_path / "store"), *flags(tmp_path, 8)],
            env=env,
        )
        for r in range(world)
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0] * world
    outs = [torch.load(tmp_path / f"out{r}.pt") for r in range(world)]
    results = {i: values for out in outs for i, values in out["samples"].items()}
    assert sorted(results) == [sample.index for sample in samples]
    assert {len(out["samples"]) for out in outs} == {8 // world}

    vocab, total = train_slime.model_settings(make_models.SHIPPED)["vocab-size"], 0.0
    for sample in samples:
        logits = random_logits(sample.index, len(sample.tokens), vocab).requires_grad_()
        log_probs = response_log_probs(sample.tokens, sample.response_length, logits)
        mask = torch.tensor(sample.loss_mask)
        [advantage] = opd_advantages([log_probs.detach()], [torch.tensor(sample.teacher_log_probs)], [0.0], 1.0)
        got = results[sample.index]
        torch.testing.assert_close(got["advantages"][mask == 1], advantage[mask == 1], rtol=1e-5, atol=1e-6)
        loss = clipped_policy_loss(log_probs, log_probs.detach(), advantage, 0.2, 0.2)
        loss = (loss * mask).sum() / mask.sum()
        loss.backward()
        total += loss.item() / len(samples)
        # Each position's logits predict the next token: rows before untrained tokens, and the prompt's, move nothing.
        predicts_trained = torch.zeros(len(sample.tokens), dtype=torch.bool)
        predicts_trained[-sample.response_length - 1 : -1] = mask == 1
        moved = got["gradient"].abs().sum(-1) > 0
        assert torch.equal(moved, predicts_trained)
        scale = (got["gradient"].norm() / logits.grad.norm()).item()
        torch.testing.assert_close(got["gradient"], logits.grad * scale, rtol=1e-4, atol=1e-7)
    assert sum(out["loss"] for out in outs) / world == pytest.approx(total, rel=1e-5)
