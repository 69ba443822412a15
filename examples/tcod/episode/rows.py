"""Rows of a data set, and the demonstrations in them: how they are read, and what makes them usable.

A row is {"prompt": goal, "label": task type, "metadata": {the environment's own keys, "demo": {"actions": [..],
"responses": [..] or absent, "ids": [[..], ..] and "vocabulary": ".." or absent}}}, a line of a JSONL file. Only B2F
and ReOPD need `demo`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import ConfigError, Failure, words
from ..environments.protocol import Environment
from .demonstration import Demonstration


@dataclass(frozen=True)
class Row:
    """One task, as slime's Sample has it too."""

    prompt: str
    label: str
    metadata: dict[str, Any]

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


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file.

    Raises:
        ConfigError: the file cannot be read, is empty, or has a line that is no row; the message names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): name a JSONL file, see README.md") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            rows.append(Row(fields["prompt"], fields["label"], fields["metadata"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"line {number} of {path} is no row ({error!r}): prepare the data anew") from error
    if not rows:
        raise ConfigError(f"{path} has no rows: prepare the data first, see README.md")
    return rows


def check_rows(rows: Sequence[Any], source: str, environment: type[Environment], data_root: str) -> None:
    """Whether rows (or slime's samples) can be played, as far as they and the files show it.

    Args:
        source: the flag or file that they come from, for the message.

    Raises:
        ConfigError: with the first row that cannot.
    """
    if not len(rows):
        raise ConfigError(f"{source} has no rows: prepare the data first, see README.md")
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row.metadata, dict):
                raise ValueError(f"its metadata is no JSON object but {row.metadata!r}")
            Demonstration.of(row.metadata)
            environment.check_row(task_of(row.metadata), data_root)
        except Exception as error:  # ValueError is the environment's refusal, anything else its mistake
            reason = str(error) if isinstance(error, ValueError | Failure) else f"check_row raised {words(error)}"
            raise ConfigError(f"row {number} of {source} cannot be played: {reason}") from error


def check_demonstrations(rows: Sequence[Any], source: str, variant: str, horizon: int) -> None:
    """Whether b2f or reopd has a usable demonstration for every row. Raises ConfigError, with how many have none."""
    reasons: Counter[str] = Counter()
    for row in rows:
        try:
            Demonstration.of(row.metadata).check(horizon)
        except Failure as failure:
            reasons[failure.reason] += 1
    if reasons:
        other = (
            f", and in {n} the numbers of actions and responses or ids differ"
            if (n := reasons["demo_mismatch"])
            else ""
        )
        raise ConfigError(
            f"tcod_variant {variant} needs a demonstration of 1 to {horizon} (tcod_horizon) actions for every row of "
            f"{source}: of {len(rows)} rows {reasons['demo_missing']} have none and {reasons['demo_too_long']} are "
            f"longer{other}"
        )


def check_unique(rows: Sequence[Row], path: Path) -> None:
    """Whether every row is a task of its own. Raises ConfigError, with the first two lines that are not."""
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        first = seen.setdefault(task_key(row.task), number)
        if first != number:
            raise ConfigError(f"lines {first} and {number} of {path} are the same task: remove one of them")
