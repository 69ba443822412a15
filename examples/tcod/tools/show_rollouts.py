"""A page of the episodes that runs have saved: what the agent saw, said and did, and what every token cost.

    python -m examples.tcod.tools.show_rollouts RUN_DIR [RUN_DIR ...]      rollouts.html in the first one
    python -m examples.tcod.tools.show_rollouts RUN_DIR --text             one episode on the terminal
    python -m examples.tcod.tools.show_rollouts RUN_DIR --text train_000012:3

The page is one file that needs no network and no server. It holds all texts as JSON and makes elements of an episode
when it is opened. Texts of models and environments are data: nothing in them becomes markup.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import ConfigError
from .common.command import new_parser, one_sentence
from .common.jsonl import fault, read_lines

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent / "rollouts_page"
Transcript = dict[str, Any]  # see records/saved_episodes.py
LISTED = ("arm", "dataset", "n", "k", "replayed", "kl", "reward", "goal", "task_type")


@dataclass(frozen=True)
class Run:
    """A run directory that was read."""

    name: str
    about: str
    """Its about.json, empty where there is none."""
    episodes: list[Transcript]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs are named after their folders, as far up as makes them differ. Raises ConfigError.

    A line that is no transcript is left out, with a warning.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        common = os.path.commonpath([folder.resolve().parent for folder in folders])
        names = [os.path.relpath(folder.resolve(), common) for folder in folders]
    runs = []
    for name, folder in zip(names, folders, strict=True):
        episodes = [one for file in sorted((folder / "rollouts").glob("*.jsonl")) for one in _read(file)]
        if not episodes:
            raise ConfigError(f"{folder} has no episodes in rollouts/*.jsonl: name a run directory that has some")
        episodes.sort(key=lambda one: (one["n"], one["dataset"] == "train"))  # evaluations come before rollout n
        about = folder / "about.json"
        runs.append(Run(name, about.read_text("utf-8", "replace") if about.is_file() else "", episodes))
    return runs


def _read(file: Path) -> Iterator[Transcript]:
    for number, line in read_lines(file, "transcript", logger.warning):
        try:
            text = json.dumps(line, allow_nan=False, ensure_ascii=False)
            line = json.loads(text.encode(errors="replace"))  # browsers take neither NaN nor half of a surrogate pair
            rollout_text(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("line %d of %s is no transcript: %s; it is left out", number, file, fault(error))
        else:
            yield {**line, "source": f"{file.stem}:{number}"}


# ------------------------------------------------------------------------------------------------------------ the page


def make_page(runs: Sequence[Run]) -> str:
    """The page as ASCII text."""
    episodes = [(run, episode) for run in runs for episode in run.episodes]
    tasks = _tell_apart(episode["task"] for _, episode in episodes)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE, "utf-8"), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        style=Markup((HERE / "page.css").read_text("utf-8")),
        script=Markup((HERE / "page.js").read_text("utf-8")),
        runs=runs,
        index=[_row(run, episode, tasks[episode["task"]]) for run, episode in episodes],
        episodes=[episode for _, episode in episodes],
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
    return f"failed: {episode['failure']}" if episode["failure"] else "won" if episode["won"] else "lost"


def _row(run: Run, episode: Transcript, task: str) -> dict[str, Any]:
    """What the list shows, filters and sorts by."""
    listed = {name: episode.get(name) for name in LISTED}
    return {**listed, "run": run.name, "task": task, "ending": ending(episode), "turns": _played(episode)}


def _played(episode: Transcript) -> int:
    return sum(turn["role"] == "student" for turn in episode["turns"])


# -------------------------------------------------------------------------------------------------------- the terminal


def rollout_text(episode: Transcript) -> str:
    """Every turn in order: the context that precedes the response, as the model saw it, and the response.

    The student's responses are sampled and trained, with their number of tokens and KL in nats (log student - log
    teacher, as it scored, summed). Nothing else is trained. Without tokens, the observation and the action are shown.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no transcript.
    """
    detail = f": {episode['detail']}" if episode["failure"] and episode.get("detail") else ""
    depth = "" if episode["k"] is None else f", depth k = {episode['k']:g}"
    reward = "" if episode.get("reward") is None else f", reward {episode['reward']:g}"
    lines = [
        f"{episode['arm']:s}, {episode['dataset']:s}, step {episode['n']:d}{depth}: {episode['goal']:s}",
        f"{episode['task']:s}",
        f"{episode['replayed']:d} turns replayed, {_played(episode)} of at most {episode['budget']:d} played, "
        f"{ending(episode)}{detail}{reward}",
    ]
    for turn in episode["turns"]:
        observation, context = turn["observation"], turn.get("context")
        if context:
            lines.append(f"--- context, {turn['context_tokens']} tokens, not trained")
        lines += [observation.join(context) if context else observation, _said(turn)]
        lines.append("".join(turn.get("tokens") or turn.get("response", "")) or f"> {turn['action']}")
    if episode.get("outcome"):
        lines += ["--- the environment's last answer", episode["outcome"]]
    sampled = sum(turn.get("response_tokens", 0) for turn in episode["turns"] if turn["role"] == "student")
    lines.append(f"--- {sampled} of {_tokens(episode)} tokens sampled{_kl(episode, ', trajectory KL')}")
    return "\n".join(lines) + "\n"


def _said(turn: dict[str, Any]) -> str:
    notes = {
        "no valid format": turn.get("valid") is False,
        "not an admissible action": turn.get("admissible") is False,
        "refused by the environment": turn.get("refused"),
        "cut by the length limit": turn.get("cut"),
    }
    trained = f" sampled{_kl(turn, ', KL')}" if turn["role"] == "student" else ", not trained"
    tokens = f", {turn['response_tokens']} tokens{trained}" if turn.get("response_tokens") else ""
    return ", ".join(
        [f"--- {turn['role']}, turn {turn['turn'] + 1}{tokens}", *(note for note in notes if notes[note])]
    )


def _kl(one: dict[str, Any], name: str) -> str:
    return "" if one.get("kl") is None else f"{name} {one['kl']:+.2f} nats"


def _tokens(episode: Transcript) -> int:
    return sum(turn.get("context_tokens", 0) + turn.get("response_tokens", 0) for turn in episode["turns"])


def shortest_won(episodes: Sequence[Transcript]) -> Transcript:
    """The one to show first: a short one of the last rollout that was won, if there is any."""
    trained = [one for one in episodes if one["dataset"] == "train" and not one["failure"]] or episodes
    last = max(one["n"] for one in trained)
    return min((one for one in trained if one["n"] == last), key=lambda one: (not one["won"], _tokens(one)))


def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters as escapes."""
    return "".join(
        one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape", "surrogatepass").decode()
        for one in text
    )


def _selected(runs: Sequence[Run], which: str) -> list[Transcript]:
    """The episodes of a file, or of one line of it; without a name the one to show first. Raises ConfigError."""
    episodes = [episode for run in runs for episode in run.episodes]
    if not which:
        return [shortest_won(episodes)]
    chosen = [one for one in episodes if which in (one["source"], one["source"].partition(":")[0])]
    if not chosen:
        files = ", ".join(sorted({episode["source"].partition(":")[0] for episode in episodes}))
        raise ConfigError(f"there is no {which}: name one of {files}, and a line of it as FILE:LINE")
    return chosen


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="the page, default: rollouts.html in the first RUN_DIR")
    help_text = "print these episodes instead, by default the shortest one that the last rollout won"
    parser.add_argument("--text", nargs="?", const="", metavar="FILE[:LINE]", help=help_text)
    options = parser.parse_args()
    out = options.out or options.runs[0] / "rollouts.html"
    with one_sentence("show_rollouts", out):
        runs = read_runs(options.runs)
        if options.text is not None:
            sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal cannot show
            for episode in _selected(runs, options.text):
                print(printable(rollout_text(episode)))
            return
        out.write_text(make_page(runs), "utf-8")
    counts = Counter(ending(episode).partition(":")[0] for run in runs for episode in run.episodes)
    print(f"{out}: {counts.total()} episodes, {', '.join(f'{count} {name}' for name, count in counts.items())}")


if __name__ == "__main__":
    main()
