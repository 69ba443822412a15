"""A page of the episodes that runs have saved: what the agent saw, said and did, and what every token cost.

    python -m examples.tcod.tools.show_rollouts RUN_DIR [RUN_DIR ...]      rollouts.html in the first one
    python -m examples.tcod.tools.show_rollouts RUN_DIR --text             one episode on the terminal
    python -m examples.tcod.tools.show_rollouts RUN_DIR --text train_000012:3

The page is one file that needs no network and no server. It holds all texts as JSON and makes elements of an episode
when it is opened. Texts of models and environments are data: nothing in them becomes markup.
"""

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..episode.rows import task_key
from .rollout_text import printable, rollout_text, shortest_won

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent / "rollouts_page"


@dataclass(frozen=True)
class Run:
    """A run directory that was read."""

    name: str
    about: dict[str, Any]
    """The last launch in about.json, empty where there is none."""
    episodes: list[dict[str, Any]]
    """Transcripts (transcript.py), each with "file", the name of the file without .jsonl, and "line", from 1."""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs are named after their folders, as far up as makes them differ. Raises FileNotFoundError."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        common = os.path.commonpath([folder.resolve().parent for folder in folders])
        names = [os.path.relpath(folder.resolve(), common) for folder in folders]
    return [Run(name, _about(folder), _episodes(folder)) for name, folder in zip(names, folders, strict=True)]


def make_page(runs: Sequence[Run]) -> str:
    """The page as ASCII text."""
    episodes = [(run, episode) for run in runs for episode in run.episodes]
    tasks = {}
    for _, episode in episodes:
        tasks.setdefault(task_key(episode["task"]), len(tasks))
    index = [_summary(run, episode, tasks[task_key(episode["task"])]) for run, episode in episodes]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        style=Markup((HERE / "page.css").read_text()),
        script=Markup((HERE / "page.js").read_text()),
        index=_embedded(index),
        runs=_embedded([{"name": run.name, "about": run.about} for run in runs]),
        episodes=[_embedded(episode) for _, episode in episodes],
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "about.json").read_text())["launches"][-1]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return {}


def _episodes(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "rollouts").glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no rollouts/*.jsonl: name a run directory; tcod_save_episodes above 0 saves some there"
        )
    episodes = [episode for file in files for episode in _read(file)]
    return sorted(episodes, key=lambda one: (one["n"], one["dataset"] == "train"))  # evaluations come before rollout n


def _read(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file.read_text().split("\n"), 1):
        if line:
            try:
                yield {**json.loads(line), "file": file.stem, "line": number}
            except (ValueError, TypeError) as error:
                logger.warning("line %d of %s is left out: %s", number, file, error)


def ending(episode: dict[str, Any]) -> str:
    return f"failed: {episode['failure']}" if episode["failure"] else "won" if episode["won"] else "lost"


def _summary(run: Run, episode: dict[str, Any], task: int) -> dict[str, Any]:
    """What the list shows, filters and sorts by."""
    return {
        "run": run.name,
        **{key: episode[key] for key in ("arm", "dataset", "n", "k", "replayed", "kl", "goal", "task_type")},
        "ending": ending(episode),
        "turns": sum(turn["role"] == "student" for turn in episode["turns"]),
        "task": task,
    }


def _embedded(value: Any) -> Markup:
    """JSON for a script element: ASCII, and without what could end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return Markup(text)


def _selected(runs: Sequence[Run], which: str) -> list[dict[str, Any]]:
    """The episodes of a file, or of one line of it; without a name the one to show first. Raises ValueError."""
    episodes = [episode for run in runs for episode in run.episodes]
    if not which:
        return [shortest_won(episodes)]
    file, _, line = which.partition(":")
    chosen = [one for one in episodes if one["file"] == file and line in ("", str(one["line"]))]
    if not chosen:
        files = ", ".join(sorted({episode["file"] for episode in episodes}))
        raise ValueError(f"there is no {which}: name one of {files}, and a line of it as FILE:LINE")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="the page, default: rollouts.html in the first RUN_DIR")
    parser.add_argument(
        "--text",
        nargs="?",
        const="",
        metavar="FILE[:LINE]",
        help="print these episodes instead, by default the shortest one that the last rollout won",
    )
    options = parser.parse_args()
    try:
        runs = read_runs(options.runs)
        if options.text is not None:
            for episode in _selected(runs, options.text):
                print(printable(rollout_text(episode)))
            return
        out = options.out or options.runs[0] / "rollouts.html"
        out.write_text(make_page(runs))
    except (OSError, ValueError) as error:
        sys.exit(f"show_rollouts: {error}")
    counts = Counter(ending(episode).partition(":")[0] for run in runs for episode in run.episodes)
    print(f"{out}: {counts.total()} episodes, {', '.join(f'{count} {name}' for name, count in counts.items())}")


if __name__ == "__main__":
    main()
