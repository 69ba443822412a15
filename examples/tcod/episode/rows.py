"""Rows of a data set: how they are read, and what makes them playable.

A row is {"prompt": goal, "label": task type, "metadata": {the environment's own keys, "demo": {"actions": [..],
"observations": [..] and "seen": [..] or absent, "responses": [..] or absent, "ids": [[..], ..] and "vocabulary": ".."
or absent}}}, a line of a JSONL file. Only B2F, ReOPD and imitation need `demo`. Where a run has several environments,
one of the keys is `environment`, its name in tcod_environments.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import ConfigError, Failure, words
from ..environments.protocol import Environment, ask
from .demonstration import Demonstration
from .jsonl import read_lines

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


def _check_task(metadata: Any, environment: type[Environment], data_root: str, has_parser: bool) -> None:
    """Raises ValueError, or whatever the environment's check_row does."""
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata is no JSON object but {metadata!r:.80}")
    environment.check_row(task := task_of(metadata), data_root)
    try:
        tools = ask(environment, "tools", task)
    except Failure as failure:
        raise ValueError(failure) from failure
    if tools and not has_parser:
        raise ValueError("its agent calls tools: set tcod_tool_parser to the model's parser in SGLang (qwen, ..)")


def check_rows(
    rows: Sequence[Any],
    source: str,
    environment: type[Environment],
    data_root: str,
    variant: str = "",
    horizon: int = 0,
    has_parser: bool = False,
    needs_seen: bool = False,
) -> None:
    """Whether rows (or slime's samples) can be played, as far as they and the files show it.

    Args:
        source: the flag or file that they come from, for the message.
        variant: the tcod_variant that replays a demonstration of every row, within the horizon; "" if none is needed.
        has_parser: whether tcod_tool_parser is set.
        needs_seen: whether demonstrations must have what the environment said.

    Raises:
        ConfigError: with the first row that cannot, or with how many have no usable demonstration.
    """
    if not len(rows):
        raise ConfigError(f"{source} has no rows: prepare the data first, see README.md")
    reasons, first = Counter[str](), ""
    for row in rows:
        try:
            _check_task(row.metadata, environment, data_root, has_parser)
            demo = Demonstration.of(row.metadata)
            if variant:
                demo.check(horizon)
            for turn in range(len(demo.actions) if needs_seen else 0):
                demo.observation(turn)
        except Failure as failure:
            reasons[failure.reason] += 1
            first = first or f"{place(row, source)}: {failure}"
        except Exception as error:  # ValueError is the environment's refusal, anything else its mistake
            reason = str(error) if isinstance(error, ValueError) else f"check_row raised {words(error)}"
            raise ConfigError(f"{place(row, source)} cannot be played: {reason}") from error
    if reasons:
        needs = f"; tcod_variant {variant} needs one of 1 to {horizon} (tcod_horizon) actions" if variant else ""
        raise ConfigError(
            f"{reasons.total()} of {len(rows)} rows have no usable demonstration {dict(reasons)}, the first is "
            f"{first}{needs}"
        )
