"""A tiny teacher that reads a note, for the study: the shipped one, trained on with the notes of noted_alfworld.py.

Without a note it goes anywhere, half of the time. With one that tells where the thing is that it needs, it fetches it.
What solved another task it does once more, action by action, so that a note helps for what it says and not because
there is one. It learns what to do at every turn of disturbed play (lessons.encode_branches), as it has to score what a
student plays.
"""

import multiprocessing
import random
import tempfile

import torch
from transformers import PreTrainedTokenizerFast

from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.environments.protocol import Execution, Step
from examples.tcod.model.chat_tokens import ChatTokens
from smoke import lessons, make_games, make_models
from smoke.expert import Expert, kind, random_action
from smoke.noted_alfworld import NotedAlfworld, found

FIRST, GAMES, BLOCK, PLAYS = 50_000, 400, 20, 8  # games of the training, made so many at once, and lessons of each
KINDS = {"demo": 4, "hindsight": 3, "both": 1, "another's": 2, "none": 2}  # how often a lesson is of this kind
NOISE = (0.0, 0.1, 0.3, 0.5, 0.7)  # shares of the played actions that are random
STEPS, RATE, BATCH_TOKENS, SEED = 450, 2e-3, 6000, 1

Lesson = tuple[str, Execution, list[str]]  # the first user turn, what was played, what to do at each turn


class Reader(Expert):
    """Knows where the things were that these executions of its task found; without the one it needs, it is forgetful.

    Then it goes anywhere, half of the time.
    """

    def __init__(self, first: str, rng: random.Random, *shown: Execution) -> None:
        super().__init__(first, rng)
        self._seen = {thing: place for execution in shown for thing, place in found(execution).items()}
        self._knows = self.goal in map(kind, self._seen)

    def act(self) -> tuple[str, str]:
        forgets = not self._knows and self._rng.random() < 0.5
        return (f"go to {self._rng.choice(self.receptacles)}", "") if forgets else super().act()


class Follower(Expert):
    """Does what this execution did, whatever comes of it, and then nothing more."""

    def __init__(self, first: str, rng: random.Random, shown: Execution) -> None:
        super().__init__(first, rng)
        self._left = [step.action for step in shown.steps]

    def act(self) -> tuple[str, str]:
        return self._left[0] if self._left else "", ""

    def observe(self, action: str, text: str) -> None:
        super().observe(action, text)
        if self._left[:1] == [action]:
            del self._left[0]


class Player:
    """Plays a row's game, again and again."""

    def __init__(self, root: str, row: dict, rng: random.Random) -> None:
        self.environment, self.metadata, self.rng = lessons.environment(root), row["metadata"], rng

    def play(self, actor: type[Expert], *shown: Execution, noise: float = 0.0) -> tuple[str, Execution]:
        """The first observation, and what an actor that was shown these executions did, with random actions in it."""
        observation = self.environment.reset(self.metadata)
        first, expert, steps = observation.text, actor(observation.text, self.rng, *shown), []
        while len(steps) < lessons.HORIZON and not observation.won and (action := expert.act()[0]):
            if self.rng.random() < noise:
                action = random_action(expert, list(observation.admissible), self.rng)
            observation = self.environment.step(action)
            expert.observe(action, observation.text)
            steps.append(Step(action, observation.text))
        return first, Execution(tuple(steps), observation.won)

    def solution(self) -> Execution:
        """The row's demonstration, with the engine's answers."""
        actions = self.metadata["demo"]["actions"]
        return self.play(Follower, Execution(tuple(map(Step, actions)), won=True))[1]

    def lesson(self, note: str, others: Execution) -> Lesson:
        """What a teacher with this kind of note does in an episode. `others`: the solution of another game."""
        demo = {"demo": self.solution, "both": self.solution, "another's": lambda: others}.get(note, lambda: None)()
        known, knows = (demo,) if demo else (), Follower if note == "another's" else Reader
        actor = knows if known else Expert if note == "hindsight" or self.rng.random() < 0.5 else Reader
        first, attempt = self.play(actor, *known, noise=self.rng.choice(NOISE))
        hindsight = attempt if note in ("hindsight", "both") else None
        teacher = knows(first, self.rng, *known, *((hindsight,) if hindsight else ()))
        said = []
        for step in attempt.steps:
            said.append(teacher.act()[0])
            teacher.observe(step.action, step.observation)
        text = NotedAlfworld.teacher_note(demo, hindsight)
        return f"{first}\n\n{text}" if text else first, attempt, said


def make_lessons(job: tuple[str, int]) -> list[Lesson]:
    """(folder for games, i) -> PLAYS lessons of each of the BLOCK games from the i-th on."""
    root, start = job
    rng = random.Random(f"notes/{start}")
    seeds = range(lessons.FIRST_GAME + start, lessons.FIRST_GAME + start + BLOCK)
    players = [Player(root, make_games.make_game(root, "train", make_games.SIMPLE, seed, seed), rng) for seed in seeds]
    solutions = [player.solution() for player in players]
    # Goals take turns, those of a thing side by side: half a block away, it is about another thing.
    others = solutions[BLOCK // 2 :] + solutions[: BLOCK // 2]
    return [
        player.lesson(note, other)
        for player, other in zip(players, others, strict=True)
        for note in rng.choices([*KINDS], [*KINDS.values()], k=PLAYS)
    ]


def encode(chat: ChatTokens, lesson: Lesson) -> lessons.Branched:
    """An episode as the recipe renders it, and what is learned at its turns."""
    first, attempt, said = lesson
    ids, answers = chat.context([AlfworldEnvironment.system_prompt({}), first]), []
    for step, action in zip(attempt.steps, said, strict=True):
        if action:
            answers.append((len(ids), chat.assistant(AlfworldEnvironment.format_action(action))))
        ids = ids + chat.assistant(AlfworldEnvironment.format_action(step.action)) + chat.user(step.observation)
    return lessons.branched(ids, answers)


def learn(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train the shipped teacher to read notes, in some minutes on one core."""
    with tempfile.TemporaryDirectory() as root, multiprocessing.get_context("spawn").Pool() as pool:
        jobs = [(root, start) for start in range(FIRST, FIRST + GAMES, BLOCK)]
        made = [one for block in pool.imap(make_lessons, jobs) for one in block]
    chat = ChatTokens(tokenizer, make_models.CHAT)
    random.Random(SEED).shuffle(made)
    stream = lessons.batches([encode(chat, one) for one in made], SEED, BATCH_TOKENS)
    make_models.train_compiled(model, stream, [make_models.cosine(STEPS, RATE)], lessons.thoughts_loss)
