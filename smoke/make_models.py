"""Tiny models for the smoke run: a Qwen3 teacher that plays pick_and_place_simple games, and a damaged copy of it.

    python -m smoke.make_models teacher --out smoke/teacher   # made the shipped files; half an hour on two cores
    python -m smoke.make_models student --out DIR --seed 1    # seconds
    python -m smoke.make_models thinking-teacher --out DIR    # minutes: the shipped teacher learns to think first
    python -m smoke.make_models thinking-student --out DIR --teacher DIR

The teacher learns from a scripted searcher (expert.py) whose play is disturbed by random actions: the disturbed turns
are context, never a label. The student is the teacher after some training steps on random actions, so what the smoke
run shows is the recovery of a perturbed teacher, not the training of a weak model.
"""

import argparse
import copy
import functools
import json
import math
import multiprocessing
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.model.chat_tokens import ChatTokens
from smoke import cpu_only, expert, make_games

cpu_only.prepare()

SHIPPED = Path(__file__).resolve().parent / "teacher"
TASK = "pick_and_place_simple"
HORIZON = 20

VOCABULARY = 640  # at most
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]
TAGS = ["<action>", "</action>"]
# How Qwen2's tokenizer splits text before its byte-level BPE.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3's chat format: earlier answers lose their thoughts, and a prompt for a non-thinking answer has an empty one.
CHAT_TEMPLATE = """
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{{ message.content.split('</think>')[-1].lstrip('\\n') }}
{%- else -%}
{{ message.content }}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
"""

# Demonstrations: FIRST_GAME + i is the seed of the i-th game, apart from the games of train.jsonl and heldout.jsonl.
FIRST_GAME, GAMES, PLAYS = 100_000, 700, 5
NOISE = (0.0, 0.1, 0.2, 0.3, 0.5)
BLOCK = 250  # demonstrations that are shuffled and batched together
BATCH_TOKENS = 4500

CYCLES = ((1600, 3e-3), (2400, 2e-3))  # of the teacher's training: steps, highest learning rate

# The student's damage.
DAMAGE_STEPS, DAMAGE_BATCH, DAMAGE_RATE = 12, 8, 1e-3

# The thinking teacher: so many games of the teacher's training; tokens of a batch; steps, highest learning rate.
THINKING_GAMES, THINKING_TOKENS, THINKING_CYCLES = 160, 2200, ((220, 3e-3), (260, 3e-3))

CHAT = {"enable_thinking": False}
Example = tuple[list[int], list[int]]  # token ids, and 1 where a token is to be predicted
T = TypeVar("T", bound=tuple)  # an example of any kind: its ids come first


def entities() -> list[str]:
    """Every thing in the games' rooms, as it stands in running text: " cabinet 1"."""
    always, optional = make_games.KITCHEN
    counts = {name: always.count(name) + optional.count(name) for name in always}
    counts |= dict.fromkeys(make_games.TASKS[TASK][1], 1)
    return [f" {name.lower()} {i}" for name, count in sorted(counts.items()) for i in range(1, count + 1)]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE as Qwen2's, trained on `texts`. Things are single tokens: an answer has 5 to 7 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), bytes_])
    bpe.decoder = decoders.ByteLevel()
    words = TAGS + entities()
    size = VOCABULARY - len(SPECIAL + THINK + words)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    # Tags and things become words of the model: an added token would be a control token, which no text turns into.
    state = json.loads(bpe.to_str())
    for token in SPECIAL + THINK + words:
        state["model"]["vocab"][token.replace(" ", "\u0120")] = len(state["model"]["vocab"])
    state["model"]["ignore_merges"] = True
    bpe = Tokenizer.from_str(json.dumps(state))
    whole = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in (whole, f"{whole}|{SPLIT}")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_])
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in THINK])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tokenizer_texts() -> list[str]:
    """The words of the prompt, the games and the answers: enough to make each a single token."""
    names = sorted({name.lower() for goal in make_games.goals(TASK) for name in goal})
    return [
        AlfworldEnvironment.system_prompt({}),
        "You are in the middle of a room. Looking quickly around you, you see a, a, and a.\n\n",
        f"Your task is to: put a some {' '.join(names)} in on.",
        "You arrive at. The is closed. The is open. In it, you see nothing. On the, you see a, a, and a.",
        "You open the. You close the. You pick up the from the. You move the to the. Nothing happens.",
        "You are facing the. Next to it, you see nothing. You are not carrying anything. You are carrying:",
        "There's nothing special about.",
        *("system\n", "user\n", "assistant\n", "\n\n"),
        *("go to", "open", "close", "take from", "move to", "examine", "look", "inventory"),
    ]


@functools.cache
def _environment(root: str) -> AlfworldEnvironment:
    return AlfworldEnvironment(root)


def play(job: tuple[str, int]) -> list[tuple[str, list[expert.Step]]]:
    """(folder for games, i) -> PLAYS demonstrations of the i-th game: the first observation and the steps of each."""
    root, i = job
    seed = FIRST_GAME + i
    row = make_games.make_game(root, "train", TASK, seed, seed)
    plays = []
    for number in range(PLAYS):
        rng = random.Random(f"{seed}/{number}")
        plays.append(expert.demonstrate(_environment(root), row["metadata"], rng, rng.choice(NOISE), HORIZON)[:2])
    return plays


def demonstrations(games: Iterable[int], processes: int | None = None) -> list[tuple[str, list[expert.Step]]]:
    """The demonstrations of these games, in order, on the real engine."""
    with tempfile.TemporaryDirectory() as root, multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [one for plays in pool.imap(play, [(root, i) for i in games]) for one in plays]


def encode(chat: ChatTokens, first: str, steps: list[expert.Step]) -> Example:
    """A demonstration as the recipe renders an episode, with the expert's own answers as labels."""
    ids = chat.prompt(AlfworldEnvironment.system_prompt({}), first)
    labels = [0] * len(ids)
    for i, step in enumerate(steps):
        answer = chat.assistant(AlfworldEnvironment.format_action(step.action))
        after = chat.user(step.text) if i + 1 < len(steps) else []
        ids += answer + after
        labels += [int(step.label)] * len(answer) + [0] * len(after)
    return ids, labels


def thinking_chat(tokenizer: PreTrainedTokenizerFast) -> ChatTokens:
    """The chat of a model that thinks, as the recipe renders it under tcod_history turns."""
    return ChatTokens(tokenizer, {"enable_thinking": True}, history="turns", thoughts="keep")


class Branched(NamedTuple):
    """A conversation without thoughts, and behind it what was said at some of its turns, with the thoughts.

    A model that thinks sees this at each turn, for the cost of one sequence: a turn's answer attends to the
    conversation before that turn and to itself, and stands at the positions that follow there.
    """

    ids: list[int]
    positions: list[int]
    answers: list[tuple[int, int, int]]
    """(start, end, tokens of the conversation before that turn) of each answer."""

    def mask(self, size: int) -> torch.Tensor:
        """Which of `size` tokens each may attend to."""
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        for start, end, before in self.answers:
            mask[start:end, before:start] = False
        return mask

    def predictions(self) -> list[tuple[int, int]]:
        """(place that predicts, place of the predicted token) for every token of an answer."""
        return [
            (i - 1 if i > start else before - 1, i) for start, end, before in self.answers for i in range(start, end)
        ]


def encode_thoughts(chat: ChatTokens, first: str, steps: list[expert.Step]) -> Branched:
    """A demonstration as the recipe renders it under tcod_history turns, with the expert's own answers to learn."""
    texts, said, before = [AlfworldEnvironment.system_prompt({}), first], [], []
    for i, step in enumerate(steps):
        context = chat.context(texts)
        action = AlfworldEnvironment.format_action(step.action)
        if step.label:
            said.append(chat.assistant(f"<think>\n{step.thought}\n</think>\n\n{action}"))
            before.append(len(context))
        if i + 1 < len(steps):
            texts += [action, step.text]
    ids, positions, answers = context, [*range(len(context))], []
    for answer, begin in zip(said, before, strict=True):
        answers.append((len(ids), len(ids) + len(answer), begin))
        ids, positions = ids + answer, [*positions, *range(begin, begin + len(answer))]
    return Branched(ids, positions, answers)


def thoughts_loss(model: torch.nn.Module, batch: list[Branched]) -> torch.Tensor:
    """label_loss of answers that branch off."""
    ids = pad_sequence([torch.tensor(one.ids) for one in batch], batch_first=True)
    positions = pad_sequence([torch.tensor(one.positions) for one in batch], batch_first=True)
    mask = torch.stack([one.mask(ids.size(1)) for one in batch])[:, None]
    hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state
    places = [(row, *pair) for row, one in enumerate(batch) for pair in one.predictions()]
    rows, sources, targets = torch.tensor(places).T
    return F.cross_entropy(model.lm_head(hidden[rows, sources]), ids[rows, targets])


def batches(examples: list[T], seed: int, tokens: int = BATCH_TOKENS) -> Iterator[list[T]]:
    """Batches of at most so many tokens, padding included, without end.

    The order within a block is random; blocks follow in order, so the first batches need the first examples only.
    """
    rng = random.Random(seed)
    while True:
        for start in range(0, len(examples), BLOCK):
            block = examples[start : start + BLOCK]
            rng.shuffle(block)
            block.sort(key=lambda example: len(example[0]) // 50)  # like lengths together
            made: list[list[Example]] = [[]]
            for example in block:
                if (len(made[-1]) + 1) * len(example[0]) > tokens:
                    made.append([])
                made[-1].append(example)
            rng.shuffle(made)
            yield from made


def label_loss(model: torch.nn.Module, batch: list[Example]) -> torch.Tensor:
    """Mean negative log-likelihood of the labelled tokens."""
    ids = pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)
    labels = pad_sequence([torch.tensor(labels, dtype=torch.bool) for _, labels in batch], batch_first=True)[:, 1:]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden[labels]), ids[:, 1:][labels])


def train(
    model: torch.nn.Module,
    stream: Iterator[list[T]],
    rates: list[float],
    loss_of: Callable[[torch.nn.Module, list[T]], torch.Tensor] = label_loss,
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


def cosine(steps: int, highest: float) -> list[float]:
    """Learning rates of one cycle: 50 steps of warm-up, and half a cosine down to a hundredth over all of it."""
    return [
        highest * min(1.0, (n + 1) / 50) * (0.01 + 0.495 * (1 + math.cos(math.pi * n / steps))) for n in range(steps)
    ]


def new_teacher(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """An untrained model. A thing's embedding starts as the sum of its words', so " apple 1" resembles " apple"."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=4096,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    embeddings = model.model.embed_tokens.weight.data
    for thing in entities():
        noun, number = thing.rsplit(" ", 1)
        words = tokenizer.encode(noun) + tokenizer.encode(number)
        embeddings[tokenizer.encode(thing)] = embeddings[words].sum(0)
    return model


def make_teacher(out: Path) -> None:
    """Train the teacher from nothing. The curve of its losses is kept beside it."""
    tokenizer = make_tokenizer(tokenizer_texts())
    model, chat = new_teacher(tokenizer), ChatTokens(tokenizer, CHAT)
    examples = [encode(chat, *one) for one in demonstrations(range(GAMES))]
    # Compiled, a step takes less than half the time.
    eager = model.model.forward
    model.model.forward = torch.compile(eager, dynamic=True)
    stream = batches(examples, seed=0)
    losses = [loss for cycle in CYCLES for loss in train(model, stream, cosine(*cycle))]
    model.model.forward = eager
    save(model, tokenizer, out)
    (out / "losses.json").write_text(json.dumps([round(loss, 4) for loss in losses]))


def make_thinking_teacher(out: Path) -> None:
    """The shipped teacher, trained to think a few words before it acts."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    chat = thinking_chat(tokenizer)
    plays = demonstrations(range(THINKING_GAMES))
    examples = [encode_thoughts(chat, *play) for play in plays]
    stream = batches(examples, 0, THINKING_TOKENS)
    for cycle in THINKING_CYCLES:
        train(model, stream, cosine(*cycle), thoughts_loss)
    save(model, tokenizer, out)


def random_play(chat: ChatTokens, rng: random.Random) -> Example:
    """A mock episode in which every answer is a random action and a label; it needs no engine."""
    return encode(chat, *random_steps(rng))


def random_steps(rng: random.Random, turns: int = 10) -> tuple[str, list[expert.Step]]:
    """A first observation and random actions, with answers that resemble the engine's and thoughts that do not fit."""
    always, optional = make_games.KITCHEN
    room = always + rng.sample(optional, rng.randint(0, make_games.MAX_ROOM - len(always)))
    places = sorted(f"{name.lower()} {room[:i].count(name) + 1}" for i, name in enumerate(room))
    things = [f"{name.lower()} 1" for name in make_games.TASKS[TASK][1]]
    goal, target = (name.lower() for name in rng.choice(make_games.goals(TASK)))
    first = (
        "You are in the middle of a room. Looking quickly around you, you see "
        f"a {', a '.join(places[:-1])}, and a {places[-1]}.\n\nYour task is to: put a {goal} in {target}."
    )
    steps = []
    for _ in range(turns):
        place, thing = rng.choice(places), rng.choice(things)
        forms = [f"go to {place}"] * 2 + [f"{verb} {place}" for verb in ("open", "close", "examine")]
        forms += [f"take {thing} from {place}", f"move {thing} to {place}", "look", "inventory"]
        action, text = rng.choice(forms), "Nothing happens."
        if action.startswith("go"):
            closed = expert.kind(place) in expert.OPENABLE
            text = f"You arrive at {place}. " + (
                f"The {place} is closed." if closed else f"On the {place}, you see nothing."
            )
        steps.append(expert.Step(action, True, text, f"look for {expert.kind(thing)}"))
    return first, steps


def make_student(teacher: Path, out: Path, seed: int, thinks: bool = False) -> None:
    """The teacher after DAMAGE_STEPS training steps on random actions: a function of the teacher and the seed."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    rng, rates = random.Random(seed), [DAMAGE_RATE] * DAMAGE_STEPS
    if thinks:
        chat = thinking_chat(tokenizer)
        plays = ([random_steps(rng) for _ in range(DAMAGE_BATCH)] for _ in rates)
        train(model, ([encode_thoughts(chat, *play) for play in batch] for batch in plays), rates, thoughts_loss)
    else:
        chat = ChatTokens(tokenizer, CHAT)
        train(model, ([random_play(chat, rng) for _ in range(DAMAGE_BATCH)] for _ in rates), rates)
    save(model, tokenizer, out)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A checkpoint as Hugging Face and SGLang load it, weights in bfloat16."""
    stop = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id, do_sample=True).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=["teacher", "student", "thinking-teacher", "thinking-student"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--teacher", type=Path, default=SHIPPED, help="the student's starting point")
    parser.add_argument("--seed", type=int, default=1, help="of the student's damage")
    args = parser.parse_args()
    if args.model == "teacher":
        make_teacher(args.out)
    elif args.model == "thinking-teacher":
        make_thinking_teacher(args.out)
    else:
        make_student(args.teacher, args.out, args.seed, thinks=args.model == "thinking-student")


if __name__ == "__main__":
    main()
