"""The one place that puts objects together: the run of slime's hooks, and who plays episodes for hooks and tools."""

import asyncio
import functools
import logging
import sys
import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from .. import ConfigError, Failure
from ..environments.pool import EnvironmentPool
from ..environments.protocol import load_environment
from ..episode.history import AppendHistory, History, TurnHistory
from ..episode.imitation import imitate
from ..episode.loop import EpisodePlayer
from ..episode.note import NoteWriter
from ..episode.record import Episode, Note, TokenSequence
from ..episode.rows import task_of
from ..episode.text_side import TextSide
from ..model.chat_template import PROBE, PROBE_CALL
from ..model.chat_tokens import ChatTokens, load_chat
from ..model.student import Response, StudentClient
from ..model.teacher import TeacherClient
from ..model.tool_calls import find_calls, load_parser
from ..records.run_folder import write_about
from ..records.saved_episodes import EpisodeLog
from .checks import check_run_arguments
from .config import TcodConfig
from .secrets import without_secrets
from .server_checks import check_models, router_url, teacher_urls

if TYPE_CHECKING:
    from ..training.task_source import TaskSource  # needs slime, and the tools do without

logger = logging.getLogger(__name__)
SourceT = TypeVar("SourceT", bound="TaskSource")


@dataclass(frozen=True)
class Run:
    """What the hooks of one process share."""

    args: Namespace
    config: TcodConfig
    chat: ChatTokens
    episode_log: EpisodeLog
    # slime has one event loop, its fully asynchronous mode another; sessions and semaphores belong to one.
    setups: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, "EnvironmentSetup"]] = field(
        default_factory=weakref.WeakKeyDictionary
    )


@dataclass(frozen=True)
class EnvironmentSetup:
    """Who plays and scores the episodes of one environment."""

    config: TcodConfig
    player: EpisodePlayer
    notes: NoteWriter
    teacher: TeacherClient | None

    async def score(
        self, sequence: TokenSequence, note: Note | None, session: str, *check_wanted: Callable[[], None]
    ) -> list[float]:
        """What TeacherClient.score returns of a sequence behind its prompt, where it is shown this note."""
        ids, behind = self.notes.teacher_ids(sequence, note), len(sequence.tokens) - len(sequence.prompt)
        return await self.teacher.score(ids, len(ids) - behind, session, *check_wanted)


_run: Run | None = None
_checked: Run | None = None
_task_source: "TaskSource | None" = None


def checked_run(args: Namespace, data_source: Any) -> Run:
    """The run of slime's arguments. At the first call the launch checks are made: slime has no earlier hook.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    global _checked
    if _checked is None or _checked.args is not args:
        dataset = getattr(data_source, "dataset", None)
        check_run_arguments(args, getattr(dataset, "samples", None))
        run = run_of(args)
        check_notes(run.config, run.chat)
        if not args.debug_train_only:
            check_models(args, run.config, run.chat)
        logger.info("TCOD: %s", without_secrets(run.config.model_dump()))
        write_about()
        _checked = run
    return _checked


def run_of(args: Namespace) -> Run:
    """The run of slime's arguments. Raises ConfigError."""
    global _run
    if _run is None or _run.args is not args:
        config = TcodConfig.from_args(args)
        chat = student_chat(config, args.hf_checkpoint, args.apply_chat_template_kwargs or {}, "--hf-checkpoint")
        limit = sys.maxsize if config.tcod_save_episodes == "all" else config.tcod_save_episodes
        log = EpisodeLog(config.tcod_variant, limit, chat.tokenizer)
        _run = Run(args, config, chat, log)
    return _run


def setup_of(args: Namespace, metadata: dict[str, Any]) -> EnvironmentSetup:
    """Who plays and scores a row's episodes in the running event loop. Raises ConfigError."""
    loop, run = asyncio.get_running_loop(), run_of(args)
    if loop not in run.setups:
        run.setups[loop] = _new_setups(run)
    return run.setups[loop][run.config.for_row(metadata).name]


def _new_setups(run: Run) -> dict[str, EnvironmentSetup]:
    """By environment. All share the student, and a teacher that several have."""
    players = new_players(run.config, run.chat, router_url(run.args))
    urls = teacher_urls(run.args, run.config) if run.args.opd_type == "sglang" else {}
    limits = (run.config.tcod_teacher_timeout_s, run.config.tcod_teacher_concurrency)
    teachers = {url: TeacherClient(url, *limits, run.chat.vocab_size) for url in {*urls.values()}}
    return {
        own.name: EnvironmentSetup(own, players[own.name], notes_of(own, run.chat), teachers.get(urls.get(own.name)))
        for own in run.config.per_environment
    }


def task_source_of(kind: type[SourceT], run: Run, data_source: Any, rollout_id: int) -> SourceT:
    """What draws from slime's data source, for the rollout that begins: one object for a run."""
    global _task_source
    if not isinstance(_task_source, kind) or _task_source.data_source is not data_source:
        config = run.config
        limits = (config.tcod_max_replacements, config.tcod_max_staleness, rollout_id)
        _task_source = kind(run.args, data_source, lambda row, n: config.for_row(row).curriculum.depth(n), *limits)
    _task_source.begin(rollout_id)
    return _task_source


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


def imitate_row(run: Run, metadata: dict[str, Any], episode: Episode) -> None:
    """Fill in an episode of a row's metadata as if the student had played its demonstration. Raises Failure."""
    config = run.config.for_row(metadata)
    side = text_side_factory(config, run.chat)(task_of(metadata))
    history = history_factory(config, run.chat)(run.args.rollout_max_context_len)
    imitate(metadata, episode, side, history, config.tcod_horizon)


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
    except (OSError, ValueError) as error:
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


def check_notes(config: TcodConfig, chat: ChatTokens) -> None:
    """Whether the teacher can be shown the shortest note, in a conversation up to the horizon. Raises ConfigError."""
    for own in config.per_environment if config.tcod_teacher_sees else ():
        history, notes = history_factory(own, chat)(sys.maxsize), notes_of(own, chat)
        history.begin("Rules.", "Begin.")
        for _ in range(own.tcod_horizon - 1):
            history.show_replayed("Do.", None)
            history.observe("Done.")
        history.respond(Response([chat.end_of_turn], [0.0], False, {}))
        try:
            notes.teacher_ids(history.sequences[-1], notes.shortest())
        except Failure as failure:
            said = f"no note for the teacher can be written: {failure}, or remove tcod_teacher_sees"
            raise ConfigError(said) from failure


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
