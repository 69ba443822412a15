"""Overhead of the episode loop: an engine of fixed latency, environments that cost nothing, many episodes at once.

The engine is a process of its own that answers every request after LATENCY_S with the same few tokens, so an episode
of T turns takes at least T x LATENCY_S however many there are. Measured in the rollout process: CPU time per turn, and
wall time over that ideal. Contexts grow as in ALFWorld, by about 100 tokens a turn.

    recipe            as it is
    slime's post      the recipe's loop, its requests sent by slime.utils.http_utils.post
    slime's retool    slime's own multi-turn example (examples/retool) with a tool that costs nothing; with SLIME_DIR
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import slime
from benchmarks import SLIME, report
from examples.tcod import tcod_rollout
from examples.tcod.environments.protocol import Environment, Observation
from examples.tcod.episode import loop as episode
from examples.tcod.model.client import SGLangClient
from slime.utils.async_utils import run
from slime.utils.http_utils import init_http_client, post
from slime.utils.misc import SingletonMeta
from slime.utils.types import Sample
from smoke import hooks
from tests.support.rig import UNTEMPERED
from tests.support.toys import LocalPool, save_tokenizer

TURNS, LATENCY_S = 30, 1.0
SLIMES_LIMIT = 64  # the cost of a turn with slime's post grows with the episodes at once: 128 take minutes
REPLY_IDS = list(range(40, 60))  # twenty bytes: no action, the episode goes on


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


class SlimesClient(SGLangClient):
    """The recipe's client with slime's way of sending a request."""

    async def post(self, url: str, payload: dict[str, Any], headers: Any = None, is_unwanted: Any = None) -> Any:
        return await post(url, payload, headers=headers)


def loops(turns: int) -> dict[str, tuple[Callable[..., Coroutine], type]]:
    """name: (slime's custom generate function for episodes of that many turns, client of the recipe)."""
    found = {"recipe": (tcod_rollout.generate, SGLangClient)}
    found["slime's post"] = (tcod_rollout.generate, SlimesClient)
    example = Path(slime.__file__).resolve().parents[1] / "examples" / "retool"
    if example.is_dir():
        sys.path.append(str(example))
        import generate_with_retool as retool

        async def useless(prediction: str) -> tuple[str, bool]:
            return "x" * 80, False  # as long as a user turn of Endless in the chat template

        retool.execute_predictions = useless
        retool.tool_registry.get_tool_specs = lambda: []  # a prompt as short as the recipe's here
        retool.TOOL_CONFIGS["max_turns"] = turns
        found["slime's retool"] = (retool.generate, SGLangClient)
    return found


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


def measure(loop: str, port: int, episodes: int, folder: Path, turns: int = TURNS) -> dict[str, Any]:
    """One row: `episodes` at once, of so many turns each."""
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
    SingletonMeta._instances.clear()
    init_http_client(args)
    generate, tcod_rollout.SGLangClient = loops(turns)[loop]
    samples = [Sample(index=i, prompt="Go on.", metadata={"tcod": {"n": 0, "k": turns}}) for i in range(episodes)]

    async def play() -> None:
        params = {**UNTEMPERED, "max_new_tokens": 64}
        await asyncio.gather(*(generate(args, sample, params) for sample in samples))

    cpu, wall = time.process_time(), time.monotonic()
    run(play())
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    assert all(sum(sample.loss_mask) == turns * len(REPLY_IDS) for sample in samples)
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
    parser = argparse.ArgumentParser(description="Overhead of the episode loop at a fixed engine latency.")
    parser.add_argument("--episodes", type=int, nargs="+", default=[8, 64, 256, 512, 1024], help="episodes at once")
    options = parser.parse_args()
    episode.EnvironmentPool = LocalPool
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=engine, args=(there,), daemon=True)
    server.start()
    port = here.recv()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        names = list(loops(TURNS))
        for name in names:
            measure(name, port, 8, Path(folder), turns=2)  # connections, tokenizer
        for episodes in options.episodes:
            for name in names if episodes <= SLIMES_LIMIT else names[:1]:
                rows.append(measure(name, port, episodes, Path(folder)))
                print(f"{name}, {episodes} episodes: {rows[-1]['CPU ms per turn']:.2f} ms per turn")
    server.terminate()
    print(report.table(rows))
    slimes = re.sub(r" at \S+", "", SLIME)  # without where it lies
    print(f"written to {report.write('loop', rows, slime=slimes, turns=TURNS, latency_s=LATENCY_S)}")


if __name__ == "__main__":
    main()
