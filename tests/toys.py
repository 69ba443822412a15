"""Small deterministic stand-ins for tests: a byte tokenizer with Qwen3's chat shape, and a corridor to walk along."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from environment import Environment, EnvironmentFailure, Observation, load_environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Qwen3's shape in non-thinking mode: only the generation header carries the empty think block.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
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


class Corridor:
    """Walk to door metadata["goal"]; "right" and "left" move by one. A task with "explode" raises at that step."""

    def __init__(self, data_root: str) -> None:
        self.goal = self.at = self.steps = 0
        self.explode: int | None = None

    def reset(self, metadata: dict[str, Any]) -> Observation:
        self.goal, self.at, self.steps, self.explode = metadata["goal"], 0, 0, metadata.get("explode")
        return Observation(f"Goal: door {self.goal}. You are at door 0.", admissible=("left", "right"))

    def step(self, action: str) -> Observation:
        self.steps += 1
        if self.steps == self.explode:
            raise RuntimeError("the corridor collapsed")
        move = {"right": 1, "left": -1}.get(action)
        if move is None:
            return Observation("Nothing happens.", admissible=("left", "right"))
        self.at += move
        won = self.at == self.goal
        return Observation(f"You are at door {self.at}.", won=won, done=won, admissible=("left", "right"))

    @staticmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None:
        if "goal" not in metadata:
            raise ValueError("its metadata has no goal")

    @staticmethod
    def system_prompt() -> str:
        return "Walk."

    @staticmethod
    def render(observation: Observation, first: bool, admissible: bool) -> str:
        return observation.text + (f" Actions: {', '.join(observation.admissible)}" if admissible else "")

    @staticmethod
    def parse_action(response: str) -> tuple[str, bool]:
        action, closed, _ = response.rpartition("<action>")[2].partition("</action>")
        valid = "<action>" in response and bool(closed)
        return (action.strip(), True) if valid else (response.strip(), False)

    @staticmethod
    def format_action(action: str) -> str:
        return f"<action>{action}</action>"


class LocalPool:
    """EnvironmentPool without processes: a new engine per episode, called in place."""

    def __init__(self, environment: str, data_root: str, **sizes: Any) -> None:
        self._make = lambda: load_environment(environment)(data_root)

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator["LocalBorrowed"]:
        yield LocalBorrowed(self._make())


class LocalBorrowed:
    seconds = 0.0

    def __init__(self, engine: Environment) -> None:
        self._engine = engine

    async def reset(self, metadata: dict[str, Any]) -> Observation:
        return self._engine.reset(metadata)

    async def step(self, action: str) -> Observation:
        try:
            return self._engine.step(action)
        except RuntimeError as error:
            raise EnvironmentFailure("env_error", str(error)) from error


def random_logits(index: int, length: int, vocab: int) -> torch.Tensor:
    """[length, vocab]; the same in every process."""
    return torch.randn(length, vocab, generator=torch.Generator().manual_seed(index))


def response_log_probs(tokens: list[int], response_length: int, logits: torch.Tensor) -> torch.Tensor:
    """log softmax of the logits before each response token, at that token: [response_length]."""
    targets = torch.tensor(tokens[-response_length:])
    return logits[-response_length - 1 : -1].log_softmax(-1).gather(1, targets[:, None])[:, 0]
