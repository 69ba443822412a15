from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any


@dataclass
class PrefixCacheInfo:
    cached_tokens: int = 0
    total_prompt_tokens: int = 0

    def add(self, meta_info: dict) -> None:
        self.cached_tokens += meta_info.get("cached_tokens", 0)
        self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)


class Status(Enum):
    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


_STATUS_OF_FINISH_REASON = {"length": Status.TRUNCATED, "abort": Status.ABORTED, "stop": Status.COMPLETED}


@dataclass
class Sample:
    """One trajectory: `tokens` is prompt + response; the per-token lists cover the response only."""

    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    prompt: str | list[dict[str, str]] = ""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False
    teacher_log_probs: list[float] | None = None
    status: Status = Status.PENDING
    metadata: dict = field(default_factory=dict)
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"status": self.status.value, "prefix_cache_info": dict(vars(self.prefix_cache_info))}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Sample":
        info = PrefixCacheInfo(**data.get("prefix_cache_info", {}))
        values = data | {"status": Status(data["status"]), "prefix_cache_info": info}
        names = {entry.name for entry in fields(Sample)}
        sample = Sample(**{name: value for name, value in values.items() if name in names})
        vars(sample).update(values)
        return sample

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: Any = None,
        log_probs: Any = None,
        trainable: bool = True,
        meta_info: dict | None = None,
        text: str | None = None,
    ) -> None:
        """Extend the response and its per-token lists together; SGLang's meta_info also gives the status."""
        tokens = [int(token) for token in ([] if tokens is None else tokens)]
        log_probs = _checked(tokens, log_probs, trainable)
        before = self.response_length
        self.response += text or ""
        self.tokens += tokens
        self.response_length += len(tokens)
        if tokens:
            earlier = [1] * before if self.loss_mask is None else self.loss_mask
            self.loss_mask = earlier + [int(trainable)] * len(tokens)
        if log_probs is not None:
            if self.rollout_log_probs is None and trainable and before:
                raise ValueError("the earlier response tokens have no log-probs")
            earlier = [0.0] * before if self.rollout_log_probs is None else self.rollout_log_probs
            self.rollout_log_probs = earlier + log_probs
        if meta_info and "finish_reason" in meta_info:
            self.prefix_cache_info.add(meta_info)
            if "weight_version" in meta_info:
                self.weight_versions.append(meta_info["weight_version"])
            self.status = _STATUS_OF_FINISH_REASON.get(meta_info["finish_reason"]["type"], self.status)
        for name in ("loss_mask", "rollout_log_probs"):
            values = getattr(self, name)
            if values is not None and len(values) != self.response_length:
                raise ValueError(f"{name} has {len(values)} entries for {self.response_length} response tokens")


def _checked(tokens: list[int], log_probs: Any, trainable: bool) -> list[float] | None:
    """One log-prob for each token: the engine's of sampled ones, 0.0 of the others."""
    if log_probs is not None:
        log_probs = [float(log_prob) for log_prob in log_probs]
        if len(log_probs) != len(tokens):
            raise ValueError(f"{len(log_probs)} log-probs for {len(tokens)} tokens")
    if tokens and trainable and log_probs is None:
        raise ValueError("sampled tokens need the engine's log-probs")
    if tokens and not trainable:
        if log_probs is not None:
            raise ValueError("tokens that are not trainable take no log-probs")
        log_probs = [0.0] * len(tokens)
    return log_probs


Sample.Status = Status
Sample.PrefixCacheInfo = PrefixCacheInfo
