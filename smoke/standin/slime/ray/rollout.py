from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

from slime.utils.types import Sample


class RolloutManager:
    """Only the conversion to a train batch, and no Ray actor."""

    args: Namespace
    custom_reward_post_process_func: Callable | None

    def _convert_samples_to_train_data(self, samples: list[Sample]) -> dict[str, Any]:
        if self.custom_reward_post_process_func is None:
            raise NotImplementedError("the slime stand-in needs --custom-reward-post-process-path")
        raw_rewards, rewards = self.custom_reward_post_process_func(self.args, samples)
        assert len(raw_rewards) == len(rewards) == len(samples)

        taken = {sample.rollout_id for sample in samples}
        free = (i for i in count() if i not in taken)
        rollout_ids = [next(free) if sample.rollout_id is None else sample.rollout_id for sample in samples]

        trained: Counter[int] = Counter()
        for rollout_id, sample in zip(rollout_ids, samples, strict=True):
            if sample.loss_mask is None:
                sample.loss_mask = [1] * sample.response_length
            assert len(sample.loss_mask) == sample.response_length
            if sample.remove_sample:
                sample.loss_mask = [0] * sample.response_length
            trained[rollout_id] += sum(sample.loss_mask)

        batch = {
            "tokens": [sample.tokens for sample in samples],
            "response_lengths": [sample.response_length for sample in samples],
            "rewards": rewards,
            "raw_reward": raw_rewards,
            "truncated": [int(sample.status == Sample.Status.TRUNCATED) for sample in samples],
            "sample_indices": [sample.index for sample in samples],
            "rollout_ids": rollout_ids,
            "loss_masks": [sample.loss_mask for sample in samples],
            "rollout_mask_sums": [trained[rollout_id] for rollout_id in rollout_ids],
        }
        for name in ("rollout_log_probs", "teacher_log_probs"):
            if getattr(samples[0], name) is not None:  # the first sample decides for the batch
                batch[name] = [getattr(sample, name) for sample in samples]
        return batch
