"""The smoke run's gradient step against a plain, unbatched computation of slime's loss."""

import random

import pytest
import torch

from smoke.make_models import SHIPPED
from smoke.slime_cpu.compare import outside
from smoke.trainer import Trainer
from tests.support.toys import token_weights


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
            advantage = batch["rewards"][i]
            if "teacher_log_probs" in batch:
                advantage -= kl_coef * (value.item() - batch["teacher_log_probs"][i][j])
            if batch["loss_masks"][i][j]:
                ratio = torch.exp(value - value.item())
                total = total - weights[i][j] * (advantage * ratio if "rollout_log_probs" in batch else value)
    model.zero_grad()
    total.backward()
    return total.item(), [parameter.grad.clone() for parameter in model.parameters()]


def gradients_of_step(trainer: Trainer, batch: dict):
    """(metrics, gradients) of a step without clipping; the optimizer's own move is left out."""
    trainer.optimizer.step = lambda: None
    metrics = trainer.step(batch)
    return metrics, [parameter.grad.clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize(
    "loss, kl_coef, without",
    [("trajectory", 1.0, []), ("token", 0.3, []), ("turn", 1.0, []), ("token", 1.0, ["teacher_log_probs"])]
    + [(loss, 1.0, ["teacher_log_probs", "rollout_log_probs"]) for loss in ("trajectory", "token")],
)
def test_loss_and_gradient_equal_the_plain_computation(kl_coef, loss, without):
    """Of distillation; without a teacher of the reward alone; and of what nobody sampled, which is imitated."""
    batch = {name: values for name, values in batch_of(11).items() if name not in without}
    trainer = Trainer(SHIPPED, lr=1e-3, loss=loss, kl_coef=kl_coef, clip_grad=1e9)
    # post_process_rewards leaves such masks where slime's flags choose the mean over turns.
    counted = [[17 * trained for trained in mask] for mask in batch["loss_masks"]]
    metrics, gradients = gradients_of_step(trainer, {**batch, "loss_masks": counted})
    value, expected = reference(Trainer(SHIPPED, lr=0.0).model, batch, kl_coef, loss)
    assert metrics["loss"] == pytest.approx(value, rel=1e-4)
    norm = torch.sqrt(sum((g**2).sum() for g in expected)).item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6 * norm)


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
