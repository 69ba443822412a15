"""What the teacher prefills and the student trains on: one sequence per trajectory against a sample per turn.

Real ALFWorld games, real trajectories of T = 30 turns at most, and the teacher on the real SGLang. The same finished
trajectories are scored in four ways, each on an empty cache, AT_ONCE trajectories at a time, a trajectory's own
requests one after the other, so that a later turn finds what an earlier one left in the cache:

    ours          one request per trajectory, log-probs from the end of the prompt on
    stock         one request per trajectory, log-probs from position 0 on, as slime's single-turn example asks
    per turn      one request per turn with its whole prefix, log-probs from the turn on (the cache helps)
    per turn, 0   the same, log-probs from position 0 on, as an engine without partial prompt log-probs does it

"prefilled" counts what the server computed: prompt tokens less those it had cached. "trained" is the length of the
sequences that the trainer runs forward and backward: a sample per turn repeats its prefix. Both are given as totals,
and as the ratio to ours of each trajectory.
"""

import asyncio
import time
from argparse import Namespace
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import ray
import requests

from benchmarks import report
from examples.tcod import tcod_rollout
from examples.tcod.model.teacher import scoring_request
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.http_utils import init_http_client
from slime.utils.misc import SingletonMeta
from smoke import make_games, plays, run, train_arm
from smoke.servers import HERE, SGLangServer

OUT = HERE / "out" / "tokens"
TURNS, CONTEXT, AT_ONCE = 30, 2000, 8
SCHEMES = ("ours", "stock", "per turn", "per turn, 0")
SETS = {  # name: (variant, the student is the teacher itself, samples per task)
    "OPD, weak student": ("opd", False, 1),
    "OPD, strong student": ("opd", True, 1),
    "B2F, groups of 4": ("b2f", True, 4),
}
Payloads = list[list[dict[str, Any]]]  # the scoring requests of each trajectory


def requests_for(sample: Any, scheme: str) -> list[dict[str, Any]]:
    """The scoring requests that a scheme makes for one trajectory."""
    prompt = len(sample.tokens) - sample.response_length
    if scheme == "ours":
        return [scoring_request(prompt - 1, input_ids=sample.tokens)]
    if scheme == "stock":
        return [scoring_request(0, input_ids=sample.tokens)]
    sampled = [0, *sample.loss_mask, 0]
    starts, ends = ([i for i, pair in enumerate(pairwise(sampled)) if pair == edge] for edge in ((0, 1), (1, 0)))
    return [
        scoring_request(prompt + start - 1 if scheme == "per turn" else 0, input_ids=sample.tokens[: prompt + end])
        for start, end in zip(starts, ends, strict=True)
    ]


async def score(url: str, trajectories: Payloads) -> tuple[list[int], float]:
    """(prefilled tokens of each trajectory, wall seconds) on an empty cache."""
    requests.post(f"{url}/flush_cache", timeout=60).raise_for_status()
    slots = asyncio.Semaphore(AT_ONCE)
    async with aiohttp.ClientSession() as session:

        async def prefilled(payloads: list[dict[str, Any]]) -> int:
            tokens = 0
            async with slots:
                for payload in payloads:
                    async with session.post(f"{url}/generate", json=payload) as response:
                        response.raise_for_status()
                        meta = (await response.json())["meta_info"]
                        tokens += meta["prompt_tokens"] - meta["cached_tokens"]
            return tokens

        started = time.monotonic()
        counts = await asyncio.gather(*map(prefilled, trajectories))
        return counts, time.monotonic() - started


def measure(samples: list[Any], url: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Per scheme: requests, prefilled and trained tokens of each trajectory, median seconds over `repeats`."""
    payloads = {scheme: [requests_for(sample, scheme) for sample in samples] for scheme in SCHEMES}
    runs = report.in_turns(SCHEMES, repeats, lambda scheme: asyncio.run(score(url, payloads[scheme])))
    return {
        scheme: {
            "requests": sum(map(len, payloads[scheme])),
            "prefilled": runs[scheme][0][0],
            "trained": [sum(len(payload["input_ids"]) for payload in one) for one in payloads[scheme]],
            "s": median(seconds for _, seconds in runs[scheme]),
        }
        for scheme in SCHEMES
    }


def totals(name: str, measured: dict[str, dict[str, Any]]) -> report.Rows:
    """One row per scheme."""
    ours = measured["ours"]
    return [
        {
            "trajectories": name,
            "scheme": scheme,
            "requests": of["requests"],
            "prefilled": sum(of["prefilled"]),
            "/ ours": sum(of["prefilled"]) / sum(ours["prefilled"]),
            "trained": sum(of["trained"]),
            "trained / ours": sum(of["trained"]) / sum(ours["trained"]),
            "s": of["s"],
            "s / ours": of["s"] / ours["s"],
        }
        for scheme, of in measured.items()
    ]


def ratios(name: str, samples: list[Any], measured: dict[str, dict[str, Any]]) -> report.Rows:
    """Quartiles over trajectories of what a scheme takes of each, over what ours takes; failed and won ones apart."""
    rows = []
    for outcome, reward in (("failed", 0.0), ("won", 1.0)):
        chosen = [i for i, sample in enumerate(samples) if sample.reward == reward]
        if len(chosen) < 4:  # no quartiles
            continue
        half = median(len(samples[i].metadata["tcod"]["turns"]) for i in chosen) / 2
        for scheme in SCHEMES[1:]:
            row = {"trajectories": f"{name}, {outcome}", "number": len(chosen), "T / 2": half, "scheme": scheme}
            for what in ("prefilled", "trained"):
                of = [measured[scheme][what][i] / measured["ours"][what][i] for i in chosen]
                row |= zip((f"{what} {n}/4" for n in (1, 2, 3)), quantiles(of, n=4, method="inclusive"), strict=True)
            rows.append(row)
    return rows


def play(games: int, model: Path, ports: list[int], variant: str, group: int) -> list[Any]:
    """Finished trajectories of one rollout."""
    settings = plays.settings_of("alfworld", variant, tcod_data_root=str(OUT), tcod_horizon=TURNS, tcod_k_start=3)
    config = plays.write_settings(OUT / f"{variant}.yaml", settings)
    arm = ["--config", config, "--student", model, "--data", OUT, "--run-dir", OUT, "--context-len", CONTEXT]
    arm += ["--student-port", ports[0], "--teacher-port", ports[1], "--batch", games // group]
    args = train_arm.slime_args(train_arm.option_parser().parse_args([str(part) for part in arm]))
    args.n_samples_per_prompt = group
    SingletonMeta._instances.clear()
    init_http_client(args)
    output = tcod_rollout.generate_rollout(args, 0, RolloutDataSourceWithBuffer(args))
    return [sample for samples in output.samples for sample in samples]


def play_and_score(options: Namespace, strong: Path, weak: Path, servers: list[SGLangServer]) -> dict[str, Any]:
    """The three tables."""
    rows, distribution, lengths = [], [], []
    for name, (variant, is_teacher, group) in SETS.items():
        train_arm.push_weights(servers[0].port, strong if is_teacher else weak, version=name)
        samples = play(options.games, strong, [server.port for server in servers], variant, group)
        turns = [len(sample.metadata["tcod"]["turns"]) for sample in samples]
        won = sum(sample.reward for sample in samples) / len(samples)
        lengths.append({"trajectories": name, "won": won, "median turns": median(turns), "turns": sorted(turns)})
        measured = measure(samples, servers[1].url, options.repeats)
        rows += totals(name, measured)
        distribution += ratios(name, samples, measured)
    return {"rows": rows, "each_over_ours_quartiles": distribution, "trajectories": lengths}


def main() -> None:
    options = report.options(__doc__, {"games": (32, "trajectories per set"), "repeats": (3, "timings per scheme")})
    make_games.make_games(OUT, options.games, 1)
    strong, weak = run.models(HERE / "out" / "models", seed=1, thinks=False)
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="warning", log_to_driver=False)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(SGLangServer(f"{name} server", model, OUT / f"{name}.log"))
            for name, model in (("student", weak), ("teacher", strong))
        ]
        for server in servers:
            server.wait_ready()
        tables = play_and_score(options, strong, weak, servers)
    report.publish("tokens", **tables, horizon=TURNS, at_once=AT_ONCE)


if __name__ == "__main__":
    main()
