"""Episodes on any SGLang server, outside training: what collect_demos.py and evaluate.py share.

It is the recipe's one episode loop over the full horizon, with no curriculum, no teacher, and no slime. Beyond slime's
container it needs the environment's own package.
"""

import argparse
import asyncio
import json
import logging
import uuid
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ... import ConfigError
from ...episode.episode import Episode, EpisodeRecord
from ...episode.loop import Assignment, failures_go_to
from ...episode.rows import Row, task_key
from ...model.client import without_login
from ...settings.build import new_players, student_chat
from ...settings.checks import check_environment_class
from ...settings.config import TcodConfig
from ...settings.row_checks import check_evaluation_rows
from ...settings.secrets import without_secrets
from ...settings.server_checks import check_server
from .command import at_least
from .journal import Entry, Journal
from .jsonl import read_rows
from .ray_start import start_ray

logger = logging.getLogger(__name__)

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "alfworld.yaml"
FAILURES_IN_A_ROW = 32  # then something is broken for good
SAMPLING = {"top_p": 1.0, "top_k": -1, "skip_special_tokens": False, "spaces_between_special_tokens": False}


def add_options(parser: argparse.ArgumentParser, temperature: float) -> None:
    """The options of a RowRunner; `temperature` is the default one."""
    add = parser.add_argument
    add("--rows", type=Path, required=True, help="the tasks: JSONL, as a prepare tool writes them")
    add("--out", type=Path, required=True, help="gets the result; the journal lies beside it")
    add("--url", required=True, help="the SGLang server: http://HOST:PORT")
    add("--model", required=True, help="Hugging Face checkpoint that it serves, for the tokenizer")
    add("--temperature", type=float, default=temperature, help="default: %(default)s")
    add("--max-turn-len", type=at_least(1), default=512, help="tokens of one turn, default: %(default)s")
    add("--max-context-len", type=at_least(1), default=27648, help="of an episode, default: %(default)s")
    add("--concurrency", type=at_least(1), default=64, help="episodes at once, default: %(default)s")
    add("--apply-chat-template-kwargs", type=json.loads, help="as in training; default: as tcod_thoughts says")
    add("--config", type=Path, default=CONFIG, help="YAML of tcod_* settings, default: %(default)s")


class RowRunner:
    """Has a student on a server play rows, and keeps what became of the episodes. Starts Ray for them.

    Args:
        options: those of add_options.
        tool: its name, which the journal records.

    Attributes:
        settings: what success depends on beside the games: results and journals record it.
        failed: episodes by reason. They are no losses: the journal has none of them.

    Raises:
        ConfigError: with one sentence that names the option and the fix.
        OSError: the journal cannot be written.
    """

    def __init__(self, options: Namespace, tool: str) -> None:
        if options.max_turn_len >= options.max_context_len:
            raise ConfigError(f"--max-turn-len {options.max_turn_len} bounds one turn: set it below --max-context-len")
        if not 0 <= options.temperature < float("inf"):
            raise ConfigError(f"--temperature must be a number >= 0, got {options.temperature}")
        self.options, self.config = options, TcodConfig.read(options.config)
        check_environment_class(self.config)
        self.rows = _distinct_rows(self.config, options.rows)
        self.settings = _settings(self.config, options)
        self.journal = Journal(options.out.with_suffix(".journal.jsonl"), {**self.settings, "tool": tool})
        self.chat = student_chat(self.config, options.model, options.apply_chat_template_kwargs, "--model")
        url, needed = options.url.rstrip("/"), options.max_context_len
        named = f"the server at --url {without_login(url)}"
        check_server(named, url, self.chat, needed, "--max-context-len", "name its http://HOST:PORT")
        start_ray(sum(own.tcod_env_workers for own in self.config.per_environment))
        self._players = new_players(self.config, self.chat, url)
        self.failed: Counter[str] = Counter()
        self._in_a_row = 0

    @property
    def entries(self) -> list[Entry]:
        """The journal's episodes of the rows, in the rows' order."""
        return [entry for row in self.rows for entry in self.journal.of(row)]

    async def play(self, times: int, describe: Callable[[Row, Episode], dict[str, Any]]) -> None:
        """Play every row `times` times, as far as it is not in the journal: all once, then all again.

        Args:
            describe: is told of every episode that has ended, and returns what the journal says of it beside its
                task, attempt, success and turns.

        Raises:
            ConfigError: the server is gone, or FAILURES_IN_A_ROW episodes failed one after the other.
            OSError: the journal cannot be written.
        """
        done = self.entries
        known = {row.line: {entry["attempt"] for entry in self.journal.of(row)} for row in self.rows}
        todo = [(row, n) for n in range(times) for row in self.rows if n not in known[row.line]]
        total = len(done) + len(todo)
        if done:
            logger.warning("%d of %d episodes are in %s: remove it to play anew", len(done), total, self.journal.path)
        bar, waiting = tqdm(total=total, initial=len(done), unit="episode"), iter(todo)

        async def work() -> None:
            for row, attempt in waiting:
                episode = await self._play(row)
                self._record(row, attempt, episode.record, describe(row, episode))
                bar.set_postfix_str(f"failed {self.failed.total()}", refresh=False)
                bar.update()

        with logging_redirect_tqdm(), bar:
            await asyncio.gather(*(work() for _ in range(self.options.concurrency)))
        await asyncio.gather(*(player.pool.close() for player in self._players.values()))

    async def _play(self, row: Row) -> Episode:
        config = self.config.for_row(row.metadata)
        episode = Episode(EpisodeRecord(evaluation=True, environment=config.name))
        of_turn = {"temperature": self.options.temperature, "max_new_tokens": self.options.max_turn_len}
        assignment = Assignment(
            metadata=row.metadata,
            plan=config.curriculum.full_plan(),
            sampling_params={**SAMPLING, **of_turn},
            max_context_len=self.options.max_context_len,
            session=uuid.uuid4().hex,
        )
        with failures_go_to(episode.fail):
            await self._players[config.name].play(assignment, episode)
        return episode

    def _record(self, row: Row, attempt: int, record: EpisodeRecord, more: dict[str, Any]) -> None:
        """Write an episode down, with `more`, or count its failure. Raises ConfigError, OSError."""
        if not record.failure:
            entry = {"task": row.task, "attempt": attempt, "won": record.won, "turns": len(record.turns), **more}
            self.journal.add(entry)
            self._in_a_row = 0
            return
        logger.warning("the episode of line %d failed, %s: %s", row.line, record.failure, record.detail)
        self.failed[record.failure] += 1
        self._in_a_row += 1
        if record.failure == "engine_unavailable":  # it was asked for more than a minute
            raise ConfigError(f"the server at --url is gone ({record.detail}): start it, and the same command goes on")
        if self._in_a_row == FAILURES_IN_A_ROW:
            raise ConfigError(
                f"{FAILURES_IN_A_ROW} episodes in a row failed ({dict(self.failed)}): see the warnings above"
            )


def _distinct_rows(config: TcodConfig, path: Path) -> list[Row]:
    """The rows of a file, each checked by the environment and a task of its own. Raises ConfigError."""
    rows = read_rows(path)
    check_evaluation_rows(config, rows, str(path))
    lines: dict[str, int] = {}
    for row in rows:
        first = lines.setdefault(task_key(row.task), row.line)
        if first != row.line:
            raise ConfigError(f"lines {first} and {row.line} of {path} are the same task: remove one of them")
    return rows


def _settings(config: TcodConfig, options: Namespace) -> dict[str, Any]:
    given = ("model", "temperature", "max_turn_len", "max_context_len", "apply_chat_template_kwargs")
    names = ("horizon", "environment", "env_args", "admissible", "history", "window", "thoughts", "tool_parser")
    played = {own.name: {name: getattr(own, f"tcod_{name}") for name in names} for own in config.per_environment}
    return {name: getattr(options, name) for name in given} | without_secrets(played.get("", {"environments": played}))
