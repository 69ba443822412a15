"""Rows of a data set, and the one reader of JSONL files: of journals, metrics and saved episodes, too.

A row is {"prompt": goal, "label": task type, "metadata": {the environment's own keys, "demo": {"actions": [..],
"observations": [..] and "seen": [..] or absent, "responses": [..] or absent, "ids": [[..], ..] and "vocabulary": ".."
or absent}}}, a line of a JSONL file. Only B2F, ReOPD and imitation need `demo`. Where a run has several environments,
one of the keys is `environment`, its name in tcod_environments.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import ConfigError

FORM = {"prompt": str, "label": str, "metadata": dict}
KIND = 'row {"prompt": text, "label": text, "metadata": {..}}'


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


def read_lines(
    path: Path, kind: str = "JSON object", leave_out: Callable[[str], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(its number in the file, from 1; the object) of each line.

    The lines are those that slime's own reader takes: in UTF-8, ended by line feeds, blank ones left out. U+2028 and
    U+0085 are characters of a text. What slime would leave out, with a word in its log, is refused.

    Args:
        kind: what a line has to be, for the message.
        leave_out: is told of each line that is no JSON object, in a sentence. The others are read all the same.

    Raises:
        ConfigError: the file cannot be read; or a line is no JSON object, and there is no `leave_out`.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if text := line.decode().strip():
                        yield number, _parse(text)
                except (ValueError, RecursionError) as error:
                    sentence = f"line {number} of {path} is no {kind}: {error}"
                    if leave_out is None:
                        raise ConfigError(sentence) from error
                    leave_out(f"{sentence}; it is left out")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): name a JSONL file") from error


def fault(error: Exception) -> str:
    """What is wrong with a line, by what was raised when its values were used."""
    return f"it has no {error}" if isinstance(error, KeyError) else f"a value in it cannot be used ({error})"


def _parse(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"it is {text[:80]}")
    return value


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file.

    Raises:
        ConfigError: the file cannot be read, or has a line that is no row; the message names the line.
    """
    rows = []
    for number, fields in read_lines(path, KIND):
        try:
            for key, kind in FORM.items():
                if not isinstance(fields.get(key), kind):
                    raise ValueError(f"its {key} is {json.dumps(fields[key])[:80] if key in fields else 'missing'}")
            json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # no NaN, and no half of a character
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"line {number} of {path} is no {KIND}: {error}") from error
        rows.append(Row(*(fields[key] for key in FORM), number))
    return rows
