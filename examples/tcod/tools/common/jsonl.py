"""JSONL files: data sets, journals, metrics and saved episodes."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ... import ConfigError
from ...episode.rows import Row
from .command import result_file

FORM = {"prompt": str, "label": str, "metadata": dict}
KIND = 'row {"prompt": text, "label": text, "metadata": {..}}'
BYTE_ORDER_MARK = "\ufeff"


def read_lines(
    path: Path,
    kind: str = "JSON object",
    leave_out: Callable[[str], None] | None = None,
    encoding: str = "utf-8-sig",
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(its number in the file, from 1; the object) of each line.

    The lines are those that slime's own reader takes: in UTF-8, ended by line feeds, blank ones left out. U+2028 and
    U+0085 are characters of a text. What slime would leave out, with a word in its log, is refused.

    Args:
        kind: what a line has to be, for the message.
        leave_out: is told of each line that is no JSON object, in a sentence. The others are read all the same.
        encoding: "utf-8" for what slime reads, too: it leaves out a line after a byte order mark.

    Raises:
        ConfigError: the file cannot be read; or a line is no JSON object, and there is no `leave_out`.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if text := _decoded(line, encoding).strip():
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


def _decoded(line: bytes, encoding: str) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError("it is not in UTF-8") from error


def _parse(text: str) -> dict[str, Any]:
    if text.startswith(BYTE_ORDER_MARK):
        raise ValueError("it begins with a byte order mark, and slime would leave it out: save the file without one")
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
    for number, fields in read_lines(path, KIND, encoding="utf-8"):
        try:
            for key, kind in FORM.items():
                if not isinstance(fields.get(key), kind):
                    raise ValueError(f"its {key} is {json.dumps(fields[key])[:80] if key in fields else 'missing'}")
            json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # no NaN, and no half of a character
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"line {number} of {path} is no {KIND}: {error}") from error
        rows.append(Row(*(fields[key] for key in FORM), number))
    return rows


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Whole or not at all; a set without rows has no file, since slime refuses an empty one. Raises OSError."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with result_file(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
