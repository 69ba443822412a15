"""Episodes that have ended, each a line of a file at once, so that a command that was stopped goes on where it was."""

import fcntl
import json
import os
from collections import defaultdict
from errno import ENOSPC
from pathlib import Path
from typing import Any

from ... import ConfigError
from ...episode.rows import Row, task_key
from .jsonl import fault, read_lines

Entry = dict[str, Any]  # one episode: task, attempt, won, turns, and what the tool adds


class Journal:
    """An append-only JSONL file: its settings, then a line per finished episode. One process writes it at a time.

    A process that is killed leaves at most a torn last line, which the next one cuts off.

    Args:
        path: created where it does not exist.
        settings: what the episodes depend on.

    Raises:
        ConfigError: another process writes it, it was begun with other settings, or it is damaged.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._by_task: defaultdict[str, list[Entry]] = defaultdict(list)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process writes {path}: wait for it, or choose another --out") from error
        except OSError:
            pass  # a file system without locks
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)
        try:
            head, *entries = [line for _, line in read_lines(path)] or [{"settings": settings}]
            begun_with = {**settings, **head["settings"]}
            for entry in entries:
                self._by_task[task_key(entry["task"])].append(entry)
        except (ConfigError, KeyError, TypeError) as error:
            said = str(error) if isinstance(error, ConfigError) else fault(error)
            raise ConfigError(f"{path} is damaged ({said}): repair or remove it") from error
        different = [name for name in settings if begun_with[name] != settings[name]]
        if different and entries:
            raise ConfigError(f"{path} was begun with another {', '.join(different)}: choose another --out")
        if not entries:
            self._file.truncate(0)
            self._write({"settings": settings})

    def of(self, row: Row) -> list[Entry]:
        """The episodes of a row's task."""
        return self._by_task[task_key(row.task)]

    def add(self, entry: Entry) -> None:
        """Write an episode down. Raises OSError."""
        self._write(entry)
        self._by_task[task_key(entry["task"])].append(entry)

    def remove(self) -> None:
        """The command has its result."""
        self.path.unlink(missing_ok=True)

    def _write(self, line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        if self._file.write(data) < len(data):
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(self.path))
