"""Turn an ALFWorld download into slime's JSONL: train, valid_seen, valid_unseen and hard.

    python -m examples.tcod.tools.prepare_alfworld --out DIR --demos walkthrough
    python -m examples.tcod.tools.prepare_alfworld --out DIR --demos train_expert.jsonl walkthrough

The games are the playable ones below $ALFWORLD_DATA/json_2.1.1, each opened in the real engine. --demos names sources
of demonstrations for the training games, best first:

    walkthrough   the planner's own solution, out of the game file: short, and made with knowledge of the whole room
    FILE          JSONL with the actions of a teacher: TCOD's published lists, or what collect_demos.py wrote

The first source that settles a game decides. A demonstration that the engine replays (every action admissible, won
exactly by the last one, no longer than the horizon) puts the game into train.jsonl. An empty one says that the teacher
never solved the game: it goes into hard.jsonl, which is for evaluation. An unusable one is reported, and the next
source is asked. So all arms train on the same games, those with a demonstration.

Whatever is left out, a demonstration or a game, is a line of left_out.jsonl with its reason.
"""

import argparse
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from statistics import mean, median
from typing import Any

from tqdm import tqdm

from ..env_alfworld import AlfworldEnvironment
from ..errors import ConfigError, Failure
from ..rows import Demonstration

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


@dataclass(frozen=True)
class LeftOut:
    """A line of left_out.jsonl. `source` is the demonstration's, or "" where the game itself is left out."""

    game_file: str
    source: str
    reason: str
    detail: str


@dataclass
class Checked:
    """What the engine says of a game. `source` settled it: with a demonstration, or without one as never solved."""

    game_file: str
    goal: str = ""
    demo: Demonstration | None = None
    source: str | None = None
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def playable(self) -> bool:
        return bool(self.goal)


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
                f"no games below {folder}: run alfworld-download, or point --data-root to where it put them"
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


def read_source(path: str) -> tuple[dict[str, Demonstration | None], list[LeftOut]]:
    """Demonstrations by game file out of published lists or this recipe's rows, and the repeated ones.

    None for a game that is only named: no "actions", no "demo".

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
            repeated.append(
                LeftOut(game_file, path, "duplicate", f"line {number} repeats the game, the first one counts")
            )
        else:
            demos[game_file] = demo
    return demos, repeated


def _demo(fields: dict[str, Any]) -> Demonstration | None:
    """The demonstration of a line, or None where it has no actions at all. Raises Failure: demo_malformed."""
    if "actions" not in fields:
        return None
    demo = Demonstration.of({"demo": fields})
    return replace(demo, actions=tuple(" ".join(action.split()) for action in demo.actions))


# ------------------------------------------------------------------------------------------------------- the engine


def replay(environment: AlfworldEnvironment, game_file: str, demo: Demonstration, horizon: int) -> None:
    """Play a demonstration to its end, by the rules by which B2F replays one.

    Raises:
        Failure: demo_{missing, too_long, mismatch, inadmissible}; demo_won_early or demo_not_won, where the game is
            not won exactly by the last action.
    """
    demo.check(horizon)
    observation = environment.reset({"game_file": game_file})
    for turn, action in enumerate(demo.actions):
        if observation.won:
            raise Failure("demo_won_early", f"turn {turn + 1} of {len(demo.actions)} comes after the goal is reached")
        try:
            demo.response(turn, observation, type(environment))
        except Failure as failure:
            hint = ": this ALFWorld says 'move X to Y'" if action.startswith("put ") else ""
            raise Failure(failure.reason, f"{failure}{hint}") from failure
        observation = environment.step(action)
    if not observation.won:
        raise Failure("demo_not_won", f"{len(demo.actions)} actions do not reach the goal")


def check_game(
    environment: AlfworldEnvironment,
    root: Path,
    horizon: int,
    game_file: str,
    candidates: Sequence[tuple[str, Demonstration | None]],
) -> Checked:
    """Open a game and try its demonstrations in order. A candidate is (source, demonstration), best first.

    The walkthrough's is None, since it is in the game file; an empty one says that the source never solved the game.
    """
    checked = Checked(game_file)
    try:
        walkthrough, checked.goal = _open(environment, root, game_file)
    except Failure as error:
        checked.left_out.append(LeftOut(game_file, "", error.reason, str(error)))
        return checked
    for source, demo in candidates:
        try:
            if demo is None:
                demo = _demo({"actions": walkthrough})
                if not demo.actions:
                    raise Failure("no walkthrough", "the game file has none")
            if demo.actions:
                replay(environment, game_file, demo, horizon)
                checked.demo = demo
            checked.source = source
            return checked
        except Failure as error:
            checked.left_out.append(LeftOut(game_file, source, error.reason, str(error)))
    return checked


def _open(environment: AlfworldEnvironment, root: Path, game_file: str) -> tuple[list[str], str]:
    """The walkthrough in a game file and the goal as the engine words it."""
    if task_type(game_file) not in TASK_TYPES or "Sliced" in game_file:
        raise Failure("unsupported", "ALFWorld's engine does not play sliced objects and movable receptacles")
    try:
        game = json.loads((root / game_file).read_text())
        if not game.get("solvable"):
            raise Failure("unsolvable", "the game file does not say that it can be solved")
        first = environment.reset({"game_file": game_file}).text
        return game.get("walkthrough") or [], first.split("Your task is to: ")[1].strip()
    except Failure:
        raise
    except Exception as error:  # whatever the engine raises on a damaged file
        raise Failure("engine", f"the engine cannot open it: {error!r}") from error


_checker: functools.partial[Checked] | None = None  # of a worker process


def _start_worker(root: Path, horizon: int) -> None:
    global _checker
    _checker = functools.partial(check_game, AlfworldEnvironment(str(root)), root, horizon)


def _check(job: tuple[str, list[tuple[str, Demonstration | None]]]) -> Checked:
    return _checker(*job)


def check_games(
    root: Path, horizon: int, jobs: Sequence[tuple[str, list[tuple[str, Demonstration | None]]]], processes: int | None
) -> list[Checked]:
    """check_game for each job (game file, candidates), in parallel, with a progress bar.

    Raises:
        ConfigError: a worker process died.
    """
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (root, horizon)) as pool:
        try:
            return list(tqdm(pool.map(_check, jobs), total=len(jobs), desc="games in the engine", unit="game"))
        except BrokenProcessPool as error:
            raise ConfigError(
                f"a process that checks games died ({error}): see above, or try fewer --processes if memory ran out"
            ) from error


# -------------------------------------------------------------------------------------------------------- the sets


def make_sets(checked: Iterable[Checked]) -> tuple[dict[str, list[dict[str, Any]]], list[LeftOut]]:
    """Rows of train, valid_seen, valid_unseen and hard, and what is in none of them."""
    sets: dict[str, list[dict[str, Any]]] = {name: [] for name in (*SPLITS, "hard")}
    left_out = []
    for game in checked:
        left_out += game.left_out
        if not game.playable:
            continue
        metadata = {"game_file": game.game_file, "task_type": task_type(game.game_file)}
        name = split_of(game.game_file)
        if name == "train":
            if game.source is None:
                detail = "no source has a usable demonstration for this training game"
                left_out.append(LeftOut(game.game_file, "", "no demonstration", detail))
                continue
            if game.demo:
                metadata["demo"] = {name: list(texts) for name, texts in asdict(game.demo).items() if texts}
            else:
                name = "hard"
        sets[name].append({"prompt": game.goal, "label": metadata["task_type"], "metadata": metadata})
    return sets, left_out


def prepare(root: Path, out: Path, sources: Sequence[str], horizon: int, processes: int | None) -> None:
    """Check everything, write the JSONL files below `out`, and print what is in them.

    Raises:
        ConfigError: the data cannot be used, or no set that could be trained on would come of it.
    """
    games = find_games(root)
    listed, left_out = {}, []
    for source in sources:
        if source != WALKTHROUGH:
            listed[source], repeated = read_source(source)
            left_out += repeated
            missing = sorted(listed[source].keys() - set(games))
            left_out += [LeftOut(game, source, "missing", f"there is no such game below {root}") for game in missing]
    jobs = []
    for game_file in games:
        candidates: list[tuple[str, Demonstration | None]] = []
        if split_of(game_file) == "train":
            for source in sources:
                demo = listed.get(source, {}).get(game_file)
                if source == WALKTHROUGH or demo is not None:
                    candidates.append((source, demo))
        jobs.append((game_file, candidates))
    checked = check_games(root, horizon, jobs, processes)
    sets, more = make_sets(checked)
    left_out += more
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "left_out.jsonl", map(asdict, left_out))
    print(left_out_table(left_out, out / "left_out.jsonl"))
    if not sets["train"]:
        raise ConfigError(
            f"no training game has a usable demonstration: see {out / 'left_out.jsonl'}, or add walkthrough to --demos"
        )
    for split in SPLITS:
        if not sets[split]:
            raise ConfigError(f"no game of {split} can be played: see {out / 'left_out.jsonl'}")
    for name, rows in sets.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    print(sets_table(sets))
    print(lengths_table(sets["train"]))
    used = Counter(game.source for game in checked if game.demo)
    print("demonstrations by source: " + ", ".join(f"{source} {used[source]}" for source in sources))
    print(f"written to {out}")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Whole or not at all; a set without rows has no file, since slime refuses an empty one."""
    lines = [json.dumps(row) + "\n" for row in rows]
    if not lines:
        path.unlink(missing_ok=True)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines))
    partial.replace(path)


# ------------------------------------------------------------------------------------------------------- the report


def sets_table(sets: dict[str, list[dict[str, Any]]]) -> str:
    counts = {name: Counter(row["label"] for row in rows) for name, rows in sets.items()}
    lines = [f"{'games':<32}" + "".join(f"{name:>14}" for name in sets)]
    lines += [f"{kind:<32}" + "".join(f"{counts[name][kind]:>14}" for name in sets) for kind in TASK_TYPES]
    lines.append(f"{'all':<32}" + "".join(f"{len(rows):>14}" for rows in sets.values()))
    return "\n".join(lines)


def lengths_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'demonstrations, in actions':<32}{'shortest':>14}{'median':>14}{'mean':>14}{'longest':>14}"]
    for kind in (*TASK_TYPES, "all"):
        lengths = [len(row["metadata"]["demo"]["actions"]) for row in rows if kind in (row["label"], "all")]
        if lengths:
            lines.append(
                f"{kind:<32}{min(lengths):>14}{median(lengths):>14.0f}{mean(lengths):>14.1f}{max(lengths):>14}"
            )
    return "\n".join(lines)


def left_out_table(left_out: Sequence[LeftOut], path: Path) -> str:
    if not left_out:
        return "nothing is left out"
    lines = [f"left out, see {path}:"]
    examples = {(entry.source, entry.reason): entry for entry in reversed(left_out)}
    for (source, reason), count in Counter((entry.source, entry.reason) for entry in left_out).most_common():
        example = examples[source, reason]
        what = f"demonstrations of {source}" if source else "games"
        lines.append(f"{count:>6} {what}: {reason}, as {example.game_file}: {example.detail}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="holds json_2.1.1/, default: $ALFWORLD_DATA")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the JSONL files")
    parser.add_argument("--demos", nargs="+", default=[WALKTHROUGH], help="sources, best first, default: walkthrough")
    parser.add_argument("--horizon", type=int, default=30, help="tcod_horizon of the runs, default: %(default)s")
    parser.add_argument("--processes", type=int, help="that check games at once, default: one per core")
    options = parser.parse_args()
    try:
        if not (root := options.data_root or os.environ.get("ALFWORLD_DATA")):
            raise ConfigError("ALFWORLD_DATA is not set: export it, or pass --data-root")
        prepare(Path(root), options.out, options.demos, options.horizon, options.processes)
    except ConfigError as error:
        sys.exit(f"prepare_alfworld: {error}")


if __name__ == "__main__":
    main()
