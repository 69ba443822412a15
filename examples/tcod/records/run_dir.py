"""$TCOD_RUN_DIR, the folder in which a run leaves what people read afterwards. Writing there never stops the run.

Where the variable is not set, nothing is written. Where the disk is full or the folder cannot be written, there is one
warning for each kind of file, and the writers count what is missing.
"""

import errno
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

_warned: set[str] = set()


def run_dir() -> Path | None:
    folder = os.environ.get("TCOD_RUN_DIR")
    return Path(folder) if folder else None


def write(name: str, text: str, kind: str, append: bool = False) -> bool:
    """Write a file of the run directory, all of the text or nothing. Returns whether it is there now.

    Args:
        name: its path below the run directory.
        text: ASCII, as json.dumps gives it: a broken surrogate is an escape there.
        kind: what the file holds, for the warning.
        append: add to the file, instead of replacing it.
    """
    folder = run_dir()
    if folder is None:
        return False
    try:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (_append if append else _replace)(folder / name, text.encode("ascii"))
        return True
    except OSError as error:
        if kind not in _warned:
            logger.warning("%s are not written, and the run goes on without: %s", kind, error)
            _warned.add(kind)
        return False


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            _write_all(file.fileno(), data)
        except OSError:
            file.truncate(before)  # half a line would spoil the file
            raise


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb", buffering=0) as file:
            _write_all(file.fileno(), data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _write_all(descriptor: int, data: bytes) -> None:
    if os.write(descriptor, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
