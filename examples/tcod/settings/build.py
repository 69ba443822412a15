"""The one place that puts objects together: each is made of settings, for slime's hooks and for the tools."""

import functools
from collections.abc import Callable
from typing import Any

from .. import ConfigError
from ..environments.pool import EnvironmentPool
from ..environments.protocol import load_environment
from ..episode.history import AppendHistory, History, TurnHistory
from ..episode.loop import EpisodePlayer
from ..episode.note import NoteWriter
from ..episode.text_side import TextSide
from ..model.chat_template import PROBE, PROBE_CALL
from ..model.chat_tokens import ChatTokens, load_chat
from ..model.student import StudentClient
from ..model.tool_calls import find_calls, load_parser
from .config import TcodConfig


def new_players(config: TcodConfig, chat: ChatTokens, engine_url: str) -> dict[str, EpisodePlayer]:
    """Players of episodes by environment, whose student is served at a base URL."""
    student = StudentClient(engine_url, config.tcod_engine_timeout_s, chat.vocab_size, chat.stop_ids)
    return {
        own.name: EpisodePlayer(
            new_text_side=text_side_factory(own, chat),
            pool=new_pool(own, own.tcod_env_workers, own.tcod_envs_per_worker),
            student=student,
            new_history=history_factory(own, chat),
        )
        for own in config.per_environment
    }


def text_side_factory(config: TcodConfig, chat: ChatTokens | None = None) -> Callable[[dict[str, Any]], TextSide]:
    """What makes the text side of a task's environment, for a student's chat, if there is one. Raises ConfigError."""
    environment, admissible = load_environment(config.tcod_environment), config.tcod_admissible == "turn"
    return lambda task: TextSide(environment, task, admissible, config.tcod_tool_parser, chat)


def student_chat(config: TcodConfig, checkpoint: str, template_kwargs: Any, flag: str) -> ChatTokens:
    """The chat turns of the checkpoint that a flag names, which must fit the settings.

    Args:
        template_kwargs: None for those that tcod_thoughts asks for.

    Raises:
        ConfigError: with the flag.
    """
    kwargs = config.template_kwargs if template_kwargs is None else template_kwargs
    if not isinstance(kwargs, dict):
        raise ConfigError(f"--apply-chat-template-kwargs must be a JSON object, got {kwargs}")
    parsers = {own.tcod_tool_parser for own in config.per_environment} - {None}
    for name in parsers:
        load_parser(name)
    choices = {"history": config.tcod_history, "thoughts": config.tcod_thoughts, "tools": bool(parsers)}
    horizon = max(own.tcod_horizon for own in config.per_environment)
    try:
        chat = load_chat(checkpoint, kwargs, horizon=horizon, **choices)
    except Exception as error:  # whatever a tokenizer's own code makes of its files
        said = " ".join(str(error).split())
        raise ConfigError(f"{flag} {checkpoint}: {said}; name the checkpoint that is served") from error
    for name in parsers:
        written = chat.call([PROBE_CALL])
        if find_calls(name, written, [PROBE]) != [PROBE_CALL]:
            said = f"tcod_tool_parser {name} does not read a call as the chat template writes it, {written!r}"
            raise ConfigError(f"{flag} {checkpoint}: {said}: name the model's own parser")
    return chat


def notes_of(config: TcodConfig, chat: ChatTokens) -> NoteWriter:
    """The writer of an environment's notes."""
    environment = load_environment(config.tcod_environment)
    return NoteWriter(environment, chat, config.tcod_teacher_sees, config.tcod_note_len, config.tcod_sees_from)


def new_pool(config: TcodConfig, workers: int, envs_per_worker: int) -> EnvironmentPool:
    """A pool of the environment that the settings name."""
    return EnvironmentPool(
        config.tcod_environment,
        config.tcod_data_root,
        workers=workers,
        envs_per_worker=envs_per_worker,
        timeout_s=config.tcod_env_timeout_s,
        env_args=config.tcod_env_args,
    )


def history_factory(config: TcodConfig, chat: ChatTokens) -> Callable[[int], History]:
    """What makes an empty history, for an episode in a context of so many tokens."""
    if config.tcod_history == "turns":
        return functools.partial(TurnHistory, chat, window=config.tcod_window)
    return functools.partial(AppendHistory, chat)
