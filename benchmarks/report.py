"""What the benchmarks' mains share: options, repeats, tables on the terminal, and the same numbers as JSON."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

HERE = Path(__file__).resolve().parent
Rows = list[dict[str, Any]]
T = TypeVar("T")


def options(doc: str, wanted: Mapping[str, tuple[Any, str]], argv: Sequence[str] | None = None) -> Namespace:
    """The command line's options: {name: (default, what it is)}, each of its default's type, a list of several."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    for name, (default, text) in wanted.items():
        several = isinstance(default, list)
        kind, number = type(default[0] if several else default), "+" if several else None
        parser.add_argument(f"--{name}", type=kind, nargs=number, default=default, help=f"{text} ({default})")
    return parser.parse_args(argv)


def in_turns(names: Iterable[str], repeats: int, measure: Callable[[str], T]) -> dict[str, list[T]]:
    """What `measure(name)` gives, `repeats` times: the names take turns, so that none has the quiet minutes."""
    found: dict[str, list[T]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, values in found.items():
            values.append(measure(name))
    return found


def table(rows: Rows) -> str:
    """Rows of equal keys, as aligned text."""
    return pd.DataFrame(rows).to_string(index=False, na_rep="", float_format="{:.3g}".format)


def publish(name: str, rows: Rows, **more: Any) -> None:
    """Print the rows and what else is a table, and write it all."""
    print(table(rows))
    for title, value in more.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{title.replace('_', ' ')}\n{table(value)}")
    print(f"written to {write(name, rows, **more)}")


def write(name: str, rows: Rows, **more: Any) -> Path:
    """results/NAME.json: rows, command, commit, machine and date."""
    path = HERE / "results" / f"{name}.json"
    save(path, {**circumstances(name), **more, "rows": rows})
    return path


def circumstances(name: str) -> dict[str, str]:
    """The command, the commit, the machine and the date of this run of benchmark `name`."""
    commit = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "command": f"bash benchmarks/run.sh {' '.join([name, *sys.argv[1:]])}",
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {cpu}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a JSON file, a line per key of `result` or item of a list in it; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    entries = ",\n".join(f" {json.dumps(key)}: {_lines(value)}" for key, value in result.items())
    partial.write_text(f"{{\n{entries}\n}}\n")
    partial.replace(path)


def _lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
    return json.dumps(value)
