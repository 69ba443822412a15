"""Overhead of the episode loop: an engine of fixed latency, environments that cost nothing, many episodes at once.

The engine is a process of its own that answers every request after LATENCY_S with the same few tokens, so an episode
of T turns takes at least T x LATENCY_S however many there are. Measured in the rollout process: CPU time per turn, and
wall time over that ideal. Contexts grow as in ALFWorld, by about 100 tokens a turn.

    recipe            as it is
    slime's post      the recipe's loop, its requests sent by slime.utils.http_utils.post
    slime's retool    slime's own multi-turn example (examples/retool) with a tool that costs nothing

The last two need SLIME_DIR. A row in which a loop did not send its requests as its name says ends the benchmark.
"""

import asyncio
import json
import multiprocessing
import re
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import slime
from benchmarks import SLIME, report
from examples.tcod import tcod_rollout
from examples.tcod.environments.protocol import Environment, Observation
from examples.tcod.episode.episode import Episode, EpisodeRecord
from examples.tcod.model import student
from examples.tcod.settings import build
from examples.tcod.settings.run import run_of
from examples.tcod.training.samples import to_samples
from slime.utils import http_utils
from slime.utils.async_utils import run
from slime.utils.misc import SingletonMeta
from slime.utils.types import Sample
from smoke import hooks
from tests.support.rig import UNTEMPERED
from tests.support.toys import LocalPool, save_tokenizer

TURNS, LATENCY_S = 30, 1.0
SLIMES_LIMIT = 64  # the cost of a turn with slime's post grows with the episodes at once: 128 take minutes
REPLY_IDS = list(range(40, 60))  # twenty bytes: no action, the episode goes on


class SlimesPost:
    """slime's way of sending a request; counts them."""

    sent = 0

    async def __call__(self, url: str, payload: dict[str, Any], **further: Any) -> Any:
        SlimesPost.sent += 1
        return await http_utils.post(url, payload, **further)


# -------------------------------------------------------------------------------------------------- the loops
# How an episode of so many turns is played: a function of slime's arguments and a sample. `recipe`, SlimesClient and
# Endless are all that this file knows of the recipe.

PARAMS = {**UNTEMPERED, "max_new_tokens": 64}
Play = Callable[[Namespace, Sample], Coroutine]
OwnClient = student.SGLangClient


class SlimesClient(OwnClient):
    """The recipe's client, with slime's way of sending a request."""

    async def post(self, payload: dict[str, Any], session: str, check_wanted: Any) -> Any:
        return await SlimesPost()(self._url, payload, headers={"X-SMG-Routing-Key": session})


def recipe(turns: int, client: type = OwnClient) -> Play:
    build.EnvironmentPool = LocalPool  # no worker processes
    student.SGLangClient = client

    async def play(args: Namespace, sample: Sample) -> None:
        sample.metadata = {"tcod": Episode(EpisodeRecord(n=0, k=turns))}
        await tcod_rollout.generate(args, sample, PARAMS)
        to_samples(args, sample, run_of(args).chat.tokenizer)

    return play


class Endless(Environment):
    """Costs nothing and never ends."""

    def reset(self, metadata: dict[str, Any]) -> Observation:
        return Observation("x" * 60)

    def step(self, action: str) -> Observation:
        return Observation("x" * 40)

    check_row = staticmethod(lambda metadata, data_root: None)
    system_prompt = staticmethod(lambda metadata: "Go on.")
    render = staticmethod(lambda observation, first, admissible: observation.text)
    parse_action = staticmethod(lambda response: (response, True))
    format_action = staticmethod(lambda action: action)


def retool(turns: int) -> Play:
    sys.path.append(str(Path(slime.__file__).resolve().parents[1] / "examples" / "retool"))
    import generate_with_retool as example

    async def useless(prediction: str) -> tuple[str, bool]:
        return "x" * 80, False  # as long as a user turn of Endless in the chat template

    example.post, example.execute_predictions = SlimesPost(), useless
    example.tool_registry.get_tool_specs = lambda: []  # a prompt as short as the recipe's here
    example.TOOL_CONFIGS["max_turns"] = turns
    return lambda args, sample: example.generate(args, sample, PARAMS)


LOOPS = {"recipe": recipe, "slime's post": partial(recipe, client=SlimesClient), "slime's retool": retool}


# -------------------------------------------------------------------------------------------------- measuring


def engine(port: Any) -> None:
    """Serve POST /generate on a free port, sent through the pipe."""
    from aiohttp import web

    entries = [[-0.5, i, None] for i in REPLY_IDS]
    meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": entries, "weight_version": "0"}
    meta |= {"prompt_tokens": 1, "completion_tokens": len(REPLY_IDS), "cached_tokens": 0}
    body = json.dumps({"text": "", "output_ids": REPLY_IDS, "meta_info": meta}).encode()

    async def generate(request: web.Request) -> web.Response:
        arrived = time.monotonic()
        await request.read()
        await asyncio.sleep(LATENCY_S - (time.monotonic() - arrived))
        return web.Response(body=body, content_type="application/json")

    async def serve() -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(serve())


def slime_args(port: int, episodes: int, folder: Path, turns: int) -> Namespace:
    args = hooks.rollout_args(
        hf_checkpoint=str(folder),
        apply_chat_template_kwargs={"enable_thinking": False},
        rollout_batch_size=episodes,
        rollout_max_response_len=64,
        rollout_max_context_len=16_000,
        sglang_router_ip="127.0.0.1",
        sglang_router_port=port,
        sglang_server_concurrency=2048,
        rollout_num_gpus=1,
        rm_url="http://127.0.0.1:9/generate",
    )
    settings = {"variant": "opd", "horizon": turns, "environment": "benchmarks.loop.Endless", "data_root": str(folder)}
    vars(args).update({f"tcod_{key}": value for key, value in settings.items()})
    return args


def measure(loop: str, port: int, episodes: int, folder: Path, turns: int = TURNS) -> dict[str, Any]:
    """One row: `episodes` at once, of so many turns each. Raises RuntimeError where another loop ran."""
    args = slime_args(port, episodes, folder, turns)
    SingletonMeta._instances.clear()
    http_utils.init_http_client(args)
    play = LOOPS[loop](turns)
    samples = [Sample(index=i, prompt="Go on.") for i in range(episodes)]

    async def play_all() -> None:
        await asyncio.gather(*(play(args, sample) for sample in samples))

    SlimesPost.sent = 0
    cpu, wall = time.process_time(), time.monotonic()
    run(play_all())
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    made = sum(sum(sample.loss_mask) for sample in samples) / len(REPLY_IDS)
    sent = {"slime's post": SlimesPost.sent, "its own": made - SlimesPost.sent}
    if made != episodes * turns or sent["its own" if loop == "recipe" else "slime's post"] != made:
        raise RuntimeError(f"{loop}: {made:.0f} of {episodes * turns} requests were answered, sent by {sent}")
    return {
        "loop": loop,
        "episodes": episodes,
        "CPU ms per turn": 1000 * cpu / (episodes * turns),
        "wall s": wall,
        "wall / ideal": wall / (turns * LATENCY_S),
        "turns per s": episodes * turns / wall,
        "tokens at the end": len(samples[0].tokens),
    }


def main() -> None:
    options = report.options(
        __doc__,
        {"episodes": ([8, 64, 256, 512, 1024], "at once"), "repeats": (1, "of each; the median CPU time counts")},
    )
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=engine, args=(there,), daemon=True)
    server.start()
    port = here.recv()
    names = list(LOOPS) if "stand-in" not in SLIME else ["recipe"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        for name in names:
            measure(name, port, 8, Path(folder), turns=2)  # connections, tokenizer
        for episodes in options.episodes:
            shown = names if episodes <= SLIMES_LIMIT else names[:1]
            row = partial(measure, port=port, episodes=episodes, folder=Path(folder))
            found = report.in_turns(shown, options.repeats, row)
            rows += [sorted(of, key=lambda row: row["CPU ms per turn"])[len(of) // 2] for of in found.values()]
    server.terminate()
    slimes = re.sub(r" at \S+", "", SLIME)  # without where it lies
    report.publish("loop", rows, slime=slimes, turns=TURNS, latency_s=LATENCY_S, repeats=options.repeats)


if __name__ == "__main__":
    main()
