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
    commit = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True)
    path = HERE / "results" / f"{'-'.join(filter(None, (name, variant)))}.json"
    path.parent.mkdir(exist_ok=True)
    result = {
        "command": f"bash benchmarks/run.sh {' '.join([name, *sys.argv[1:]])}",
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {_cpu()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        **more,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
