"""What slime trains on our samples, token by token, under each of the three losses: needs SLIME_DIR and MEGATRON_DIR.

Episodes of a scripted engine go through slime's own conversion, data-parallel split, advantages, policy loss and
training step, in gloo groups with Megatron's real parallel state, schedule and gradient buffers. The gradient at every
logit, and the loss that slime logs, equal a computation by hand.
"""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections import Counter

import pytest

if not (os.environ.get("SLIME_DIR") and os.environ.get("MEGATRON_DIR")):
    pytest.skip(
        "slime's loss: run with SLIME_DIR=/path/to/slime MEGATRON_DIR=/path/to/Megatron-LM", allow_module_level=True
    )


import torch

from smoke import hooks, make_models, train_arm, train_slime
from smoke.trainer import opd_advantage, policy_loss
from tests.support.rig import LEFT, RIGHT
from tests.support.toys import random_logits, response_log_probs, token_weights

# No worker processes.
pytestmark = pytest.mark.usefixtures("local_pool")

LOSSES = ("trajectory", "token", "turn")
LONGEST = 700  # tokens in a dynamic micro-batch: one to three of these episodes
BATCHES = {
    "one at a time": {"micro_batch_size": 1},
    "two at a time": {"micro_batch_size": 2},
    "dynamic": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": LONGEST},
    "two steps": {"micro_batch_size": 2, "global_batch_size": 4},
    "two steps of dynamic ones": {
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": LONGEST,
        "global_batch_size": 4,
    },
}


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


def train_on(samples, folder, cases, world, cp_size):
    """What each rank of a group of this size has done with the samples, by case."""
    torch.save([sample.to_dict() for sample in samples], folder / "samples.pt")
    (folder / "cases.json").write_text(json.dumps(cases))
    env = {**os.environ, "PYTHONPATH": hooks.python_path(os.environ["MEGATRON_DIR"])}
    env |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    command = [
        sys.executable,
        "-m",
        "tests.support.slime_loss",
        str(folder / "samples.pt"),
        str(folder / "cases.json"),
    ]
    layout = [
        str(world),
        str(cp_size),
        str(folder / "store"),
        *flags(folder, len({one.rollout_id for one in samples})),
    ]
    ranks = [
        subprocess.Popen([*command, str(folder / f"out{rank}.pt"), str(rank), *layout], env=env)
        for rank in range(world)
    ]
    assert [process.wait(timeout=600) for process in ranks] == [0] * world
    return [torch.load(folder / f"out{rank}.pt") for rank in range(world)]


def by_hand(samples, loss, vocab, signal, coef):
    """(loss, its gradient at every logit of the batch) of one optimizer step, and each sample's advantages."""
    of_group = {}
    for sample in samples:
        of_group.setdefault(sample.group_index, {})[sample.rollout_id] = sample.reward
    of_group = {group: torch.tensor([*rewards.values()]) for group, rewards in of_group.items()}
    rows = [random_logits(sample.index, len(sample.tokens), vocab).requires_grad_() for sample in samples]
    weights = token_weights([sample.loss_mask for sample in samples], loss, [one.rollout_id for one in samples])
    total, advantages = torch.zeros(()), {}
    for sample, logits, weight in zip(samples, rows, weights, strict=True):
        log_probs = response_log_probs(sample.tokens, sample.response_length, logits)
        rewards, kl_coef = of_group[sample.group_index], float("kl" in signal)
        reward = coef * (sample.reward - rewards.mean()) / (rewards.std() + 1e-6) if coef else 0.0
        advantage = opd_advantage(log_probs.detach(), torch.tensor(sample.teacher_log_probs), reward, kl_coef)
        losses = -log_probs if signal == "imitation" else policy_loss(log_probs, advantage)
        total = total + (losses * weight).sum()
        advantages[sample.index] = advantage
    total.backward()
    return total.item(), [logits.grad for logits in rows], advantages


SIGNALS = {  # slime's arguments beside those of distillation
    "kl": {},
    "kl and reward": {"tcod_reward_coef": 2.0},
    "reward": {"tcod_reward_coef": 0.5, "use_opd": False, "opd_type": None},
    "imitation": {
        "loss_type": "sft_loss",
        "compute_advantages_and_returns": False,
        "use_opd": False,
        "opd_type": None,
    },
}
# (signal, loss, batch) for each history: a sample an episode, and uneven fan-outs of two episodes a group.
CASES = {
    "append": [("kl", loss, batch) for loss in LOSSES for batch in BATCHES],
    "turns": [("kl", loss, batch) for loss in LOSSES for batch in BATCHES if "dynamic" in batch]
    + [(signal, loss, "dynamic") for signal in SIGNALS if signal != "kl" for loss in ("trajectory", "token")],
}


@pytest.mark.parametrize("world, cp_size", [(1, 1), (2, 1), (2, 2)], ids=["one rank", "DP 2", "CP 2"])
@pytest.mark.parametrize("history", CASES)
def test_loss_and_gradient_of_every_token(rig, tmp_path, world, cp_size, history):
    rig.script = [RIGHT, "not an action", LEFT, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT]
    rows = [{"goal": goal, "demo": {"actions": ["right"] * goal}} for goal in (1, 2, 3, 4)] * 2
    per_prompt = {"n_samples_per_prompt": 2, "rollout_batch_size": 4} if history == "turns" else {}
    samples, _ = rig.rollout(rows, 1, tcod_variant="b2f", tcod_horizon=8, tcod_history=history, **per_prompt)
    for position, sample in enumerate(samples):  # siblings share an index, which is only a name from here on
        sample.rollout_id, sample.index = sample.index, position
        sample.reward = float(sample.rollout_id % 2 == 0 or sample.rollout_id == 3)  # both are won in one group
    trajectories = list(dict.fromkeys(sample.rollout_id for sample in samples))
    fan_out = Counter(sample.rollout_id for sample in samples)
    assert len(trajectories) == 8 and (len(set(fan_out.values())) > 1 if history == "turns" else len(samples) == 8)
    assert len({len(sample.tokens) for sample in samples}) > 2
    assert history == "turns" or len({len(sample.metadata["tcod"]["turns"]) for sample in samples}) > 1
    cases = {
        ", ".join(case): {**train_arm.LOSSES[case[1]], **BATCHES[case[2]], **SIGNALS[case[0]]}
        for case in CASES[history]
    }
    outs = train_on(samples, tmp_path, cases, world, cp_size)
    vocab = train_slime.model_settings(make_models.SHIPPED)["vocab-size"]
    assert any(len(set(out["kl, trajectory, dynamic"]["micro_batches"])) > 1 for out in outs)
    for name in cases:
        signal, loss, batch = name.split(", ")
        halves = [trajectories[:4], trajectories[4:]] if "two steps" in batch else [trajectories]
        steps = [[sample for sample in samples if sample.rollout_id in half] for half in halves]
        trained = [
            sample.index for out in outs[::cp_size] for sample in samples if sample.index in out[name]["advantages"]
        ]
        assert sorted(trained) == [sample.index for sample in samples]  # each once
        for number, step in enumerate(steps):
            coef = SIGNALS[signal].get("tcod_reward_coef", 0.0)
            total, gradients, advantages = by_hand(step, loss, vocab, signal, coef)
            assert torch.cat(gradients).abs().max() > 1e-4
            first = sum(len(sample.tokens) for one in steps[:number] for sample in one)
            for out in outs:
                got = out[name]["gradients"][number]
                assert not got[:first].any() and not got[first + sum(map(len, gradients)) :].any()
                got = got[first : first + sum(map(len, gradients))]
                torch.testing.assert_close(got, torch.cat(gradients), rtol=1e-4, atol=1e-9)
                assert out[name]["logged"][number]["loss"] == pytest.approx(total, rel=1e-5)
                if cp_size == 1 and signal != "imitation":
                    for index, values in out[name]["advantages"].items():
                        if index in advantages:
                            torch.testing.assert_close(values, advantages[index], rtol=1e-5, atol=1e-6)
