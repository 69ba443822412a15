"""The first iteration of a train_slime.py run against transformers and plain PyTorch.

From slime's dump of the first rollout's samples, the smoke run's trainer computes loss, gradient norm and the
parameters' changes in the optimizer step by itself; slime's come from its log and from the checkpoint that it pushed.
All dumped samples are checked as well.

Adam's first change of a parameter is -lr g / (|g| + 1e-8): where the gradient g is not much larger than 1e-8, the
rounding of g alone moves it by a good part of lr. So a change is right between those of the gradients g - d and g + d,
d the rounding of float32 at the whole gradient's norm.
"""

import ast
import itertools
import math
import re
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smoke import hooks
from smoke.trainer import Trainer, response_log_probs

TOLERANCE = 1e-4
ADAM_EPS = 1e-8  # Megatron's and torch's default


def compare(
    run_dir: Path, student: Path, lr: float, teacher: Path | None = None, loss: str = "trajectory", **flags: Any
) -> dict[str, float]:
    """Relative differences of loss, grad_norm and the parameters' change in the first optimizer step.

    With a `teacher`, the samples were scored in Megatron and are scored here by transformers. The parameters are those
    that were pushed through the disk, or what slime saved for Hugging Face (hf/0). `flags` are slime's arguments that
    are not those of distillation.
    """
    args = hooks.rollout_args(**flags)
    samples = dumped_samples(run_dir, teacher, args)
    trainer = Trainer(student, lr=lr, loss=loss)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    ours = trainer.step(hooks.convert_samples_to_train_data(args, samples))
    slime = logged_step(run_dir / "train.log", 0)
    pushed: dict[str, torch.Tensor] = {}
    folder = run_dir / "weights" / "weight_v000002"
    for file in (folder if folder.exists() else run_dir / "hf" / "0").glob("*.safetensors"):
        pushed |= load_file(file)
    gradients = {name: value.grad for name, value in trainer.model.named_parameters()}
    rounding = torch.finfo(torch.float32).eps * min(ours["grad_norm"], trainer.clip_grad)
    wrong, moved = 0.0, 0.0
    for name, value in pushed.items():
        change = value - before[name]
        wrong += outside(change, gradients[name], lr, rounding).square().sum().item()
        moved += change.square().sum().item()
    if moved == 0:
        raise ValueError(f"{folder} holds no step")
    logged = {"grad_norm": relative(slime["train/grad_norm"], ours["grad_norm"])}
    # A group's rewards cancel out in the loss of the first step: what is left is the rounding of terms of this size.
    logged["loss"] = relative(slime["train/loss"], ours["loss"], flags.get("tcod_reward_coef", 0.0))
    return {**logged, "parameters": math.sqrt(wrong / moved)}


def dumped_samples(run_dir: Path, teacher: Path | None, args: Namespace) -> list[Any]:
    """The samples of the first rollout. All rollouts' are checked."""
    from slime.utils.types import Sample

    dumps = sorted(run_dir.glob("rollout_[0-9]*.pt"), key=lambda path: int(path.stem.partition("_")[2]))
    if not dumps:
        raise FileNotFoundError(f"{run_dir} holds no rollout_0.pt: is it a run directory of train_slime.py?")
    rollouts = [[Sample.from_dict(values) for values in torch.load(dump)["samples"]] for dump in dumps]
    if teacher:
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        for sample in itertools.chain(*rollouts):
            assert sample.teacher_log_probs is None
            with torch.no_grad():
                scores = response_log_probs(model, sample.tokens, sample.response_length)
            sample.teacher_log_probs = scores.tolist()
    for samples in rollouts:
        check_samples(samples, args)
    return rollouts[0]


def outside(change: torch.Tensor, gradient: torch.Tensor, lr: float, rounding: float) -> torch.Tensor:
    """How far each change is from what Adam's first step makes of any gradient within `rounding` of this one."""
    low, high = (-lr * g / (g.abs() + ADAM_EPS) for g in (gradient + rounding, gradient - rounding))
    return (low - change).clamp(min=0) + (change - high).clamp(min=0)


def check_samples(samples: list[Any], args: Namespace) -> None:
    """What must hold of every sample that slime trained on. Raises AssertionError."""
    for sample in samples:
        record, count = sample.metadata["tcod"], sample.response_length
        assert sample.status.name in ("COMPLETED", "TRUNCATED"), sample.status
        assert 0 < count < len(sample.tokens)
        imitated = args.loss_type == "sft_loss"
        values = [sample.loss_mask, *([] if imitated else [sample.rollout_log_probs])]
        for one in values + ([sample.teacher_log_probs] if args.use_opd else []):
            assert len(one) == count and all(map(math.isfinite, one))
        runs = sum(here > before == 0 for before, here in pairwise([0, *sample.loss_mask]))
        assert runs == len(record["turns"])  # what is not sampled stands between any two
        assert imitated or len(record["turns"]) <= record["budget"]
        assert sample.reward == float(record["won"])


def logged_step(log: Path, step: int) -> dict[str, float]:
    """The numbers slime logs for an optimizer step."""
    found = re.search(rf"\bstep {step}: (\{{.*?\}})", log.read_text(errors="replace"))
    if not found:
        raise ValueError(f"{log} has no optimizer step {step}")
    return ast.literal_eval(found[1])


def relative(value: float, reference: float, least: float = 0.0) -> float:
    """The difference in parts of the reference, or of `least` where that is more."""
    return abs(value - reference) / max(abs(reference), least)
