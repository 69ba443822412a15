"""The smoke run's gradient step against a plain, unbatched computation of slime's loss."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from smoke.slime_cpu.compare import outside
from smoke.trainer import Trainer, clipped_policy_loss, response_log_probs
from tests.support.toys import token_weights

NUM_GPUS = 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=50, head_dim=16, intermediate_size=64, max_position_embeddings=128, **shape)
    folder = tmp_path_factory.mktemp("checkpoint")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def batch_of(count: int, seed: int = 0) -> dict:
    """Random trajectories in slime's batch fields: different lengths, holes in the masks, some rewards."""
    rng = random.Random(seed)
    batch = {name: [] for name in ("tokens", "response_lengths", "rewards", "loss_masks")}
    batch |= {"teacher_log_probs": [], "rollout_log_probs": [], "rollout_ids": list(range(count))}
    for _ in range(count):
        prompt, response = rng.randint(2, 20), rng.randint(3, 30)
        batch["tokens"].append([rng.randrange(50) for _ in range(prompt + response)])
        batch["response_lengths"].append(response)
        batch["rewards"].append(rng.choice([0.0, 0.5]))
        batch["loss_masks"].append([1] + [rng.randint(0, 1) for _ in range(response - 1)])
        batch["teacher_log_probs"].append([-rng.uniform(0, 8) for _ in range(response)])
        batch["rollout_log_probs"].append([-rng.uniform(0, 8) for _ in range(response)])
    return batch


def reference(model, batch: dict, kl_coef: float, loss: str):
    """(loss, gradients), token by token: A = reward - c (log pi - log teacher), -A pi / pi_old, weighted."""
    total = torch.zeros(())
    weights = token_weights(batch["loss_masks"], loss)
    for i, ids in enumerate(batch["tokens"]):
        response = batch["response_lengths"][i]
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        for j in range(response):
            position = len(ids) - response + j
            value = log_probs[position - 1, ids[position]]
            advantage = batch["rewards"][i] - kl_coef * (value.item() - batch["teacher_log_probs"][i][j])
            if batch["loss_masks"][i][j]:
                total = total - weights[i][j] * advantage * torch.exp(value - value.item())
    model.zero_grad()
    total.backward()
    return total.item(), [parameter.grad.clone() for parameter in model.parameters()]


def gradients_of_step(trainer: Trainer, batch: dict):
    """(metrics, gradients) of a step without clipping; the optimizer's own move is left out."""
    trainer.optimizer.step = lambda: None
    metrics = trainer.step(batch)
    return metrics, [parameter.grad.clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("loss", ["trajectory", "token", "turn"])
@pytest.mark.parametrize("kl_coef", [1.0, 0.3])
def test_loss_and_gradient_equal_the_plain_computation(checkpoint, kl_coef, loss):
    batch = batch_of(11)  # more than one micro-batch
    trainer = Trainer(checkpoint, lr=1e-3, loss=loss, kl_coef=kl_coef, clip_grad=1e9)
    metrics, gradients = gradients_of_step(trainer, batch)
    value, expected = reference(Trainer(checkpoint, lr=0.0).model, batch, kl_coef, loss)
    assert metrics["loss"] == pytest.approx(value, rel=1e-4)
    norm = torch.sqrt(sum((g**2).sum() for g in expected)).item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6 * norm)


def test_masks_that_count_turns_change_nothing(checkpoint):
    # post_process_rewards leaves such masks when slime's flags choose the mean over turns.
    batch = batch_of(5)
    counted = {**batch, "loss_masks": [[17 * trained for trained in mask] for mask in batch["loss_masks"]]}
    for loss in ("trajectory", "token", "turn"):
        runs = [gradients_of_step(Trainer(checkpoint, lr=1e-3, loss=loss), one) for one in (batch, counted)]
        assert runs[0][0] == runs[1][0]


def test_untrained_tokens_have_no_influence(checkpoint):
    batch = batch_of(5)
    changed = {**batch, "teacher_log_probs": [list(values) for values in batch["teacher_log_probs"]]}
    for values, mask in zip(changed["teacher_log_probs"], batch["loss_masks"], strict=True):
        values[:] = [value if trained else -99.0 for value, trained in zip(values, mask, strict=True)]
    runs = [gradients_of_step(Trainer(checkpoint, lr=1e-3), one) for one in (batch, changed)]
    assert runs[0][0] == runs[1][0]
    for first, second in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(first, second)


def test_a_teacher_that_agrees_moves_nothing(checkpoint):
    trainer = Trainer(checkpoint, lr=1e-2)
    batch = {**batch_of(4), "rewards": [0.0] * 4}
    with torch.no_grad():
        own = response_log_probs(trainer.model, batch["tokens"], batch["response_lengths"])
    batch["teacher_log_probs"] = [values.tolist() for values in own]
    metrics = trainer.step(batch)
    assert metrics["opd_reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(0, abs=1e-4)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=6), st.floats(0.05, 0.5))
def test_the_clip_is_ppos(pairs, eps):
    log_ratio, advantage = (torch.tensor(values) for values in zip(*pairs, strict=True))
    got = clipped_policy_loss(log_ratio, torch.zeros_like(log_ratio), advantage, eps, eps)
    for value, ratio, a in zip(got.tolist(), log_ratio.exp().tolist(), advantage.tolist(), strict=True):
        assert value == pytest.approx(-min(ratio * a, max(min(ratio, 1 + eps), 1 - eps) * a), rel=1e-4, abs=1e-5)


def test_adams_first_change_is_known_as_well_as_its_gradient():
    """Of gradients around Adam's epsilon a rounding error moves the step far; of larger ones it does not."""
    gradient = torch.tensor([0.0, 3e-9, -2e-8, 1e-6, -1e-3, 0.1])
    parameter = torch.nn.Parameter(torch.zeros(6))
    parameter.grad = gradient + 1e-9
    torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0).step()
    change = parameter.detach()
    assert outside(change, gradient, 1e-3, rounding=1e-7).max() < 1e-9
    assert outside(change, gradient, 1e-3, rounding=0.0)[1] > 1e-5  # a good part of the learning rate
    assert (outside(-change, gradient, 1e-3, rounding=1e-7)[3:] > 1e-3).all()
    assert (outside(1.01 * change, gradient, 1e-3, rounding=1e-7)[3:] > 9e-6).all()
