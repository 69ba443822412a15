"""Turn an ALFWorld download into slime's JSONL: train, valid_seen, valid_unseen and hard.

    python -m examples.tcod.tools.prepare_alfworld --out DIR --demos walkthrough
    python -m examples.tcod.tools.prepare_alfworld --out DIR --demos train_expert.jsonl walkthrough

The games are the playable ones below tcod_data_root/json_2.1.1. --demos names sources of demonstrations for the
training games, best first:

    walkthrough   the planner's own solution, out of the game file: short, and made with knowledge of the whole room
    FILE          JSONL with the actions of a teacher: TCOD's published lists, or what collect_demos.py wrote

prepare.py opens the games, replays the demonstrations, and says what becomes of them. Beyond slime's container this
needs the package alfworld.
"""

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from .. import ConfigError, Failure, words
from ..episode.demonstration import Demonstration
from ..settings.config import TcodConfig
from .common.jsonl import fault, read_lines
from .common.prepare import TRAIN, Task, option_parser, prepare

DATA_VERSION = "json_2.1.1"
SPLITS = ("train", "valid_seen", "valid_unseen")
WALKTHROUGH = "walkthrough"


def find_games(root: Path) -> list[str]:
    """The game files of all splits, relative to the data root.

    Raises:
        ConfigError: a split has none.
    """
    games = []
    for split in SPLITS:
        folder = root / DATA_VERSION / split
        found = sorted(path.relative_to(root).as_posix() for path in folder.glob("*/*/game.tw-pddl"))
        if not found:
            raise ConfigError(f"no games below {folder}: run alfworld-download, or set ALFWORLD_DATA to its folder")
        games += found
    return games


def rebase(game_file: str) -> str:
    """A game file's path in whatever root, relative to the data root: json_2.1.1/SPLIT/TASK/TRIAL/game.tw-pddl.

    Raises:
        ValueError: it is not such a path.
    """
    parts = PurePosixPath(game_file).parts[-5:]
    if len(parts) < 5 or parts[0] != DATA_VERSION or parts[1] not in SPLITS or parts[4] != "game.tw-pddl":
        raise ValueError(f"{game_file} does not end in {DATA_VERSION}/SPLIT/TASK/TRIAL/game.tw-pddl")
    return "/".join(parts)


def read_source(path: str) -> Iterator[tuple[int, str, Demonstration | Failure | None]]:
    """(line, game file, demonstration) out of a published list or this recipe's rows.

    A game that is only named, with no "actions" and no "demo", has none.

    Raises:
        ConfigError: the file or a line of it cannot be read; never skipped.
    """
    for number, row in read_lines(Path(path)):
        try:
            row = row.get("metadata", row)  # the published lists have no metadata
            yield number, rebase(row["game_file"]), _demo(row.get("demo", row))
        except (Failure, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"line {number} of {path} has no game_file and actions: {fault(error)}") from error


def _demo(fields: dict[str, Any]) -> Demonstration | Failure | None:
    """The demonstration of a line, or None where it has no actions at all. Raises Failure: demo_malformed."""
    if "actions" not in fields:
        return None
    demo = Demonstration.of({"demo": fields})
    # The planner's spelling has stray double spaces; the engine wants its own.
    demo = replace(demo, actions=tuple(" ".join(action.split()) for action in demo.actions))
    if any(action.startswith("put ") for action in demo.actions):
        return Failure("demo_inadmissible", "it says 'put X in/on Y', and this ALFWorld 'move X to Y'")
    return demo


def walkthrough_of(root: Path, game_file: str) -> Demonstration | Failure:
    """The planner's solution in a game file.

    Raises:
        Failure: the game cannot be played: unsupported, unsolvable or damaged.
        ConfigError: the game is of an ALFWorld before 0.4.
    """
    if "movable" in game_file or "Sliced" in game_file:
        raise Failure("unsupported", "ALFWorld's engine does not play sliced objects and movable receptacles")
    try:
        game = json.loads((root / game_file).read_text(encoding="utf-8"))
        solvable, grammar, walkthrough = game.get("solvable"), game["grammar"], game.get("walkthrough")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure("damaged", f"the game file cannot be read: {words(error)}") from error
    if "move {o} to {r}" not in grammar:
        raise ConfigError(
            f"{game_file} was made by an ALFWorld before 0.4, in which one says 'put X in/on Y' and not 'move X to "
            "Y': replace the games with alfworld-download -f"
        )
    if not solvable:
        raise Failure("unsolvable", "the game file does not say that it can be solved")
    if not walkthrough:
        return Failure("no walkthrough", "the game file has none")
    return _demo({"actions": walkthrough})


def make_task(root: Path, game_file: str, sources: Sequence[str], listed: dict[str, dict[str, Any]]) -> Task:
    """The task of a game, with its demonstrations where it is a training game. Raises ConfigError."""
    _, split, name, *_ = game_file.split("/")
    task_type = name.split("-")[0]  # of pick_and_place_simple-Mug-None-Desk-308
    task = Task(split, task_type, {"game_file": game_file, "task_type": task_type}, goal_of=goal)
    try:
        walkthrough = walkthrough_of(root, game_file)
    except Failure as failure:
        task.leave_out("", failure)
        return task
    if split == TRAIN:
        found = ((source, listed[source].get(game_file) if source in listed else walkthrough) for source in sources)
        task.candidates = [(source, demo) for source, demo in found if demo is not None]
    return task


def goal(first: str) -> str:
    """The goal as the engine words it."""
    return first.partition("Your task is to: ")[2].strip()


def find_tasks(options: Namespace, config: TcodConfig) -> list[Task]:
    """A task for each game, and for each demonstration without one. Raises ConfigError: the data cannot be used."""
    root = Path(config.tcod_data_root)
    games, unused = find_games(root), []
    listed: dict[str, dict[str, Any]] = {source: {} for source in options.demos if source != WALKTHROUGH}
    for source, demos in listed.items():
        for number, game_file, demo in read_source(source):
            if game_file in demos:
                why = Failure("duplicate", f"line {number} repeats it, the first counts")
            elif game_file not in games:
                why = Failure("missing", f"there is no such game below {root}")
            else:
                demos[game_file] = demo
                continue
            unused.append(Task(TRAIN, "", {"game_file": game_file}))
            unused[-1].leave_out(source, why)
    return unused + [make_task(root, game_file, options.demos, listed) for game_file in games]


def main() -> None:
    parser = option_parser(__doc__, "alfworld.yaml")
    parser.add_argument("--demos", nargs="+", default=[WALKTHROUGH], help="sources, best first, default: walkthrough")
    prepare("prepare_alfworld", find_tasks, parser.parse_args())


if __name__ == "__main__":
    main()
