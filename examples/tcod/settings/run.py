"""The run of slime's hooks: what they share in one process, and the checks at its first call."""

import asyncio
import functools
import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..episode.episode import Episode, Note, TokenSequence
from ..episode.imitation import imitate
from ..episode.loop import EpisodePlayer
from ..episode.note import NoteWriter
from ..episode.rows import task_of
from ..model.chat_tokens import ChatTokens
from ..model.teacher import TeacherClient
from ..records.run_folder import write_about
from ..records.saved_episodes import EpisodeLog
from ..training.task_source import TaskSource
from .build import history_factory, new_players, notes_of, student_chat, text_side_factory
from .checks import check_notes, check_run_arguments
from .config import TcodConfig
from .secrets import without_secrets
from .server_checks import check_models, router_url, teacher_url, teacher_urls

logger = logging.getLogger(__name__)
SourceT = TypeVar("SourceT", bound=TaskSource)


@dataclass(frozen=True)
class EnvironmentSetup:
    """Who plays and scores the episodes of one environment."""

    config: TcodConfig
    player: EpisodePlayer
    notes: NoteWriter
    teacher: TeacherClient | None

    async def score(
        self, sequence: TokenSequence, note: Note | None, session: str, check_wanted: Callable[[], None] = lambda: None
    ) -> list[float]:
        """The teacher's log-probs of a sequence's tokens after its prompt; the teacher is shown `note`."""
        ids, scored = self.notes.teacher_ids(sequence, note), len(sequence.tokens) - len(sequence.prompt)
        return await self.teacher.score(ids, len(ids) - scored, session, check_wanted)


@dataclass
class Run:
    """What the hooks of one process share."""

    args: Namespace
    config: TcodConfig
    is_checked: bool = False
    task_source: TaskSource | None = None
    # slime has one event loop, its fully asynchronous mode another; sessions and semaphores belong to one.
    setups: dict[asyncio.AbstractEventLoop, dict[str, EnvironmentSetup]] = field(default_factory=dict)

    @functools.cached_property
    def chat(self) -> ChatTokens:
        """The student's chat tokens. Raises ConfigError."""
        kwargs = self.args.apply_chat_template_kwargs or {}
        return student_chat(self.config, self.args.hf_checkpoint, kwargs, "--hf-checkpoint")

    @functools.cached_property
    def episode_log(self) -> EpisodeLog:
        """What saves episodes."""
        limit = self.config.tcod_save_episodes
        return EpisodeLog(self.config.tcod_variant, sys.maxsize if limit == "all" else limit, self.chat.tokenizer)


_run: Run | None = None


def checked_run(args: Namespace, data_source: Any) -> Run:
    """The run of slime's arguments. At the first call the launch checks are made: slime has no earlier hook.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    run = run_of(args)
    if not run.is_checked:
        dataset = getattr(data_source, "dataset", None)
        check_run_arguments(args, run.config, getattr(dataset, "samples", None))
        check_notes(run.config, run.chat)
        if not args.debug_train_only:
            check_models(args, run.config, run.chat)
        logger.info("TCOD: %s", without_secrets(run.config.model_dump()))
        write_about()
        run.is_checked = True
    return run


def run_of(args: Namespace) -> Run:
    """The run of slime's arguments. Raises ConfigError."""
    global _run
    if _run is None or _run.args is not args:
        _run = Run(args, TcodConfig.from_args(args))
    return _run


def setup_of(args: Namespace, metadata: dict[str, Any]) -> EnvironmentSetup:
    """Who plays and scores a row's episodes in the running event loop. Raises ConfigError."""
    loop, run = asyncio.get_running_loop(), run_of(args)
    if loop not in run.setups:
        run.setups[loop] = _new_setups(run)
    return run.setups[loop][run.config.for_row(metadata).name]


def _new_setups(run: Run) -> dict[str, EnvironmentSetup]:
    """The setups by environment. They share one client of the student, and one of each teacher."""
    players = new_players(run.config, run.chat, router_url(run.args))
    urls = teacher_urls(run.config, teacher_url(run.args)) if run.args.opd_type == "sglang" else {}
    limits = (run.config.tcod_teacher_timeout_s, run.config.tcod_teacher_concurrency)
    teachers = {url: TeacherClient(url, *limits, run.chat.vocab_size) for url in {*urls.values()}}
    return {
        own.name: EnvironmentSetup(own, players[own.name], notes_of(own, run.chat), teachers.get(urls.get(own.name)))
        for own in run.config.per_environment
    }


def begin_rollout(kind: type[SourceT], run: Run, data_source: Any, rollout_id: int) -> SourceT:
    """Begin a rollout on the run's task source, which is one object for all rollouts. Returns it."""
    if not isinstance(run.task_source, kind) or run.task_source.data_source is not data_source:
        config = run.config
        run.task_source = kind(
            run.args,
            data_source,
            lambda metadata, n: config.for_row(metadata).curriculum.depth(n),
            max_replacements=config.tcod_max_replacements,
            max_staleness=config.tcod_max_staleness,
            rollout_id=rollout_id,
        )
    run.task_source.begin(rollout_id)
    return run.task_source


def imitate_row(run: Run, metadata: dict[str, Any], episode: Episode) -> None:
    """Fill in an episode of a row's metadata as if the student had played its demonstration. Raises Failure."""
    config = run.config.for_row(metadata)
    side = text_side_factory(config, run.chat)(task_of(metadata))
    history = history_factory(config, run.chat)(run.args.rollout_max_context_len)
    imitate(metadata, episode, side, history, config.tcod_horizon)
