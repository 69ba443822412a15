"""The depth of a rollout: a function of its number, or a state that is kept in slime's data source.

slime saves the data source's metadata with each checkpoint and loads it on resuming, so a resumed run has the depth,
and the averages behind it, of the rollout that it goes on with.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from .. import ConfigError
from ..curriculum import DepthState, KlSchedule
from ..records.metrics import Metrics, deepest_kl
from ..settings.config import TcodConfig

# In the metadata: {"n": last rollout that was counted, "state": DepthState's fields after it, "before": those before}.
KEY = "tcod_depth"


def check_data_source(config: TcodConfig, source: Any) -> None:
    """Whether the data source can keep the state. Raises ConfigError."""
    if config.kl_schedule and not (hasattr(source, "update_metadata") and hasattr(source, "get_metadata")):
        raise ConfigError("tcod_schedule kl keeps its state in slime's own data source: remove --data-source-path")


def depth_of(config: TcodConfig, source: Any, n: int) -> int:
    """Depth k of rollout n, in turns. Raises ConfigError where the data source has lost the state."""
    if config.kl_schedule is None:
        return config.curriculum.depth(n)
    return _load(config.kl_schedule, source, n).k


def count_rollout(config: TcodConfig, source: Any, n: int, trained: Iterable[Any]) -> Metrics:
    """Have the schedule take note of rollout n, with the samples that go to training. Returns its metrics."""
    if config.kl_schedule is None:
        return {}
    before = _load(config.kl_schedule, source, n)
    kl = deepest_kl(trained, before.k)
    state = config.kl_schedule.update(before, kl)
    source.update_metadata({KEY: {"n": n, "state": asdict(state), "before": asdict(before)}})
    values = {"kl": kl, "next_k": state.k, "rollouts": state.rollouts}
    values |= {"kl_reached": state.reached, "kl_average": state.average}
    return {f"rollout/tcod/depth/{name}": value for name, value in values.items() if value is not None}


def _load(schedule: KlSchedule, source: Any, n: int) -> DepthState:
    """The state before rollout n.

    slime's train_async.py plays rollout n + 1 before it saves rollout n, so a resumed run may find n + 1 counted.
    """
    saved = source.get_metadata().get(KEY)
    if saved is None and n > 0:
        raise ConfigError(
            f"tcod_schedule kl has no saved state before rollout {n}: restore "
            f"rollout/global_dataset_state_dict_{n - 1}.pt in the --load folder, or go on with tcod_schedule linear"
        )
    if saved is None:
        return schedule.start()
    return DepthState(**saved["before" if saved["n"] >= n else "state"])
