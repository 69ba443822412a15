"""Episodes on any SGLang server, outside training: what collect_demos.py and evaluate.py share.

It is the recipe's one episode loop over the full horizon, with no curriculum, no teacher, and no slime.
"""

import argparse
import asyncio
import itertools
import json
import logging
import uuid
from argparse import Namespace
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from .. import ConfigError, Failure
from ..episode.demonstration import Demonstration
from ..episode.loop import Assignment, EpisodePlayer, failures_go_to
from ..episode.record import Episode, EpisodeRecord
from ..episode.rows import Row, check_rows, check_unique, read_rows
from ..model.chat_tokens import ChatTokens, load_chat
from ..settings.build import new_player
from ..settings.checks import check_environment
from ..settings.config import TcodConfig
from ..settings.server_checks import probe
from .ray_start import start_ray

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
FAILURES_IN_A_ROW = 32  # then something is broken for good


@dataclass(frozen=True)
class Player:
    """A student on a server, and what its episodes need.

    Attributes:
        settings: what success depends on beside the games: results and journals record it.
    """

    config: TcodConfig
    player: EpisodePlayer
    sampling_params: dict[str, Any]
    max_context_len: int
    concurrency: int
    settings: dict[str, Any]

    def read_rows(self, path: Path) -> list[Row]:
        """The rows of a file, each checked by the environment and a task of its own. Raises ConfigError."""
        rows = read_rows(path)
        check_rows(rows, str(path), self.player.environment, self.config.tcod_data_root)
        check_unique(rows, path)
        return rows


def add_options(parser: argparse.ArgumentParser, temperature: float) -> None:
    """The options of `start`; `temperature` is the default one."""
    parser.add_argument("--url", required=True, help="the SGLang server: http://HOST:PORT")
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint that it serves, for the tokenizer")
    parser.add_argument("--temperature", type=float, default=temperature, help="default: %(default)s")
    parser.add_argument("--max-turn-len", type=int, default=512, help="tokens of one turn, default: %(default)s")
    parser.add_argument("--max-context-len", type=int, default=27648, help="of an episode, default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=64, help="episodes at once, default: %(default)s")
    parser.add_argument(
        "--apply-chat-template-kwargs",
        type=json.loads,
        help='of the chat template, as in training; default: {"enable_thinking": ..} as tcod_thoughts says',
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=HERE.parent / "configs" / "alfworld.yaml",
        help="YAML of tcod_* settings (horizon, environment, ...; the curriculum plays no part), default: %(default)s",
    )


def start(options: Namespace) -> Player:
    """Check the server against the options, and start Ray.

    Raises:
        ConfigError: with one sentence that names the option and the fix.
    """
    if options.concurrency < 1:
        raise ConfigError(f"--concurrency must be >= 1, got {options.concurrency}")
    if not 0 < options.max_turn_len < options.max_context_len:
        raise ConfigError(
            f"--max-turn-len {options.max_turn_len} bounds one turn: set it above 0 and below "
            f"--max-context-len {options.max_context_len}"
        )
    url = httpx.URL(options.url)
    if url.scheme not in ("http", "https") or not url.host or not url.port:
        raise ConfigError(f"--url must be http://HOST:PORT, got {options.url}")
    config = TcodConfig.read(options.config)
    check_environment(config)
    chat = _load_chat(options, config)
    for warning in chat.warnings:
        logger.warning("--model %s: %s", options.model, warning)
    _check_server(options, chat)
    start_ray(config.tcod_env_workers)
    sampling_params = {
        **{"temperature": options.temperature, "top_p": 1.0, "top_k": -1, "max_new_tokens": options.max_turn_len},
        **{"skip_special_tokens": False, "spaces_between_special_tokens": False},
    }
    settings = {
        "model": options.model,
        "temperature": options.temperature,
        "max_turn_len": options.max_turn_len,
        "max_context_len": options.max_context_len,
        "horizon": config.tcod_horizon,
        "environment": config.tcod_environment,
        "admissible": config.tcod_admissible,
        "history": config.tcod_history,
        "window": config.tcod_window,
        "thoughts": config.tcod_thoughts,
    }
    player = new_player(config, chat, options.url.rstrip("/"))
    return Player(config, player, sampling_params, options.max_context_len, options.concurrency, settings)


async def play(player: Player, rows: Iterable[Row]) -> AsyncIterator[tuple[int, Episode]]:
    """Play an episode for each row, `concurrency` of them at once.

    Yields:
        (position in `rows`, the episode), in the order in which they finish.

    Raises:
        RuntimeError: FAILURES_IN_A_ROW episodes failed one after the other.
    """
    waiting = enumerate(rows)
    running: set[asyncio.Task[tuple[int, Episode]]] = set()
    in_a_row: list[str] = []
    while True:
        for index, row in itertools.islice(waiting, player.concurrency - len(running)):
            running.add(asyncio.create_task(_play_row(player, index, row)))
        if not running:
            await player.player.pool.close()
            return
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for finished in done:
            index, episode = finished.result()
            failure = episode.record.failure
            in_a_row = [*in_a_row, failure] if failure else []
            yield index, episode
            if len(in_a_row) == FAILURES_IN_A_ROW:
                raise RuntimeError(
                    f"the last {FAILURES_IN_A_ROW} episodes failed ({dict(Counter(in_a_row))}): see the warnings above"
                )


async def _play_row(player: Player, index: int, row: Row) -> tuple[int, Episode]:
    episode = Episode(EpisodeRecord(evaluation=True))
    assignment = Assignment(
        metadata=row.metadata,
        plan=player.config.curriculum.full_plan(),
        demonstration=Demonstration(),
        sampling_params=player.sampling_params,
        max_context_len=player.max_context_len,
        session=uuid.uuid4().hex,
    )
    with failures_go_to(episode.fail):
        await player.player.play(assignment, episode)
    if failure := episode.record.failure:
        logger.warning("the episode of row %d failed, %s: %s", index + 1, failure, episode.record.detail)
    return index, episode


def _load_chat(options: Namespace, config: TcodConfig) -> ChatTokens:
    given = options.apply_chat_template_kwargs
    try:
        return load_chat(options.model, config.template_kwargs if given is None else given, **config.chat_choices)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--model {options.model}: {reason}; name the checkpoint that the server serves") from error


def _check_server(options: Namespace, chat: ChatTokens) -> None:
    try:
        limit = probe(options.url.rstrip("/"), chat)
    except (httpx.HTTPError, ValueError) as error:
        raise ConfigError(f"no SGLang server answers at --url {options.url} ({error}): start it first") from error
    except Failure as failure:
        raise ConfigError(
            f"the server at --url does not encode text as --model {options.model} does ({failure}): "
            "name the checkpoint that it serves"
        ) from failure
    if limit < options.max_context_len:
        raise ConfigError(
            f"the server takes sequences of at most {limit} tokens, less than --max-context-len "
            f"{options.max_context_len}: lower that, or raise the server's --context-length"
        )
