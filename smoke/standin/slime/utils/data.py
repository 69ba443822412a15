import json
import random

from slime.utils.types import Sample


class Dataset:
    """The rows of a JSONL file as samples, in file order until they are shuffled."""

    def __init__(self, path: str, *, prompt_key: str, label_key: str | None, metadata_key: str, seed: int = 42):
        with open(path, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        self._rows = [
            Sample(
                prompt=row.get(prompt_key),
                label=None if label_key is None else row[label_key],
                metadata=row.get(metadata_key) or {},
            )
            for row in rows
        ]
        self.samples = self._rows
        self._seed = seed

    def shuffle(self, epoch_id: int) -> None:
        """Into the one order that belongs to the seed and the epoch."""
        self.samples = self._rows.copy()
        random.Random(self._seed + epoch_id).shuffle(self.samples)

    def __len__(self) -> int:
        return len(self.samples)
