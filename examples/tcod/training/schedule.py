"""The depth of a rollout: a function of its number."""

from collections.abc import Iterable
from typing import Any

from ..records.metrics import Metrics
from ..settings.config import TcodConfig


def check_data_source(config: TcodConfig, source: Any) -> None:
    """Nothing is kept in the data source."""


def depth_of(config: TcodConfig, source: Any, n: int) -> int:
    """Depth k of rollout n, in turns."""
    return config.curriculum.depth(n)


def count_rollout(config: TcodConfig, source: Any, n: int, trained: Iterable[Any]) -> Metrics:
    """No metrics."""
    return {}
