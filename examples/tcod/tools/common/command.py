"""What the commands that make data and results share: options, refusals, results' files, tables."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ... import PACKAGE, ConfigError


def new_parser(module_doc: str) -> argparse.ArgumentParser:
    """A parser that its module's docstring describes, with the commands of this copy of the package."""
    text = module_doc.replace("examples.tcod", PACKAGE)
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def at_least(least: int) -> Callable[[str], int]:
    """An option's type: a whole number from `least` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text}")
        return int(text)

    return parse


@contextlib.contextmanager
def one_sentence(tool: str, out: Path | None = None) -> Iterator[None]:
    """What the block refuses, and a file of the result that cannot be written, is one sentence and exit status 1."""
    try:
        yield
    except ConfigError as error:
        sys.exit(f"{tool}: {error}")
    except OSError as error:
        if out is None:
            raise
        said = error.strerror or error
        sys.exit(f"{tool}: {error.filename or out} cannot be written ({said}): make room, or name another")


def check_writable(path: Path) -> None:
    """Whether a file can be written there, before work that takes its time. Raises ConfigError, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file: name one for the result")
    with tempfile.TemporaryFile(dir=path.parent) as file:
        file.write(bytes(2**16))


@contextlib.contextmanager
def result_file(path: Path) -> Iterator[TextIO]:
    """A file that is open from the first and is `path` in the end; if the block fails, `path` stays as it was.

    Raises:
        ConfigError, OSError: it cannot be written.
    """
    check_writable(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Cells in columns, the first one to the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join("  ".join(line) for line in lines)
