"""The loss as a mean over turns, instead of slime's mean over trajectories. slime loads by flag:

    --custom-pg-loss-reducer-function-path examples.tcod.training.turn_mean.turn_mean

What a token weighs in a step of B trajectories with N turns in all, where its trajectory has n trained tokens and its
turn has l:

    trajectory   1 / (B n)                   slime's default: the mean over trajectories of token means
    token        1 / (all trained tokens)    slime's --calculate-per-token-loss
    turn         1 / (N l)                   the mean over turns of token means: the official F2B (arXiv 2604.24005)

A turn is a run of the loss mask: the environment's answer, which is not trained, lies between any two. slime gives a
reducer the samples of one micro-batch, and N is a number of the whole step. So `count_turns`, called where slime still
has the whole batch, writes N into the masks: trained tokens have N there instead of 1. slime divides whatever it
averages with a mask by that mask's sum, so its own metrics do not change; checks.py refuses the flags that use
sums otherwise. slime's dump of training data (--save-debug-train-data) has N there, too.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

Tensor = Any  # torch.Tensor: slime brings the tensors, and nothing of torch is needed here beside their methods


def is_turn_mean(args: Namespace) -> bool:
    """Whether slime's arguments choose the mean over turns."""
    return getattr(args, "custom_pg_loss_reducer_function_path", None) == f"{__name__}.turn_mean"


def count_turns(samples: Sequence[Any], trajectories_per_step: int) -> None:
    """Set each sample's loss_mask to the number of turns of its optimizer step where it was 1 (or counted before).

    Args:
        samples: the whole batch, in slime's order; those of one trajectory share a rollout_id that is not None.
        trajectories_per_step: slime's --global-batch-size; slime makes a step of that many trajectories in order.
    """
    order: dict[Any, int] = {}
    ids = [("own", i) if sample.rollout_id is None else sample.rollout_id for i, sample in enumerate(samples)]
    steps = [order.setdefault(trajectory, len(order)) // trajectories_per_step for trajectory in ids]
    turns: Counter[int] = Counter()
    for sample, step in zip(samples, steps, strict=True):
        if not sample.remove_sample:  # slime trains none of its tokens
            turns[step] += sum(here > before == 0 for before, here in pairwise([0, *sample.loss_mask]))
    for sample, step in zip(samples, steps, strict=True):
        sample.loss_mask = [turns[step] if trained else 0 for trained in sample.loss_mask]


def turn_mean(
    total_lengths: list[int],
    response_lengths: list[int],
    masks: list[Tensor],
    calculate_per_token_loss: bool,
) -> Callable[[Tensor], Tensor]:
    """slime's reducer of one micro-batch, of the policy loss of its response tokens, flat.

    Under context parallelism those are this rank's part. slime divides the sum over micro-batches and ranks by B.

    Args:
        total_lengths, response_lengths: tokens of each sample.
        masks: whole loss masks, as `count_turns` leaves them.
        calculate_per_token_loss: slime's flag, which checks.py refuses beside this.

    Raises:
        ValueError: `count_turns` has not seen these masks.
    """
    from megatron.training.global_vars import get_args

    from slime.backends.megatron_utils.cp_utils import slice_log_prob_with_cp

    weights = [turn_weights(mask) for mask in masks]
    in_all, here = max(int(mask.max()) for mask in masks), round(sum(float(weight.sum()) for weight in weights))
    if in_all < here:
        raise ValueError(f"the masks count {in_all} turns in a whole step, and {here} are here: see count_turns")
    scale = get_args().global_batch_size / max(in_all, 1)
    parts = list(map(slice_log_prob_with_cp, weights, total_lengths, response_lengths))
    sizes = [len(part) for part in parts]
    return lambda pg_loss: scale * sum(
        (losses * part).sum() for losses, part in zip(pg_loss.split(sizes), parts, strict=True)
    )


def turn_weights(mask: Tensor) -> Tensor:
    """1 / l at each token of a run of l trained tokens, else 0: a turn's weights sum to 1. float32 [response]."""
    trained = mask > 0
    starts = trained.clone()
    starts[1:] &= ~trained[:-1]
    turn = starts.cumsum(0)
    lengths = turn[trained].bincount(minlength=len(mask) + 1).clamp_min(1)
    return trained / lengths[turn]
