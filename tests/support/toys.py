"""Small deterministic stand-ins for tests: a byte tokenizer with Qwen3's chat shape, and a pool without processes."""

import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.tcod import Failure, words
from examples.tcod.environments.protocol import Environment, Observation, load_environment
from tests.support.corridor import Corridor

# Qwen3's shape in non-thinking mode: only the generation header carries the empty think block.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Qwen3's shape of tools, calls and results; TOOL_TOKENS are tokens of their own there.
TOOL_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TOOL_TEMPLATE = (
    "{% for m in messages %}{% set other = m.role != 'tool' %}"
    "{% if other or messages[loop.index0 - 1].role != 'tool' %}"
    "<|im_start|>{{ m.role if other else 'user' }}{% endif %}"
    "{{ '\\n' + m.content if other else '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% for t in (tools or []) if m.role == 'system' %}{{ '\\n' }}{{ t|tojson }}{% endfor %}"
    "{% for c in m.tool_calls or [] %}{{ '' if loop.first else '\\n' }}<tool_call>{{ '\\n' }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments|tojson }}}'
    "{{ '\\n' }}</tool_call>{% endfor %}"
    "{% if other or loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path) -> Path:
    """One token per byte, and <|im_end|> (end of turn), <|endoftext|> (pad), <|im_start|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class LocalPool:
    """EnvironmentPool without processes: a new environment per episode, called in place."""

    def __init__(self, environment: str, data_root: str, env_args: dict[str, Any] | None = None, **sizes: Any) -> None:
        self._make = lambda: load_environment(environment)(data_root, **(env_args or {}))

    async def close(self) -> None:
        """As EnvironmentPool's."""

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator["LocalBorrowed"]:
        yield LocalBorrowed(self._make())


class LocalBorrowed:
    seconds = 0.0

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self.calls: list[tuple[str, float]] = []

    async def reset(self, metadata: dict[str, Any]) -> Observation:
        return self._call(self._environment.reset, metadata)

    async def step(self, action: str) -> Observation:
        return self._call(self._environment.step, action)

    async def finish(self, last: Observation) -> Observation:
        return self._call(self._environment.finish, last)

    def _call(self, method: Callable[[Any], Observation], argument: Any) -> Observation:
        self.calls.append((method.__name__, 1e-4))
        try:
            return method(argument)
        except (Exception, SystemExit) as error:
            raise Failure("env_error", words(error)) from error


def random_logits(index: int, length: int, vocab: int) -> torch.Tensor:
    """[length, vocab]; the same in every process."""
    return torch.randn(length, vocab, generator=torch.Generator().manual_seed(index))


def response_log_probs(tokens: list[int], response_length: int, logits: torch.Tensor) -> torch.Tensor:
    """log softmax of the logits before each response token, at that token: [response_length]."""
    targets = torch.tensor(tokens[-response_length:])
    return logits[-response_length - 1 : -1].log_softmax(-1).gather(1, targets[:, None])[:, 0]


def token_weights(masks: list[list[int]], loss: str, trajectories: list[int] | None = None) -> list[torch.Tensor]:
    """What each response token weighs in the loss of one optimizer step, see examples/tcod/training/turn_mean.py.

    `trajectories` has the trajectory of each mask; without it each is its own.
    """
    trajectories = trajectories or list(range(len(masks)))
    trained = Counter()
    for mask, trajectory in zip(masks, trajectories, strict=True):
        trained[trajectory] += sum(mask)
    spans = [_spans(mask) for mask in masks]
    turns, tokens = sum(map(len, spans)), sum(map(sum, masks))
    weights = [torch.zeros(len(mask)) for mask in masks]
    for weight, turns_of_mask, trajectory in zip(weights, spans, trajectories, strict=True):
        for start, end in turns_of_mask:
            share = {
                "trajectory": 1 / len(trained) / trained[trajectory],
                "token": 1 / tokens,
                "turn": 1 / turns / (end - start),
            }
            weight[start:end] = share[loss]
    return weights


def _spans(mask: list[int]) -> list[tuple[int, int]]:
    """(start, end) of each run of ones."""
    text = "".join(map(str, mask))
    return [match.span() for match in re.finditer("1+", text)]


class Elsewhere(Corridor):
    """Needs a package that is not installed on the node."""

    def reset(self, metadata: dict[str, Any]) -> Observation:
        raise ModuleNotFoundError("No module named 'corridors'")
