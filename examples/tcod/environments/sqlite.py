"""Questions about a database, answered with tools, on SQLite from Python's standard library.

Dataset rows carry `metadata["database"]`, a file below the data root, `metadata["question"]` and `metadata["answer"]`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

from .protocol import Environment, Observation, calls_of

MAX_CHARS, MAX_CELL_CHARS = 3000, 200  # of a result, and of one value in it
MAX_MEMORY_BYTES = 64 * 2**20  # of SQLite in this process
STEPS = 200  # of SQLite's machine, between two looks at the clock
# It looks at no clock within a function, nor in a line of steps without a jump: the longest line takes about 2 s.
LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_LENGTH: 10_000,  # of a value or a row, in bytes
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 3000,  # steps that a query is compiled to
}
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}

# A tool's description, and those of its arguments, which are texts.
TOOLS = {
    "list_tables": ("List the tables of the database.", {}),
    "describe": ("Show the columns of a table.", {"table": "its name"}),
    "query": ("Run one SELECT statement.", {"sql": "the statement"}),
    "answer": ("Give the answer, which ends the task.", {"answer": "a name or a number alone"}),
}
_SYSTEM_PROMPT = (
    "You answer a question about a SQLite database, which you can only read. Look at its tables, query them, and then "
    "call answer with a name or a number alone. Round numbers to 2 decimals."
)


class SqliteEnvironment(Environment):
    """Opens a row's database read-only. What the model writes reads this file, and nothing else.

    Args:
        max_rows: of a query's result; further ones are left out.
        max_query_s: the queries of an answer are stopped after so long.
    """

    def __init__(self, data_root: str = "", max_rows: int = 20, max_query_s: float = 2.0) -> None:
        super().__init__(data_root)
        self.max_rows, self.max_query_s = max_rows, max_query_s
        self.database: sqlite3.Connection | None = None

    def reset(self, metadata: dict[str, Any]) -> Observation:
        """Open the row's database; the first observation is the question."""
        self.close()
        file = Path(self.data_root, metadata["database"]).resolve()
        self.database = database = sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)
        database.text_factory = lambda text: text.decode(errors="replace")
        self.tables = dict(database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name"))
        database.execute("PRAGMA temp_store = MEMORY")  # sorting writes no files
        database.execute(f"PRAGMA hard_heap_limit = {MAX_MEMORY_BYTES}")
        for limit, most in LIMITS.items():
            database.setlimit(limit, most)
        database.set_authorizer(_authorize)
        database.set_progress_handler(lambda: time.monotonic() > self.deadline, STEPS)
        self.right, self.given = str(metadata["answer"]), None
        return Observation(metadata["question"])

    def step(self, action: str) -> Observation:
        """Run the calls of an answer, one after the other; the tool answer ends the episode."""
        results, executed, self.deadline = [], False, time.monotonic() + self.max_query_s
        for call in calls_of(action):
            name, values = call["name"], [_as_text(value) for value in call["arguments"].values()]
            if name not in TOOLS or set(call["arguments"]) != set(TOOLS[name][1]):
                forms = ", ".join(f"{tool}({', '.join(arguments)})" for tool, (_, arguments) in TOOLS.items())
                results.append(f"error: there is no such tool, the tools are {forms}")
                continue
            executed = True
            results.append(getattr(self, f"_{name}")(*values)[:MAX_CHARS])
            if self.given is not None:
                break
        if not results:
            return Observation("Call a tool.", refused=True)
        over, won = self.given is not None, self.given is not None and is_right(self.given, self.right)
        return Observation("", won, over, refused=not executed, role="tool", results=tuple(results))

    def finish(self, last: Observation) -> Observation:
        """Close the database."""
        self.close()
        return last

    def close(self) -> None:
        """Let go of the file."""
        if self.database:
            self.database.close()
        self.database = None

    def _list_tables(self) -> str:
        return ", ".join(self.tables)

    def _describe(self, table: str) -> str:
        return self.tables.get(table) or f"error: there is no table {table[:MAX_CELL_CHARS]}"

    def _query(self, sql: str) -> str:
        try:
            found = self.database.execute(sql)
            rows = found.fetchmany(self.max_rows + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
            stopped = f"it was stopped after {self.max_query_s:g} s" if str(error) == "interrupted" else str(error)
            return f"error: {stopped or 'it is too long, or takes too much memory'}"
        if not found.description:
            return "error: this is no SELECT statement"
        lines = [[column[0] for column in found.description], *rows[: self.max_rows]]
        table = [" | ".join(_as_text(value)[:MAX_CELL_CHARS] for value in line) for line in lines]
        more = [f"(only the first {self.max_rows} rows are shown)"] if len(rows) > self.max_rows else []
        return "\n".join([*table, *more, *["(no rows)"] * (not rows)])

    def _answer(self, answer: str) -> str:
        self.given = answer
        return "The answer is right." if is_right(answer, self.right) else "The answer is wrong."

    @staticmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None:
        """Raise ValueError if the row lacks a key, or its database is no file below the data root."""
        for key in ("database", "question", "answer"):
            if not isinstance(metadata.get(key), str):
                raise ValueError(f"its metadata has no {key} that is a text")
        root, name = Path(data_root).resolve(), metadata["database"]
        file = (root / name).resolve()
        if not (file.is_relative_to(root) and file.is_file()):
            raise ValueError(f"its database {name} is no file below tcod_data_root {root}")

    @staticmethod
    def system_prompt(metadata: dict[str, Any]) -> str:
        """The rules in about 50 words."""
        return _SYSTEM_PROMPT

    @staticmethod
    def tools(metadata: dict[str, Any]) -> list[dict[str, Any]]:
        """Four tools, the same for every row."""
        return [_schema(name, *about) for name, about in TOOLS.items()]


def is_right(given: str, right: str) -> bool:
    """Whether an answer is the right one, but for case, white space around it, and what rounding does to a number."""
    given, right = given.strip().casefold(), right.strip().casefold()
    try:
        return abs(float(given) - float(right)) <= 0.005 + 1e-9
    except ValueError:
        return given == right


def _schema(name: str, description: str, arguments: dict[str, str]) -> dict[str, Any]:
    properties = {argument: {"type": "string", "description": about} for argument, about in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _authorize(action: int, name: str | None, detail: str | None, *place: str | None) -> int:
    """No writing, no other file, no PRAGMA, no extension."""
    allowed = action in READING and detail != "load_extension"
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _as_text(value: Any) -> str:
    """A value of a call's JSON, or of a database."""
    if isinstance(value, bytes):
        return f"({len(value)} bytes)"
    return value if isinstance(value, str) else json.dumps(value)
