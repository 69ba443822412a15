"""Environments in Ray's worker processes never hold up slime's event loop."""

import asyncio

from examples.tcod import tcod_rollout
from examples.tcod.environments.pool import EnvironmentPool
from examples.tcod.episode.episode import Episode, EpisodeRecord
from examples.tcod.settings import build
from slime.utils.async_utils import run
from slime.utils.types import Sample
from tests.support.rig import UNTEMPERED


def test_worker_processes_play_and_the_event_loop_goes_on_meanwhile(rig, real_ray, monkeypatch):
    monkeypatch.setattr(build, "EnvironmentPool", EnvironmentPool)
    args = rig.args([{"goal": 9}], tcod_environment="tests.support.corridor.SlowCorridor")
    sample = Sample(index=0, metadata={"goal": 9, "tcod": Episode(EpisodeRecord(n=0, k=4))})

    async def play():
        episode = asyncio.ensure_future(tcod_rollout.generate(args, sample, {**UNTEMPERED, "max_new_tokens": 64}))
        ticks = 0
        while not episode.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    # Four steps of 0.3 s: a loop that waited for them would tick about once per request.
    assert run(play()) > 40
    assert sample.status == Sample.Status.COMPLETED and Episode.of(sample).record.env_s > 1.2
