from argparse import Namespace
from collections import Counter, defaultdict

import numpy as np

from slime.utils.types import Sample


def _statistics(values: list[float], prefix: str) -> dict[str, float]:
    functions = {"mean": np.mean, "median": np.median, "max": np.max, "min": np.min}
    return {f"{prefix}/{name}": function(values).item() for name, function in functions.items()}


def compute_metrics_from_samples(args: Namespace, samples: list[Sample]) -> dict[str, float]:
    groups: dict[int | None, list[float]] = defaultdict(list)
    for sample in samples:
        groups[sample.group_index].append(sample.get_reward_value(args))
    uniform = Counter(str(round(rewards[0], 1)) for rewards in groups.values() if len(set(rewards)) == 1)
    cached = sum(sample.prefix_cache_info.cached_tokens for sample in samples)
    prompt = sum(sample.prefix_cache_info.total_prompt_tokens for sample in samples)
    return {
        **_statistics([sample.effective_response_length for sample in samples], "response_len"),
        **{f"zero_std/count_{reward}": count for reward, count in uniform.items()},
        "prefix_cache_hit_rate": cached / prompt if prompt else 0.0,
        "avg_cached_tokens_per_sample": cached / len(samples),
        "truncated_ratio": np.mean([sample.status == Sample.Status.TRUNCATED for sample in samples]).item(),
    }


def compute_perf_metrics_from_samples(args: Namespace, samples: list[Sample], rollout_time: float) -> dict[str, float]:
    waited = [sample.non_generation_time for sample in samples]
    statistics = _statistics(waited, "non_generation_time") if max(waited) > 0 else {}
    return {"rollout_time": rollout_time, **statistics}
