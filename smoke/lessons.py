"""What the tiny models learn from: demonstrations by a scripted searcher (expert.py), and random play.

A demonstration is the first observation of a game and its steps. The searcher's play is disturbed by random actions:
the disturbed turns are context, never a label.
"""

import functools
import multiprocessing
import random
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.model.chat_tokens import ChatTokens
from smoke import expert, make_games

HORIZON = 20
# FIRST_GAME + i is the seed of the i-th game, apart from the games of train.jsonl and heldout.jsonl.
FIRST_GAME, PLAYS = 100_000, 5
NOISE = (0.0, 0.1, 0.2, 0.3, 0.5)
BLOCK = 250  # demonstrations that are shuffled and batched together
BATCH_TOKENS = 4500

Demonstration = tuple[str, list[expert.Step]]
Example = tuple[list[int], list[int]]  # token ids, and 1 where a token is to be predicted
T = TypeVar("T", bound=tuple)  # an example of any kind: its ids come first


# ---------------------------------------------------------------------------------------------- demonstrations


@functools.cache
def environment(root: str) -> AlfworldEnvironment:
    return AlfworldEnvironment(root)


def play(job: tuple[str, int]) -> list[Demonstration]:
    """(folder for games, i) -> PLAYS demonstrations of the i-th game."""
    root, i = job
    seed = FIRST_GAME + i
    row = make_games.make_game(root, "train", make_games.SIMPLE, seed, seed)
    plays = []
    for number in range(PLAYS):
        rng = random.Random(f"{seed}/{number}")
        plays.append(expert.demonstrate(environment(root), row["metadata"], rng, rng.choice(NOISE), HORIZON)[:2])
    return plays


def demonstrations(games: Iterable[int], processes: int | None = None) -> list[Demonstration]:
    """The demonstrations of these games, in order, on the real engine."""
    with tempfile.TemporaryDirectory() as root, multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [one for plays in pool.imap(play, [(root, i) for i in games]) for one in plays]


def random_steps(rng: random.Random, turns: int = 10) -> Demonstration:
    """Random actions, each a label, with answers that resemble the engine's and thoughts that do not fit.

    It needs no engine.
    """
    always, optional = make_games.KITCHEN
    room = always + rng.sample(optional, rng.randint(0, make_games.MAX_ROOM - len(always)))
    places = sorted(f"{name.lower()} {room[:i].count(name) + 1}" for i, name in enumerate(room))
    things = [f"{name.lower()} 1" for name in make_games.TASKS[make_games.SIMPLE][1]]
    goal, target = (name.lower() for name in rng.choice(make_games.goals(make_games.SIMPLE)))
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
            state = f"The {place} is closed." if closed else f"On the {place}, you see nothing."
            text = f"You arrive at {place}. {state}"
        steps.append(expert.Step(action, True, text, f"look for {expert.kind(thing)}"))
    return first, steps


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
            made: list[list[T]] = [[]]
            for example in block:
                if (len(made[-1]) + 1) * len(example[0]) > tokens:
                    made.append([])
                made[-1].append(example)
            rng.shuffle(made)
            yield from made


# ------------------------------------------------------------------------------------------- without thoughts


def encode(chat: ChatTokens, first: str, steps: list[expert.Step]) -> Example:
    """A demonstration as the recipe renders an episode, with the expert's own answers as labels."""
    ids = chat.context([AlfworldEnvironment.system_prompt({}), first])
    labels = [0] * len(ids)
    for i, step in enumerate(steps):
        answer = chat.assistant(AlfworldEnvironment.format_action(step.action))
        after = chat.user(step.text) if i + 1 < len(steps) else []
        ids += answer + after
        labels += [int(step.label)] * len(answer) + [0] * len(after)
    return ids, labels


def label_loss(model: torch.nn.Module, batch: list[Example]) -> torch.Tensor:
    """Mean negative log-likelihood of the labelled tokens."""
    ids = pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)
    labels = pad_sequence([torch.tensor(labels, dtype=torch.bool) for _, labels in batch], batch_first=True)[:, 1:]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden[labels]), ids[:, 1:][labels])


# ----------------------------------------------------------------------------------------------- with thoughts


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
    texts, answers = [AlfworldEnvironment.system_prompt({}), first], []
    for i, step in enumerate(steps):
        context = chat.context(texts)
        action = AlfworldEnvironment.format_action(step.action)
        if step.label:
            answers.append((len(context), chat.assistant(f"<think>\n{step.thought}\n</think>\n\n{action}")))
        if i + 1 < len(steps):
            texts += [action, step.text]
    return branched(context, answers)


def branched(conversation: list[int], answers: list[tuple[int, list[int]]]) -> Branched:
    """Behind a conversation the answers that are learned, each (tokens of the conversation before it, its tokens)."""
    ids, positions, places = conversation, [*range(len(conversation))], []
    for before, answer in answers:
        places.append((len(ids), len(ids) + len(answer), before))
        ids, positions = ids + answer, [*positions, *range(before, before + len(answer))]
    return Branched(ids, positions, places)


def thoughts_loss(model: torch.nn.Module, batch: list[Branched]) -> torch.Tensor:
    """label_loss of answers that branch off."""
    ids = pad_sequence([torch.tensor(one.ids) for one in batch], batch_first=True)
    positions = pad_sequence([torch.tensor(one.positions) for one in batch], batch_first=True)
    mask = torch.stack([one.mask(ids.size(1)) for one in batch])[:, None]
    hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state
    places = [(row, *pair) for row, one in enumerate(batch) for pair in one.predictions()]
    rows, sources, targets = torch.tensor(places).T
    return F.cross_entropy(model.lm_head(hidden[rows, sources]), ids[rows, targets])
