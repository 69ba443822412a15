"""Turn ScienceWorld's tasks into slime's JSONL: train, dev, test and hard.

    python -m examples.tcod.tools.prepare_scienceworld --out DIR
    python -m examples.tcod.tools.prepare_scienceworld --out DIR --tasks find-animal find-plant --variations 20

Nothing is downloaded: tasks and variations are in the package scienceworld, and the training set's demonstrations are
the engine's own solutions, cut at the success. prepare.py replays them, and says what becomes of them. Those longer
than the horizon are left out. Beyond slime's container this needs the package scienceworld, and Java.
"""

import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

from tqdm.contrib.concurrent import thread_map

from .. import ConfigError, Failure, words
from ..environments.scienceworld import ScienceworldEnvironment
from ..episode.demonstration import Demonstration
from ..settings.config import TcodConfig
from .common.command import at_least
from .common.prepare import TRAIN, Task, option_parser, prepare

GOLD = "gold"


def list_tasks(game: Any, names: list[str], variations: int, simplifications: str) -> Iterator[tuple[str, dict]]:
    """(split, metadata) of the first `variations` of each task in each split; 0: all.

    Args:
        game: a ScienceWorldEnv.

    Raises:
        ConfigError: there is no such task.
    """
    known = game.get_task_names()
    if unknown := set(names) - set(known):
        raise ConfigError(f"ScienceWorld has no task {', '.join(sorted(unknown))}: --tasks are of {', '.join(known)}")
    for name in names or known:
        game.load(name, 0, simplifications)
        numbers = {TRAIN: game.get_variations_train(), "dev": game.get_variations_dev()}
        numbers["test"] = game.get_variations_test()
        for split, listed in numbers.items():
            for number in listed[: variations or None]:
                yield split, {"task": name, "variation": number, "simplifications": simplifications}


def gold(game: Any, metadata: dict[str, Any]) -> Demonstration | Failure:
    """The engine's own solution."""
    try:
        game.load(metadata["task"], metadata["variation"], metadata["simplifications"], generateGoldPath=True)
        return Demonstration(tuple(game.get_gold_action_sequence()))
    except Exception as error:  # whatever comes out of Java
        return Failure("no gold sequence", words(error))


def goal(first: str) -> str:
    """The task as the engine words it."""
    return first.rpartition("\n\n")[2]


def find_tasks(options: Namespace, config: TcodConfig) -> list[Task]:
    """The tasks, with gold sequences where they are training tasks. Raises ConfigError."""
    engines = threading.local()  # each thread has a Java process of its own

    def game() -> Any:
        if not hasattr(engines, "own"):
            environment = ScienceworldEnvironment(config.tcod_data_root, **config.tcod_env_args)
            engines.own = started.enter_context(closing(environment)).game
        return engines.own

    def make_task(found: tuple[str, dict[str, Any]]) -> Task:
        split, metadata = found
        candidates = [(GOLD, gold(game(), metadata))] if split == TRAIN else []
        return Task(split, metadata["task"], metadata, candidates, cut=True, goal_of=goal)

    with ExitStack() as started:
        try:
            found = list(list_tasks(game(), options.tasks, options.variations, options.simplifications))
            return thread_map(make_task, found, max_workers=options.processes, desc="gold sequences", unit="task")
        except ImportError as error:
            raise ConfigError(f"ScienceWorld does not start: {words(error)}") from error
        except OSError as error:
            raise ConfigError(
                f"ScienceWorld does not start, with {options.processes} --processes: {words(error)}"
            ) from error


def main() -> None:
    parser = option_parser(__doc__, "scienceworld.yaml")
    parser.add_argument("--tasks", nargs="+", default=[], help="names of tasks, default: all 30")
    parser.add_argument("--variations", type=at_least(0), default=10, help="of a task and split, 0: all, default: 10")
    parser.add_argument("--simplifications", default="easy", help="of ScienceWorld's worlds, default: %(default)s")
    prepare("prepare_scienceworld", find_tasks, parser.parse_args())


if __name__ == "__main__":
    main()
