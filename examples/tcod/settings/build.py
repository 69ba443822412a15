"""The one place that puts objects together: the run of slime's hooks, and who plays episodes for hooks and tools."""

import asyncio
import functools
import logging
import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import ConfigError
from ..environments.pool import EnvironmentPool
from ..environments.protocol import load_environment
from ..episode.history import AppendHistory, History, TurnHistory
from ..episode.loop import EpisodePlayer
from ..model.chat_tokens import ChatTokens, engine_eos_ids
from ..model.student import StudentClient
from ..model.teacher import TeacherClient
from ..records.episode_log import EpisodeLog
from .checks import check_settings
from .config import TcodConfig
from .server_checks import base_url, check_models

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What the hooks of one process share."""

    args: Namespace
    config: TcodConfig
    chat: ChatTokens
    episode_log: EpisodeLog


@dataclass(frozen=True)
class Players:
    """Who plays and scores the episodes of one event loop: sessions and semaphores belong to one."""

    run: Run
    player: EpisodePlayer
    teacher: TeacherClient | None


_run: Run | None = None
_checked: Run | None = None
# slime has one event loop, its fully asynchronous mode another.
_players: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Players] = weakref.WeakKeyDictionary()


def checked_run(args: Namespace, data_source: Any) -> tuple[Run, bool]:
    """The run of slime's arguments, and whether this is the first call.

    The launch checks are made then, because slime has no hook before the first rollout.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    global _checked
    is_first = _checked is None or _checked.args is not args
    if is_first:
        dataset = getattr(data_source, "dataset", None)
        check_settings(args, getattr(dataset, "samples", None))
        run = run_of(args)
        for warning in run.chat.warnings:
            logger.warning("--hf-checkpoint %s: %s", args.hf_checkpoint, warning)
        check_models(args, run.config, run.chat)
        logger.info("TCOD: %s", run.config)
        _checked = run
    return _checked, is_first


def run_of(args: Namespace) -> Run:
    """The run of slime's arguments. Raises ConfigError."""
    global _run
    if _run is None or _run.args is not args:
        from slime.rollout.sglang_rollout import GenerateState  # here: the tools do without slime

        config = TcodConfig.from_args(args)
        try:
            eos_ids = engine_eos_ids(args.hf_checkpoint)
            tokenizer = GenerateState(args).tokenizer
            chat = ChatTokens(tokenizer, args.apply_chat_template_kwargs, eos_ids, **config.chat_choices)
        except ValueError as error:
            raise ConfigError(f"--hf-checkpoint {args.hf_checkpoint}: {error}") from error
        log = EpisodeLog(args, config.tcod_variant, config.tcod_save_episodes, tokenizer)
        _run = Run(args, config, chat, log)
    return _run


def players_of(args: Namespace) -> Players:
    """Those of the running event loop."""
    loop, run = asyncio.get_running_loop(), run_of(args)
    if loop not in _players or _players[loop].run is not run:
        engine_url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
        teacher = new_teacher(run.config, args.rm_url, run.chat) if args.opd_type == "sglang" else None
        _players[loop] = Players(run, new_player(run.config, run.chat, engine_url), teacher)
    return _players[loop]


def new_player(config: TcodConfig, chat: ChatTokens, engine_url: str) -> EpisodePlayer:
    """A player of episodes whose student is served at a base URL."""
    pool = EnvironmentPool(
        config.tcod_environment,
        config.tcod_data_root,
        workers=config.tcod_env_workers,
        engines_per_worker=config.tcod_engines_per_worker,
        timeout_s=config.tcod_env_timeout_s,
        env_args=config.tcod_env_args,
    )
    return EpisodePlayer(
        environment=load_environment(config.tcod_environment),
        pool=pool,
        chat=chat,
        student=StudentClient(engine_url, config.tcod_engine_timeout_s, chat.vocab_size, chat.stop_ids),
        new_history=history_of(config, chat),
        lists_actions=config.tcod_admissible == "turn",
    )


def history_of(config: TcodConfig, chat: ChatTokens) -> Callable[[int], History]:
    """What makes an empty history, for an episode in a context of so many tokens."""
    if config.tcod_history == "turns":
        return functools.partial(TurnHistory, chat, window=config.tcod_window)
    return functools.partial(AppendHistory, chat)


def new_teacher(config: TcodConfig, rm_url: str, chat: ChatTokens) -> TeacherClient:
    """The client of the teacher's server at slime's --rm-url."""
    return TeacherClient(
        f"{base_url(rm_url)}/generate",
        timeout_s=config.tcod_teacher_timeout_s,
        concurrency=config.tcod_teacher_concurrency,
        vocab_size=chat.vocab_size,
    )
