"""The gradient step that slime makes with Megatron, in plain PyTorch: its OPD advantage and policy loss, or imitation.

It takes the batch fields that slime ships to Megatron and follows slime's arithmetic for its default settings:
advantage estimator grpo, one optimizer step per rollout, the loss one of the three means that
examples/tcod/training/turn_mean.py describes. Without a teacher's log-probs the reward alone is trained on. A batch
that nobody sampled is imitated: slime's sft_loss. Megatron's Adam decouples its weight decay, as torch's AdamW does.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from examples.tcod.training.turn_mean import turn_weights
from smoke import cpu_only

cpu_only.prepare()


def response_log_probs(model: torch.nn.Module, tokens: list[int], response_length: int) -> torch.Tensor:
    """log pi(token | prefix) of the last response_length tokens of a sequence, [response_length]."""
    ids = torch.tensor([tokens])
    predicting = model(input_ids=ids).logits[0, -response_length - 1 : -1].float()
    return torch.log_softmax(predicting, dim=-1).gather(-1, ids[0, -response_length:, None])[:, 0]


def opd_advantage(
    log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, reward: float, kl_coef: float
) -> torch.Tensor:
    """A = reward - kl_coef * (log pi_student - log pi_teacher) per token, slime's grpo advantage with its penalty."""
    return reward - kl_coef * (log_probs - teacher_log_probs)


def policy_loss(log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """-A pi / pi_old per token, [tokens]. pi_old is pi in a rollout's one step, where slime's clip never binds."""
    return -(log_probs - log_probs.detach()).exp() * advantages


def token_weights(masks: list[torch.Tensor], loss: str, trajectories: list[int]) -> list[torch.Tensor]:
    """What each response token weighs in the loss, for the masks of a batch (not 0 where a token is trained).

    `trajectories` has the trajectory of each sample. What a token weighs: "trajectory" 1 / (B n), "token" 1 / (all
    trained tokens), "turn" 1 / (N l), see examples/tcod/training/turn_mean.py.
    """
    parts = [turn_weights(mask) if loss == "turn" else (mask != 0).float() for mask in masks]
    if loss == "trajectory":
        lengths: Counter[int] = Counter()
        for part, trajectory in zip(parts, trajectories, strict=True):
            lengths[trajectory] += int(part.sum())
        parts = [part / lengths[trajectory] for part, trajectory in zip(parts, trajectories, strict=True)]
    total = sum(part.sum() for part in parts)
    return [part / total for part in parts]


class Trainer:
    """A student under training.

    Args:
        checkpoint: folder of its Hugging Face checkpoint.
        lr: learning rate of Adam (betas 0.9 and 0.98 as in slime's scripts, no weight decay), constant.
        loss: what it is a mean over, see token_weights.
        kl_coef, clip_grad: slime's --opd-kl-coef and --clip-grad.
    """

    def __init__(
        self, checkpoint: Path, lr: float, loss: str = "trajectory", kl_coef: float = 1.0, clip_grad: float = 1.0
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.model.eval()  # no dropout, as in slime's runs
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.loss, self.kl_coef, self.clip_grad = loss, kl_coef, clip_grad

    def step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimizer step on slime's batch fields. Returns loss, grad_norm (before clipping), and means of the
        reverse KL and of |training - rollout| log-prob, as far as there are these log-probs, over trajectories
        whatever the loss is a mean over."""
        fields = [name for name in ("teacher_log_probs", "rollout_log_probs", "loss_masks") if name in batch]
        values = {name: [torch.tensor(row, dtype=torch.float32) for row in batch[name]] for name in fields}
        weights = token_weights(values["loss_masks"], self.loss, batch["rollout_ids"])
        shares = token_weights(values["loss_masks"], "trajectory", batch["rollout_ids"])
        totals: Counter[str] = Counter()
        self.optimizer.zero_grad()
        for i, tokens in enumerate(batch["tokens"]):
            log_probs = response_log_probs(self.model, tokens, batch["response_lengths"][i])
            if "rollout_log_probs" in fields:
                old = log_probs.detach()
                teacher = values["teacher_log_probs"][i] if "teacher_log_probs" in fields else old
                advantage = opd_advantage(old, teacher, batch["rewards"][i], self.kl_coef)
                loss = (weights[i] * policy_loss(log_probs, advantage)).sum()
                totals["opd_reverse_kl"] += (shares[i] * (old - teacher)).sum().item()
                totals["logprob_abs_diff"] += (shares[i] * (old - values["rollout_log_probs"][i]).abs()).sum().item()
            else:
                loss = -(weights[i] * log_probs).sum()
            loss.backward()
            totals["loss"] += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        return {**totals, "grad_norm": norm.item()}

    def save(self, folder: Path) -> None:
        """Write the weights and their configuration, without a tokenizer."""
        self.model.save_pretrained(folder)
