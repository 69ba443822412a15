"""A page of the episodes that runs have saved: what the agent saw, said and did, and what every token cost.

    python -m examples.tcod.tools.show_rollouts RUN_DIR [RUN_DIR ...]      rollouts.html in the first one
    python -m examples.tcod.tools.show_rollouts RUN_DIR --text             one episode on the terminal
    python -m examples.tcod.tools.show_rollouts RUN_DIR --text train_000012:3

The page is one file that needs no network and no server. It holds all texts as JSON and makes elements of an episode
when it is opened. Texts of models and environments are data: nothing in them becomes markup.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..records.run_folder import parse_lines
from ..records.saved_episodes import Transcript
from .rollout_text import printable, rollout_text, shortest_won

HERE = Path(__file__).resolve().parent / "rollouts_page"


@dataclass(frozen=True)
class Run:
    """A run directory that was read."""

    name: str
    about: str
    """Its about.json, empty where there is none."""
    episodes: list[Transcript]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs are named after their folders, as far up as makes them differ. Raises FileNotFoundError.

    A line that is no transcript is left out, with a warning.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        common = os.path.commonpath([folder.resolve().parent for folder in folders])
        names = [os.path.relpath(folder.resolve(), common) for folder in folders]
    return [_read_run(name, folder) for name, folder in zip(names, folders, strict=True)]


def _read_run(name: str, folder: Path) -> Run:
    episodes = [
        episode.model_copy(update={"source": f"{file.stem}:{number}"})
        for file in sorted((folder / "rollouts").glob("*.jsonl"))
        for number, episode in parse_lines(file, Transcript.of)
    ]
    if not episodes:
        raise FileNotFoundError(
            f"{folder} has no episodes in rollouts/*.jsonl: name a run directory, tcod_save_episodes 0 saves none"
        )
    episodes.sort(key=lambda one: (one.n, one.dataset == "train"))  # evaluations come before rollout n
    about = folder / "about.json"
    return Run(name, about.read_text("utf-8", "replace") if about.is_file() else "", episodes)


def make_page(runs: Sequence[Run]) -> str:
    """The page as ASCII text."""
    episodes = [(run, episode) for run in runs for episode in run.episodes]
    tasks = _tell_apart(episode.task for _, episode in episodes)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE, "utf-8"), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        style=Markup((HERE / "page.css").read_text("utf-8")),
        script=Markup((HERE / "page.js").read_text("utf-8")),
        runs=runs,
        index=_embedded([_summary(run, episode, tasks[episode.task]) for run, episode in episodes]),
        episodes=[_embedded(episode.model_dump()) for _, episode in episodes],
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()


def _tell_apart(tasks: Iterable[str]) -> dict[str, str]:
    """{task: those of its fields that not all tasks have}."""
    fields = {task: _fields(task) for task in set(tasks)}
    counts = Counter(field for one in fields.values() for field in one)
    return {task: ", ".join(field for field in one if counts[field] < len(fields)) for task, one in fields.items()}


def _fields(task: str) -> list[str]:
    """["variation: 3", ..]; a long task is cut, and no JSON any more."""
    try:
        return [f"{key}: {value}" for key, value in json.loads(task).items()]
    except (ValueError, AttributeError):
        return [task]


def ending(episode: Transcript) -> str:
    return f"failed: {episode.failure}" if episode.failure else "won" if episode.won else "lost"


def _summary(run: Run, episode: Transcript, task: str) -> dict[str, Any]:
    """What the list shows, filters and sorts by."""
    shown = {"arm", "dataset", "n", "k", "replayed", "kl", "reward", "goal", "task_type"}
    turns = sum(turn.role == "student" for turn in episode.turns)
    facts = {"run": run.name, "task": task, "ending": ending(episode), "turns": turns}
    return {**episode.model_dump(include=shown), **facts}


def _embedded(value: Any) -> Markup:
    """JSON for a script element: ASCII, and without what could end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return Markup(text)


def _selected(runs: Sequence[Run], which: str) -> list[Transcript]:
    """The episodes of a file, or of one line of it; without a name the one to show first. Raises ValueError."""
    episodes = [episode for run in runs for episode in run.episodes]
    if not which:
        return [shortest_won(episodes)]
    chosen = [one for one in episodes if which in (one.source, one.source.partition(":")[0])]
    if not chosen:
        files = ", ".join(sorted({episode.source.partition(":")[0] for episode in episodes}))
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
            sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal cannot show
            for episode in _selected(runs, options.text):
                print(printable(rollout_text(episode)))
            return
        out = options.out or options.runs[0] / "rollouts.html"
        out.write_text(make_page(runs), "utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"show_rollouts: {error}")
    counts = Counter(ending(episode).partition(":")[0] for run in runs for episode in run.episodes)
    print(f"{out}: {counts.total()} episodes, {', '.join(f'{count} {name}' for name, count in counts.items())}")


if __name__ == "__main__":
    main()
