import copy
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from slime.utils.data import Dataset
from slime.utils.types import Sample


class RolloutDataSourceWithBuffer:
    """Endless groups of n_samples_per_prompt samples, epoch after epoch. It has no buffer."""

    def __init__(self, args: Namespace):
        self.args = args
        self.sample_offset = self.epoch_id = self.sample_group_index = self.sample_index = 0
        self.metadata: dict[str, Any] = {}
        keys = {"prompt_key": args.input_key, "label_key": args.label_key, "metadata_key": args.metadata_key}
        self.dataset = Dataset(args.prompt_data, **keys, seed=args.rollout_seed)
        self._shuffle()

    def _shuffle(self) -> None:
        if self.args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        prompts = self.dataset.samples[self.sample_offset : self.sample_offset + num_samples]
        self.sample_offset += num_samples
        if self.sample_offset > len(self):
            self.epoch_id += 1
            self._shuffle()
            self.sample_offset = num_samples - len(prompts)
            prompts += self.dataset.samples[: self.sample_offset]
        groups = []
        for prompt in prompts:
            group = [copy.deepcopy(prompt) for _ in range(self.args.n_samples_per_prompt)]
            for sample in group:
                sample.group_index, sample.index = self.sample_group_index, self.sample_index
                self.sample_index += 1
            self.sample_group_index += 1
            groups.append(group)
        return groups

    def update_metadata(self, metadata: dict[str, Any]) -> None:
        self.metadata.update(metadata)

    def get_metadata(self) -> dict[str, Any]:
        return self.metadata

    def save(self, rollout_id: int) -> None:
        file = _state_file(self.args.save, rollout_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        names = ("sample_offset", "epoch_id", "sample_group_index", "sample_index", "metadata")
        torch.save({name: getattr(self, name) for name in names}, file)

    def load(self, rollout_id: int | None = None) -> None:
        """Nothing happens without args.load or a file of that rollout."""
        if self.args.load is not None and (file := _state_file(self.args.load, rollout_id)).exists():
            vars(self).update(torch.load(file))
            self._shuffle()

    def __len__(self) -> int:
        return len(self.dataset)


def _state_file(folder: str, rollout_id: int | None) -> Path:
    return Path(folder) / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"
