"""Tiny models for the smoke run: a Qwen3 teacher that plays pick_and_place_simple games, and a damaged copy of it.

    python -m smoke.make_models --out smoke/teacher   # made the shipped weights; half an hour on two cores

The teacher learns from a scripted searcher (lessons.py). The student is the teacher after some training steps on
random actions, so what the smoke run shows is the recovery of a perturbed teacher, not the training of a weak model.
The smoke run makes its student in seconds, and its thinking teacher, out of the shipped one, in minutes.

Shipped and not made here are the teacher's config.json, Qwen3's chat template in fewer words, and a byte-level BPE as
Qwen2's with single tokens for the things and tags of the games: an answer has 5 to 7 tokens.
"""

import argparse
import copy
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from examples.tcod.model.chat_tokens import ChatTokens
from smoke import cpu_only, lessons, make_games

cpu_only.prepare()

SHIPPED = Path(__file__).resolve().parent / "teacher"
CHAT = {"enable_thinking": False}

GAMES = 700  # of the teacher's training
CYCLES = ((1600, 3e-3), (2400, 2e-3))  # of it: steps, highest learning rate

# The student's damage.
DAMAGE_STEPS, DAMAGE_BATCH, DAMAGE_RATE = 12, 8, 1e-3

# The thinking teacher: so many games of the teacher's training; tokens of a batch; steps, highest learning rate.
THINKING_GAMES, THINKING_TOKENS, THINKING_CYCLES = 160, 2200, ((220, 3e-3), (260, 3e-3))


def entities() -> list[str]:
    """Every thing in the games' rooms, as it stands in running text: " cabinet 1"."""
    always, optional = make_games.KITCHEN
    counts = {name: always.count(name) + optional.count(name) for name in always}
    counts |= dict.fromkeys(make_games.TASKS[make_games.SIMPLE][1], 1)
    return [f" {name.lower()} {i}" for name, count in sorted(counts.items()) for i in range(1, count + 1)]


def thinking_chat(tokenizer: PreTrainedTokenizerFast) -> ChatTokens:
    """The chat of a model that thinks, as the recipe renders it under tcod_history turns."""
    return ChatTokens(tokenizer, {"enable_thinking": True}, history="turns", thoughts="keep")


def load(checkpoint: Path) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """(model in float32, tokenizer)."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(checkpoint)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A checkpoint as Hugging Face and SGLang load it, weights in bfloat16."""
    stop = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id, do_sample=True).save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(
    model: torch.nn.Module,
    stream: Iterator[list],
    rates: list[float],
    loss_of: Callable[[torch.nn.Module, list], torch.Tensor] = lessons.label_loss,
) -> list[float]:
    """One Adam step per learning rate in `rates`. Returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    losses = []
    for step, (rate, batch) in enumerate(zip(rates, stream, strict=False)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}: loss {sum(losses[-50:]) / 50:.4f}", flush=True)
    return losses


def train_compiled(
    model: torch.nn.Module,
    stream: Iterator[list],
    cycles: Sequence[list[float]],
    loss_of: Callable[[torch.nn.Module, list], torch.Tensor] = lessons.label_loss,
) -> list[float]:
    """`train` for several cycles of learning rates, with a compiled model: a long training is shorter so."""
    eager = model.model.forward
    model.model.forward = torch.compile(eager, dynamic=True)
    losses = [loss for rates in cycles for loss in train(model, stream, rates, loss_of)]
    model.model.forward = eager
    return losses


def cosine(steps: int, highest: float) -> list[float]:
    """Learning rates of one cycle: 50 steps of warm-up, and half a cosine down to a hundredth over all of it."""
    return [
        highest * min(1.0, (n + 1) / 50) * (0.01 + 0.495 * (1 + math.cos(math.pi * n / steps))) for n in range(steps)
    ]


def new_teacher(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """An untrained model. A thing's embedding starts as the sum of its words', so " apple 1" resembles " apple"."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    embeddings = model.model.embed_tokens.weight.data
    for thing in entities():
        noun, number = thing.rsplit(" ", 1)
        words = tokenizer.encode(noun) + tokenizer.encode(number)
        embeddings[tokenizer.encode(thing)] = embeddings[words].sum(0)
    return model


def make_teacher(out: Path) -> None:
    """Train the teacher from nothing. The curve of its losses is kept beside it."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model, chat = new_teacher(tokenizer), ChatTokens(tokenizer, CHAT)
    examples = [lessons.encode(chat, *one) for one in lessons.demonstrations(range(GAMES))]
    losses = train_compiled(model, lessons.batches(examples, seed=0), [cosine(*cycle) for cycle in CYCLES])
    save(model, tokenizer, out)
    (out / "losses.json").write_text(json.dumps([round(loss, 4) for loss in losses]))


def make_thinking_teacher(out: Path) -> None:
    """The shipped teacher, trained to think a few words before it acts."""
    model, tokenizer = load(SHIPPED)
    chat = thinking_chat(tokenizer)
    examples = [lessons.encode_thoughts(chat, *one) for one in lessons.demonstrations(range(THINKING_GAMES))]
    stream = lessons.batches(examples, 0, THINKING_TOKENS)
    for cycle in THINKING_CYCLES:
        train(model, stream, cosine(*cycle), lessons.thoughts_loss)
    save(model, tokenizer, out)


def make_student(teacher: Path, out: Path, seed: int, thinks: bool = False) -> None:
    """The teacher after DAMAGE_STEPS training steps on random actions: a function of the teacher and the seed."""
    model, tokenizer = load(teacher)
    damage(model, tokenizer, seed, [DAMAGE_RATE] * DAMAGE_STEPS, thinks)
    save(model, tokenizer, out)


def damage(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, seed: int, rates: list[float], thinks: bool = False
) -> None:
    """A training step on DAMAGE_BATCH plays of random actions for each learning rate."""
    rng = random.Random(seed)
    chat = thinking_chat(tokenizer) if thinks else ChatTokens(tokenizer, CHAT)
    encode, loss = (lessons.encode_thoughts, lessons.thoughts_loss) if thinks else (lessons.encode, lessons.label_loss)
    plays = ([lessons.random_steps(rng) for _ in range(DAMAGE_BATCH)] for _ in rates)
    train(model, ([encode(chat, *play) for play in batch] for batch in plays), rates, loss)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the smoke run's teacher.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    make_teacher(parser.parse_args().out)


if __name__ == "__main__":
    main()
