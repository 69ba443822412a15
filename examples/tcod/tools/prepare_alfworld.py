"""Turn an ALFWorld download into slime's JSONL: train, valid_seen, valid_unseen and hard.

    python -m examples.tcod.tools.prepare_alfworld --out DIR --demos walkthrough
    python -m examples.tcod.tools.prepare_alfworld --out DIR --demos train_expert.jsonl walkthrough

The games are the playable ones below tcod_data_root/json_2.1.1. --demos names sources of demonstrations for the
training games, best first:

    walkthrough   the planner's own solution, out of the game file: short, and made with knowledge of the whole room
    FILE          JSONL with the actions of a teacher: TCOD's published lists, or what collect_demos.py wrote

prepare.py opens the games, replays the demonstrations, and says what becomes of them.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from .. import ConfigError, Failure, words
from ..environments.protocol import Observation
from ..episode.demonstration import Demonstration
from ..settings.config import TcodConfig
from .prepare import TRAIN, Candidate, LeftOut, Task, check_tasks, option_parser, run, write_sets

DATA_VERSION = "json_2.1.1"
SPLITS = ("train", "valid_seen", "valid_unseen")
WALKTHROUGH = "walkthrough"
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)

# ------------------------------------------------------------------------------------------- games and their sources


def split_of(game_file: str) -> str:
    return game_file.split("/")[1]


def task_type(game_file: str) -> str:
    """The task type begins the name of a task's folder: pick_and_place_simple-Mug-None-Desk-308."""
    return game_file.split("/")[2].split("-")[0]


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
            raise ConfigError(
                f"no games below {folder}: run alfworld-download, or set ALFWORLD_DATA to where it put them"
            )
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


def read_source(path: str) -> tuple[dict[str, Demonstration], list[LeftOut]]:
    """Demonstrations by game file out of published lists or this recipe's rows, and the repeated ones.

    A game that is only named, with no "actions" and no "demo", has none.

    Raises:
        ConfigError: the file or a line of it cannot be read; never skipped.
    """
    demos: dict[str, Demonstration | None] = {}
    repeated = []
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"--demos {path} cannot be read ({error.strerror}): name a JSONL file, or walkthrough"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row = row.get("metadata", row)  # the published lists have no metadata
            game_file = rebase(row["game_file"])
            demo = _demo(row.get("demo", row))
        except (Failure, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"line {number} of {path} is no row with a game_file and actions ({error!r})") from error
        if game_file in demos:
            detail = f"line {number} repeats the game, the first one counts"
            repeated.append(LeftOut({"game_file": game_file}, path, "duplicate", detail))
        else:
            demos[game_file] = demo
    return {game_file: demo for game_file, demo in demos.items() if demo is not None}, repeated


def _demo(fields: dict[str, Any]) -> Demonstration | None:
    """The demonstration of a line, or None where it has no actions at all. Raises Failure: demo_malformed."""
    if "actions" not in fields:
        return None
    if fields["actions"] is None:  # not the same as an empty list, which says that the game was never solved
        raise Failure("demo_malformed", "its actions are null")
    demo = Demonstration.of({"demo": fields})
    # The planner's spelling has stray double spaces; the engine wants its own.
    return replace(demo, actions=tuple(" ".join(action.split()) for action in demo.actions))


# --------------------------------------------------------------------------------------------------------- the tasks


def open_game(root: Path, game_file: str) -> Demonstration | Failure:
    """The walkthrough in a game file.

    Raises:
        Failure: unsupported, unsolvable or damaged.
        ConfigError: the game is of an ALFWorld before 0.4.
    """
    if task_type(game_file) not in TASK_TYPES or "Sliced" in game_file:
        raise Failure("unsupported", "ALFWorld's engine does not play sliced objects and movable receptacles")
    try:
        game = json.loads((root / game_file).read_text())
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


def make_task(root: Path, game_file: str, sources: Sequence[str], listed: dict[str, dict[str, Demonstration]]) -> Task:
    """The task of a game, with its demonstrations where it is a training game. Raises ConfigError."""
    metadata = {"game_file": game_file, "task_type": task_type(game_file)}
    task = Task(split_of(game_file), metadata["task_type"], metadata)
    try:
        walkthrough = open_game(root, game_file)
    except Failure as failure:
        return replace(task, fault=failure)
    if task.split != TRAIN:
        return task
    found = {source: listed[source].get(game_file) if source in listed else walkthrough for source in sources}
    return replace(task, candidates=[Candidate(source, demo) for source, demo in found.items() if demo is not None])


def goal(first: Observation) -> str:
    """The goal as the engine words it."""
    return first.text.partition("Your task is to: ")[2].strip()


def prepare(options: Namespace, config: TcodConfig) -> None:
    """Check everything, write the JSONL files, and print what is in them.

    Raises:
        ConfigError: the data cannot be used, or no set that could be trained on would come of it.
    """
    root = Path(config.tcod_data_root)
    games = find_games(root)
    listed, left_out = {}, []
    for source in options.demos:
        if source != WALKTHROUGH:
            listed[source], repeated = read_source(source)
            left_out += repeated
            for game_file in sorted(listed[source].keys() - set(games)):
                task, detail = {"game_file": game_file}, f"there is no such game below {root}"
                left_out.append(LeftOut(task, source, "missing", detail))
    tasks = [make_task(root, game_file, options.demos, listed) for game_file in games]
    checked = check_tasks(config, tasks, goal, options.processes)
    for entry in checked:
        entry.left_out = [_with_hint(line) for line in entry.left_out]
    write_sets(options.out, checked, left_out)


def _with_hint(line: LeftOut) -> LeftOut:
    is_old = line.reason == "demo_inadmissible" and "'put " in line.detail
    return replace(line, detail=f"{line.detail}: this ALFWorld says 'move X to Y'") if is_old else line


def main() -> None:
    parser = option_parser(__doc__, "alfworld.yaml")
    parser.add_argument("--demos", nargs="+", default=[WALKTHROUGH], help="sources, best first, default: walkthrough")
    run("prepare_alfworld", prepare, parser.parse_args())


if __name__ == "__main__":
    main()
