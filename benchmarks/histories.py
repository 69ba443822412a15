"""What the two histories cost: append, one growing context, against turns, the template's own rendering at each turn.

Three parts; in all of them the students think, and the thoughts are kept in training (tcod_thoughts: keep).

    played     Real ALFWorld games with the smoke run's thinking models, a weak student and a strong one, on two real
               SGLang servers: the same games with either history.
    lengths    Episodes of a given number of turns and length of thoughts, made of the games' words, scored by the real
               SGLang and trained with the smoke run's trainer.
    large      Arithmetic for Qwen3-8B: no run.

    sampled         tokens that the student sampled
    trained         length of all sequences that the trainer runs forward and backward
    student, teacher prefilled    tokens that the servers computed: those of the prompts less those they had cached

The teacher's requests, each time on an empty cache:

    append     one for an episode, log-probs from the end of its prompt on
    turns      one for each turn, an episode's in order
    official   one for each turn, in any order, log-probs from position 0 on, which no cache serves (paper)
"""

import argparse
import asyncio
import math
import os
import random
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import ray
import yaml
from transformers import AutoTokenizer

from benchmarks import report
from benchmarks.tokens import score
from examples.tcod import tcod_rollout
from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.episode.history import AppendHistory, History, TurnHistory
from examples.tcod.episode.record import EpisodeRecord
from examples.tcod.model.chat_tokens import ChatTokens
from examples.tcod.model.student import Response
from examples.tcod.model.teacher import scoring_request
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.http_utils import init_http_client
from slime.utils.misc import SingletonMeta
from smoke import hooks, make_games, make_models, run, train_arm
from smoke.servers import HERE, SGLangServer
from smoke.trainer import Trainer

HISTORIES = ("append", "turns")
SCHEMES = (*HISTORIES, "official")
CONTEXT = 4000
EPISODES = 4  # of each number of turns and length of thoughts
TURNS, THOUGHTS = (5, 10, 20, 30), (8, 32, 80)  # tokens; the longest sequence is one of 4,096

# Qwen3-8B, and episodes as SCALE.md has them, but for the thoughts.
LARGE = {"layers": 36, "attention": 32 * 128, "parameters": 7.6e9, "cache bytes": 147_456}
PROMPT, ANSWER, OBSERVATION = 500, 30, 200
LARGE_TURNS, LARGE_THOUGHTS = (5, 10, 20, 30, 50), (50, 200, 500, 1000, 2000, 4000)

Sequence = tuple[list[int], int]  # token ids, and how many of them are its prompt


def requests_for(sequences: list[Sequence], scheme: str) -> list[dict[str, Any]]:
    start = {"official": lambda prompt: 0}.get(scheme, lambda prompt: prompt - 1)
    return [scoring_request(start(prompt), input_ids=ids) for ids, prompt in sequences]


def scored(url: str, episodes: list[list[Sequence]], scheme: str) -> dict[str, float]:
    """What the teacher computes for these episodes, and how long it takes."""
    requests = [requests_for(sequences, scheme) for sequences in episodes]
    if scheme == "official":
        requests = [[one] for each in requests for one in each]
        random.Random(0).shuffle(requests)
    prefilled, seconds = asyncio.run(score(url, requests))
    sent = sum(len(one["input_ids"]) for each in requests for one in each)
    return {"prefilled": sum(prefilled), "cached": 1 - sum(prefilled) / sent, "s": seconds}


# ------------------------------------------------------------------------------------------------------ played


def play(
    options: Any, student: Path, ports: list[int], history: str, trainer: Trainer
) -> tuple[list[list[Sequence]], dict[str, Any]]:
    """One rollout of all games with a history. Returns the episodes' sequences, and what they cost."""
    config = options.out / f"{history}.yaml"
    settings = yaml.safe_load((HERE / "configs" / "thoughts_f2b.yaml").read_text())
    config.write_text(yaml.safe_dump({**settings, "tcod_variant": "opd", "tcod_history": history}))
    arm = ["--config", config, "--student", student, "--data", options.out, "--run-dir", options.out]
    arm += ["--student-port", ports[0], "--teacher-port", ports[1], "--context-len", CONTEXT]
    arm += ["--batch", options.games, "--seed", 1]
    args = train_arm.slime_args(train_arm.option_parser().parse_args([str(part) for part in arm]))
    SingletonMeta._instances.clear()
    init_http_client(args)
    output = tcod_rollout.generate_rollout(args, 0, RolloutDataSourceWithBuffer(args))
    episodes = [hooks.flat([one]) for group in output.samples for one in group]
    batch = hooks.convert_samples_to_train_data(args, hooks.flat(output.samples))
    started = time.monotonic()
    trainer.step(batch)
    training_s = time.monotonic() - started
    prompts = [one[0].prefix_cache_info for one in episodes]
    of = output.metrics
    return [[(s.tokens, len(s.tokens) - s.response_length) for s in one] for one in episodes], {
        "turns": of["rollout/tcod/turns/student"],
        "won": of["rollout/tcod/success"],
        "sampled": sum(sum(s.loss_mask) for one in episodes for s in one),
        "student prefilled": sum(info.total_prompt_tokens - info.cached_tokens for info in prompts),
        "student cached": sum(i.cached_tokens for i in prompts) / sum(i.total_prompt_tokens for i in prompts),
        "rollout s": of["rollout/tcod/rollout_s"],
        "training s": training_s,
    }


def played(options: Any, student: Path, strong: Path, servers: list[SGLangServer]) -> list[dict[str, Any]]:
    rows = []
    for name, checkpoint in (("weak", student), ("strong", strong)):
        train_arm.push_weights(servers[0].port, checkpoint, version=name)
        for history in HISTORIES:
            trainer = Trainer(checkpoint, lr=0.0)
            episodes, costs = play(options, student, [server.port for server in servers], history, trainer)
            for scheme in (history,) if history == "append" else SCHEMES[1:]:
                teacher = scored(servers[1].url, episodes, scheme)
                rows.append({"student": name, "history": scheme, "episodes": len(episodes)} | costs)
                rows[-1] |= {"trained": sum(len(ids) for one in episodes for ids, _ in one)}
                rows[-1] |= {f"teacher {what}": value for what, value in teacher.items()}
    return rows


# ------------------------------------------------------------------------------------------------------ lengths


def invented(history: History, turns: int, thought: int, rng: random.Random) -> list[Sequence]:
    """An episode of so many turns, with thoughts of so many tokens, as it is left for training."""
    first, steps = make_models.random_steps(rng, turns)
    history.begin(AlfworldEnvironment.system_prompt({}), first)
    words = make_models.entities()
    for turn, step in enumerate(steps):
        think = "".join(rng.choices(words, k=thought))
        ids = history.chat.assistant(f"<think>\n{think}\n</think>\n\n{AlfworldEnvironment.format_action(step.action)}")
        history.respond(Response(ids, [-1.0] * len(ids), {}))
        if turn + 1 < turns and not history.observe(step.text):
            raise ValueError(f"{turns} turns with thoughts of {thought} tokens do not fit")
    tokens, record = history.tokens, EpisodeRecord(prompts=history.prompts)
    return [(tokens[start:end], begin - start) for start, begin, end in record.sequences(len(tokens))]


def train_batch(episodes: list[list[Sequence]]) -> dict[str, list[Any]]:
    """slime's batch of these episodes, with every response token trained: what a token weighs costs no time."""
    numbered = [(i, ids, len(ids) - prompt) for i, one in enumerate(episodes) for ids, prompt in one]
    filled = {
        name: [[-1.0] * length for *_, length in numbered] for name in ("teacher_log_probs", "rollout_log_probs")
    }
    return filled | {
        "tokens": [ids for _, ids, _ in numbered],
        "response_lengths": [length for *_, length in numbered],
        "loss_masks": [[1] * length for *_, length in numbered],
        "rewards": [0.0] * len(numbered),
        "rollout_ids": [i for i, *_ in numbered],
    }


def lengths(options: Any, checkpoint: Path, teacher: SGLangServer) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    kinds: dict[str, type[History]] = {"append": AppendHistory, "turns": TurnHistory}
    chats = {
        name: ChatTokens(tokenizer, {"enable_thinking": True}, history=name, thoughts="keep") for name in HISTORIES
    }
    trainer, rows = Trainer(checkpoint, lr=0.0), []
    for turns in TURNS:
        for thought in THOUGHTS:
            row: dict[str, Any] = {"turns": turns, "thought": thought}
            made = {
                name: [invented(kind(chats[name], CONTEXT), turns, thought, random.Random(i)) for i in range(EPISODES)]
                for name, kind in kinds.items()
            }
            made["official"] = made["turns"]
            for scheme, episodes in made.items():
                times = [scored(teacher.url, episodes, scheme) for _ in range(options.repeats)]
                row |= {f"{scheme} prefilled": times[0]["prefilled"], f"{scheme} cached": times[0]["cached"]}
                row[f"{scheme} s"] = median(one["s"] for one in times)
            for history in HISTORIES:
                batch, seconds = train_batch(made[history]), []
                for _ in range(options.repeats):
                    started = time.monotonic()
                    trainer.step(batch)
                    seconds.append(time.monotonic() - started)
                row |= {f"{history} trained": sum(map(len, batch["tokens"]))}
                row |= {f"{history} longest": max(map(len, batch["tokens"])), f"{history} training s": median(seconds)}
            rows.append(row)
            print(report.table([row]), flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------ large


def large_sequences(history: str, turns: int, thought: float) -> list[float]:
    """Lengths of an episode's sequences."""
    shown = [PROMPT + turn * (ANSWER + OBSERVATION) for turn in range(turns)]
    if history == "append":
        return [shown[-1] + ANSWER + turns * thought]
    return [before + thought + ANSWER for before in shown]


def large_training(lengths: list[float]) -> float:
    """Floating point operations of a forward and a backward pass: 6 a parameter and token, and causal attention."""
    attention = 6 * LARGE["layers"] * LARGE["attention"]  # 2 products of 2 operations, three times, half of the square
    return sum(6 * LARGE["parameters"] * length + attention * length**2 for length in lengths)


def large_prefill(history: str, turns: int, thought: float, cached: bool) -> float:
    """Tokens that a teacher computes for an episode."""
    lengths = large_sequences(history, turns, thought)
    if history == "append" or not cached:
        return sum(lengths)
    # Behind what the turn before was shown: its answer as the template writes it, the observation, what was said.
    return lengths[0] + sum(ANSWER + OBSERVATION + thought + ANSWER for _ in lengths[1:])


def cheaper_from(turns: int) -> float:
    """The length of thoughts from which training on turns takes fewer operations than on one sequence."""
    low, high = 0.0, 1e6
    while high - low > 1:
        middle = (low + high) / 2
        costs = {name: large_training(large_sequences(name, turns, middle)) for name in HISTORIES}
        low, high = (low, middle) if costs["turns"] < costs["append"] else (middle, high)
    return high


def large() -> list[dict[str, Any]]:
    rows = []
    for turns in LARGE_TURNS:
        for thought in LARGE_THOUGHTS:
            one, several = (large_sequences(name, turns, thought) for name in HISTORIES)
            rows.append(
                {
                    "turns": turns,
                    "thought": thought,
                    "append longest": max(one),
                    "turns longest": max(several),
                    "append cache GB": max(one) * LARGE["cache bytes"] / 1e9,
                    "turns cache GB": max(several) * LARGE["cache bytes"] / 1e9,
                    "trained, ratio": sum(several) / sum(one),
                    "training, ratio": large_training(several) / large_training(one),
                    "prefilled, ratio": large_prefill("turns", turns, thought, True) / sum(one),
                    "prefilled without cache, ratio": sum(several) / sum(one),
                    "cheaper from": math.ceil(cheaper_from(turns)),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens and time of tcod_history append and turns.")
    parser.add_argument("--games", type=int, default=32, help="episodes that are played with each history")
    parser.add_argument("--repeats", type=int, default=3, help="timings of invented episodes")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "histories", help="games and logs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["SMOKE_GAMES"] = str(options.out)
    make_games.make_games(options.out, options.games, 1)
    strong, student = run.models(HERE / "out" / "models", seed=1, thinks=True)
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="warning", log_to_driver=False)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(SGLangServer(f"{name} server", checkpoint, options.out / f"{name}.log"))
            for name, checkpoint in (("student", student), ("teacher", strong))
        ]
        for server in servers:
            server.wait_ready()
        tables = {"played": played(options, student, strong, servers)}
        print(report.table(tables["played"]), flush=True)
        tables["lengths"] = lengths(options, strong, servers[1])
    tables["large"] = large()
    for name, rows in tables.items():
        print(f"{name}\n{report.table(rows)}\n")
    rows = [{"table": name, **row} for name, rows in tables.items() for row in rows]
    print(f"written to {report.write('histories', rows)}")


if __name__ == "__main__":
    main()
