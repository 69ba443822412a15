"""Make databases, questions about them and demonstrations, as slime's JSONL: train and heldout.

    export SQLITE_DATA=/root/tcod_sqlite && mkdir -p $SQLITE_DATA
    python -m examples.tcod.tools.prepare_sqlite --out $SQLITE_DATA

Every database is a file below DIR/databases: three tables about one of a few subjects, with random contents. Questions
are of four kinds: lookup, aggregate, join, and two steps, where a second query needs what the first one returned. An
answer is what the demonstration's own queries return. prepare.py replays them all, and says what becomes of them.
Questions of heldout.jsonl are about databases that training never sees.
"""

import random
import sqlite3
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from .. import ConfigError
from ..environments.protocol import action_of
from ..episode.demonstration import Demonstration
from ..settings.config import TcodConfig
from .common.command import at_least
from .common.prepare import TRAIN, Task, option_parser, prepare

WORDS = ("who", "place", "number", "what", "kind", "cost", "event", "amount")
SUBJECTS = (  # three tables and their columns: who is where, what is of which kind, and who did what
    "customer city age product category price purchase quantity",
    "patient town age treatment department cost visit minutes",
    "student school grade course field credits enrolment score",
    "player country rating game genre difficulty session points",
)
NAMES = (
    "Ada Ben Cora Dan Eva Finn Gina Hugo Ida Jon Kira Leo Mona Nils Olga Paul Rita Sven Tara Udo Vera Will Yan".split()
)
PLACES = "Arden Brook Calder Dover Elgin Forth".split()
THINGS = "Alto Basso Cello Dulci Erhu Flute Gong Harp Ikembe Jug Kora Lute".split()
KINDS = "amber birch coral delta ember flint".split()
JOINED = "{event} JOIN {who} ON {who}.id = {who}_id"
# By kind: (the question, the tables to look at, the queries). A second query has the first one's result for {first}.
QUESTIONS = {
    "lookup": (
        ("What is the {number} of the {who} {name}?", "who", "SELECT {number} FROM {who} WHERE name = '{name}'"),
        ("Which {kind} does the {what} {thing} have?", "what", "SELECT {kind} FROM {what} WHERE name = '{thing}'"),
    ),
    "aggregate": (
        (
            "How many rows of {who} have the {place} {spot}?",
            "who",
            "SELECT COUNT(*) FROM {who} WHERE {place} = '{spot}'",
        ),
        ("What is the average {cost} of a {what}?", "what", "SELECT ROUND(AVG({cost}), 2) FROM {what}"),
    ),
    "join": (
        (
            "What is the sum of the {amount} over every {event} of the {who} {name}? Without any it is 0.",
            "who event",
            f"SELECT COALESCE(SUM({{amount}}), 0) FROM {JOINED} WHERE name = '{{name}}'",
        ),
        (
            "How many rows of {event} are of a {who} with the {place} {spot}?",
            "who event",
            f"SELECT COUNT(*) FROM {JOINED} WHERE {{place}} = '{{spot}}'",
        ),
    ),
    "two_steps": (
        (
            "What is the highest {number} in the {place} of the {who} {name}?",
            "who",
            "SELECT {place} FROM {who} WHERE name = '{name}'",
            "SELECT MAX({number}) FROM {who} WHERE {place} = '{first}'",
        ),
        (
            "How many rows of {what} have the {kind} of {thing}, itself included?",
            "what",
            "SELECT {kind} FROM {what} WHERE name = '{thing}'",
            "SELECT COUNT(*) FROM {what} WHERE {kind} = '{first}'",
        ),
    ),
}


def make_database(file: Path, rng: random.Random) -> dict[str, Any]:
    """Write a database. Returns the words of its subject, and the names in it."""
    words = dict(zip(WORDS, rng.choice(SUBJECTS).split(), strict=True))
    names, things = rng.sample(NAMES, rng.randint(12, 20)), rng.sample(THINGS, rng.randint(6, 10))
    people = [(i, name, rng.choice(PLACES), rng.randint(1, 90)) for i, name in enumerate(names, 1)]
    goods = [(i, name, rng.choice(KINDS), rng.randint(1, 90)) for i, name in enumerate(things, 1)]
    events = [(i, rng.randint(1, len(names)), rng.randint(1, len(things)), rng.randint(1, 9)) for i in range(1, 60)]
    tables = {
        "{who} (id INTEGER, name TEXT, {place} TEXT, {number} INTEGER)": people,
        "{what} (id INTEGER, name TEXT, {kind} TEXT, {cost} INTEGER)": goods,
        "{event} (id INTEGER, {who}_id INTEGER, {what}_id INTEGER, {amount} INTEGER)": events,
    }
    file.unlink(missing_ok=True)
    with closing(sqlite3.connect(file)) as database, database:
        for form, rows in tables.items():
            database.execute(f"CREATE TABLE {form.format(**words)}")
            database.executemany(f"INSERT INTO {form.format(**words).split()[0]} VALUES (?, ?, ?, ?)", rows)
    return {**words, "names": names, "things": things}


def ask(
    database: sqlite3.Connection, words: dict[str, Any], form: tuple[str, ...], rng: random.Random
) -> dict[str, Any]:
    """{"question": .., "answer": .., "actions": the demonstration's}, from one of QUESTIONS."""
    question, tables, *queries = form
    drawn = {"name": rng.choice(words["names"]), "thing": rng.choice(words["things"]), "spot": rng.choice(PLACES)}
    calls = [("list_tables", {}), *(("describe", {"table": words[table]}) for table in tables.split())]
    result = ""
    for query in queries:
        sql = query.format(**words, **drawn, first=result)
        ((value,),) = database.execute(sql)
        result = str(value)
        calls.append(("query", {"sql": sql}))
    calls.append(("answer", {"answer": result}))
    actions = [action_of([{"name": name, "arguments": arguments}]) for name, arguments in calls]
    return {"question": question.format(**words, **drawn), "answer": result, "actions": actions}


def make_tasks(folder: Path, databases: dict[str, int], per_kind: int, seed: int) -> Iterator[Task]:
    """Databases below a folder, so many of each split, and questions about each: so many of a kind, at most."""
    (folder / "databases").mkdir(parents=True, exist_ok=True)
    for split, count in databases.items():
        for number in range(count):
            name, rng = f"databases/{split}_{number:04}.sqlite", random.Random(f"{seed} {split} {number}")
            words = make_database(folder / name, rng)
            with closing(sqlite3.connect(folder / name)) as database:
                for kind, forms in QUESTIONS.items():
                    asked = [ask(database, words, rng.choice(forms), rng) for _ in range(per_kind)]
                    for one in {one["question"]: one for one in asked}.values():
                        demo = Demonstration(tuple(one.pop("actions")))
                        candidates = [("its queries", demo)] if split == TRAIN else []
                        yield Task(split, kind, {"database": name, **one}, candidates)


def find_tasks(options: Namespace, config: TcodConfig) -> list[Task]:
    """Make everything. Raises ConfigError, OSError."""
    root, out = Path(config.tcod_data_root).resolve(), options.out.resolve()
    if root != out:
        raise ConfigError(f"--out {out} is not {options.config}'s tcod_data_root {root}: name it")
    databases = {TRAIN: options.databases, "heldout": options.heldout}
    return list(make_tasks(out, databases, options.questions, options.seed))


def main() -> None:
    parser = option_parser(__doc__, "sqlite.yaml")
    parser.add_argument("--databases", type=at_least(1), default=200, help="of training, default: %(default)s")
    parser.add_argument("--heldout", type=at_least(1), default=25, help="of the evaluation, default: %(default)s")
    parser.add_argument("--questions", type=at_least(1), default=3, help="of a kind on each, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    prepare("prepare_sqlite", find_tasks, parser.parse_args())


if __name__ == "__main__":
    main()
