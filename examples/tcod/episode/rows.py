"""A row of a data set: one task.

A row is {"prompt": goal, "label": task type, "metadata": {the environment's own keys, "demo": {"actions": [..],
"observations": [..] and "seen": [..] or absent, "responses": [..] or absent, "ids": [[..], ..] and "vocabulary": ".."
or absent}}}, a line of a JSONL file. Only B2F, ReOPD and imitation need `demo`. Where a run has several environments,
one of the keys is `environment`, its name in tcod_environments.
"""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One task, as slime's Sample has it too."""

    prompt: str
    label: str
    metadata: dict[str, Any]
    line: int = 0
    """Its number in the file that it was read from."""

    @property
    def task(self) -> dict[str, Any]:
        """What tells one task from another, see task_of."""
        return task_of(self.metadata)


def task_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """The environment's own keys: metadata without the demonstration and the episode's record."""
    return {name: value for name, value in metadata.items() if name not in ("demo", "tcod")}


def task_key(task: dict[str, Any]) -> str:
    """The same for all spellings of a task, to look things up by."""
    return json.dumps(task, sort_keys=True)


def place(row: Any, source: str) -> str:
    """For a message: a row's line; or what is in it, since slime's samples are shuffled and know no line."""
    return f"line {row.line} of {source}" if getattr(row, "line", 0) else f"row {str(row.metadata)[:200]} of {source}"
