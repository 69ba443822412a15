"""What every benchmark writes: a table on the terminal, and the same numbers with their circumstances as JSON."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys, as aligned text."""
    cells = [list(rows[0])] + [[_text(value) for value in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def write(name: str, rows: list[dict[str, Any]], variant: str = "", **more: Any) -> Path:
    """results/NAME.json or results/NAME-VARIANT.json: rows, command, commit, machine and date."""
    path = HERE / "results" / f"{'-'.join(filter(None, (name, variant)))}.json"
    save(path, {**circumstances(name), **more, "rows": rows})
    return path


def circumstances(name: str) -> dict[str, str]:
    """The command, the commit, the machine and the date of this run of benchmark `name`."""
    commit = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "command": f"bash benchmarks/run.sh {' '.join([name, *sys.argv[1:]])}",
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {_cpu()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a JSON file, a line per key of `result` or item of a list in it; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(
        "{\n" + ",\n".join(f" {json.dumps(key)}: {_lines(value)}" for key, value in result.items()) + "\n}\n"
    )
    partial.replace(path)


def _lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
    return json.dumps(value)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
