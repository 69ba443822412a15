"""environments/sqlite.py and its prepare tool: what a query may do, and that the demonstrations are right."""

import itertools
import json
import os
import re
import sqlite3
import sys
from contextlib import closing
from statistics import mean

import pytest

from examples.tcod.environments.protocol import action_of
from examples.tcod.environments.sqlite import MAX_CELL_CHARS, MAX_CHARS, SqliteEnvironment, is_right
from examples.tcod.tools import prepare_sqlite
from tests.support.toys import LocalPool

NUM_GPUS = 0
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
SLOW = "SELECT replace(hex(zeroblob(150000)),'0','a') LIKE '%'||replace(hex(zeroblob(20000)),'0','a')||'b'"
LONG = f"SELECT x FROM {'(SELECT x + x AS x FROM ' * 11}(SELECT id AS x FROM door){')' * 11}"  # in steps: 2^11 columns


@pytest.fixture
def engine(tmp_path):
    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as database, database:
        database.execute("CREATE TABLE door (id INTEGER, name TEXT)")
        database.executemany("INSERT INTO door VALUES (?, ?)", [(i, f"d{i}") for i in range(30)])
    (tmp_path / "a.sqlite").chmod(0o444)
    engine = SqliteEnvironment(str(tmp_path), max_rows=2, max_query_s=0.2)
    engine.reset({"database": "a.sqlite", "question": "How many doors?", "answer": "30"})
    return engine


def call(engine, name, **arguments):
    return engine.step(action_of([{"name": name, "arguments": arguments}]))


@pytest.mark.parametrize(
    "sql, shown",
    [
        ("SELECT COUNT(*) FROM door", "COUNT(*)\n30"),
        ("SELECT * FROM door", "id | name\n0 | d0\n1 | d1\n(only the first 2 rows are shown)"),
        ("SELECT 1 WHERE 0", "1\n(no rows)"),
        (
            "SELECT NULL, 1.5, x'00', CAST(x'ff' AS TEXT) AS t",
            "NULL | 1.5 | x'00' | t\nnull | 1.5 | (1 bytes) | \ufffd",
        ),
        ("SELECT * FROM wall", "error: no such table: wall"),
        ("SELEC", 'error: near "SELEC": syntax error'),
        ("", "error: this is no SELECT statement"),
        ("SELECT 1; SELECT 2", "error: You can only execute one statement at a time."),
        ("SELECT '\ud800'", "error: 'utf-8' codec can't encode"),
        ("DELETE FROM door", "error: not authorized"),
        ("CREATE TEMP TABLE t (i)", "error: not authorized"),
        ("PRAGMA writable_schema = 1", "error: not authorized"),
        ("SELECT * FROM pragma_table_info('door')", "error: not authorized"),
        ("ATTACH 'other.sqlite' AS other", "error: not authorized"),
        ("VACUUM INTO 'copy.sqlite'", "error: authorization denied"),
        ("SELECT load_extension('x')", "error: not authorized to use function: load_extension"),
        ("SELECT randomblob(1000000000)", "error: string or blob too big"),
        (SLOW, "error: string or blob too big"),
        ("SELECT name LIKE hex(zeroblob(26)) FROM door", "error: LIKE or GLOB pattern too complex"),
        (LONG, "error: it is too long, or takes too much memory"),
        (f"SELECT {'1' * 10_000}", "error: query string is too large"),
        ("SELECT hex(zeroblob(150)) AS h", f"h\n{'0' * MAX_CELL_CHARS}"),
        (ENDLESS, "error: it was stopped after 0.2 s"),
        (
            "SELECT a.name || b.name AS n FROM door a, door b, door c, door d, door e ORDER BY n",
            "error: it was stopped",
        ),
    ],
)
def test_a_query_reads_this_file_within_limits_and_nothing_else(engine, tmp_path, monkeypatch, sql, shown):
    monkeypatch.chdir(tmp_path)
    observation = call(engine, "query", sql=sql)
    assert observation.full_text == shown if "error" not in shown else observation.full_text.startswith(shown)
    assert observation.role == "tool" and observation.results == (observation.full_text,)
    assert not (observation.refused or observation.done)  # wrong SQL is answered, like any other
    assert os.listdir(tmp_path) == ["a.sqlite"]
    assert call(engine, "query", sql="SELECT COUNT(*) FROM door").full_text == "COUNT(*)\n30"


def test_tables_are_listed_and_described_and_what_is_no_call_is_refused(engine):
    calls = [{"name": "list_tables", "arguments": {}}, {"name": "describe", "arguments": {"table": "door"}}]
    both = engine.step(action_of(calls))
    assert both.results == ("door", "CREATE TABLE door (id INTEGER, name TEXT)") and not both.refused
    assert call(engine, "describe", table="wall").full_text == "error: there is no table wall"
    wrong = [call(engine, "drop"), call(engine, "query"), call(engine, "query", sql="", x="")]
    for refused in (engine.step("30"), *wrong):
        assert refused.refused and not refused.done
    assert call(engine, "drop").full_text.endswith("list_tables(), describe(table), query(sql), answer(answer)")


def test_a_sort_takes_memory_up_to_a_limit_and_no_disk(engine):
    engine.max_query_s = 60
    sql = "SELECT hex(zeroblob(4000)) || a.id FROM door a, door b, door c ORDER BY 1"  # 216 MB
    assert call(engine, "query", sql=sql).full_text == "error: it is too long, or takes too much memory"


def test_a_long_result_is_cut(engine):
    engine.tables["wide"] = "x" * (MAX_CHARS + 1)
    assert call(engine, "describe", table="wide").full_text == "x" * MAX_CHARS


def test_the_queries_of_an_answer_share_their_time(engine, monkeypatch):
    looks = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: 0.1 * next(looks))
    last = engine.step(action_of([{"name": "query", "arguments": {"sql": ENDLESS}}] * 2))
    assert last.results == ("error: it was stopped after 0.2 s",) * 2
    assert next(looks) == 5  # when it begins, three in the first query, one in the second


def test_an_answer_ends_the_episode_and_later_calls_are_left_out(engine):
    calls = [{"name": "answer", "arguments": {"answer": 30}}, {"name": "answer", "arguments": {"answer": "31"}}]
    last = engine.step(action_of(calls))
    assert (last.won, last.done, last.results) == (True, True, ("The answer is right.",))
    engine.reset({"database": "a.sqlite", "question": "How many doors?", "answer": "30"})
    last = engine.step(action_of(calls[1:]))
    assert (last.won, last.done, last.full_text) == (False, True, "The answer is wrong.")


@pytest.mark.parametrize(
    "given, right, same",
    [
        *[("30", "30", True), (" 30.0 ", "30", True), ("30.1", "30", False), ("2.67", "2.6666", True)],
        *[("1e2", "100", True), ("nan", "30", False), ("ADA", "Ada", True), ("Ada B", "Ada", False)],
        ("", "Ada", False),
    ],
)
def test_what_is_the_same_answer(given, right, same):
    assert is_right(given, right) is same


@pytest.mark.parametrize(
    "change, said",
    [
        ({"database": "../a.sqlite"}, "is no file below tcod_data_root"),
        ({"database": "b.sqlite"}, "is no file below"),
        ({"answer": 30}, "has no answer that is a text"),
    ],
)
def test_a_row_that_cannot_be_played_is_refused(engine, tmp_path, change, said):
    row = {"database": "a.sqlite", "question": "How many doors?", "answer": "30"}
    SqliteEnvironment.check_row(row, str(tmp_path))
    with pytest.raises(ValueError, match=said):
        SqliteEnvironment.check_row({**row, **change}, str(tmp_path / "sub" if ".." in str(change) else tmp_path))


def answers(tables, question):
    """The answer to a question, from the tables' rows."""
    (who, people), (what, things), (event, events) = tables
    value = question.split()[-1].strip("?")
    person = next((row for row in people if row[1] in question.split() or f"{row[1]}?" in question.split()), None)
    thing = next((row for row in things if row[1] in re.findall(r"\w+", question)), None)
    if question.startswith("What is the highest"):
        return max(row[3] for row in people if row[2] == person[2])
    if question.startswith("What is the average"):
        return mean(row[3] for row in things)
    if question.startswith("What is the sum"):
        return sum(row[3] for row in events if row[1] == person[0])
    if question.startswith("What is the"):
        return person[3]
    if question.startswith("Which"):
        return thing[2]
    if "itself included" in question:
        return sum(row[2] == thing[2] for row in things)
    there = [row[0] for row in people if row[2] == value]
    return sum(row[1] in there for row in events) if f"rows of {event} " in question else len(there)


def test_the_answers_are_right_and_the_demonstrations_win(tmp_path, monkeypatch):
    from examples.tcod.settings import build

    monkeypatch.setattr(build, "EnvironmentPool", LocalPool)
    monkeypatch.setattr("examples.tcod.tools.common.prepare.start_ray", lambda workers: None)
    out = tmp_path / "made"
    out.mkdir()
    monkeypatch.setenv("SQLITE_DATA", str(out))
    command = ["prepare_sqlite", "--out", str(out), "--databases", "12", "--heldout", "4"]
    monkeypatch.setattr(sys, "argv", command)
    prepare_sqlite.main()
    train, heldout = ([*map(json.loads, (out / f"{name}.jsonl").open())] for name in ("train", "heldout"))
    files = [{row["metadata"]["database"] for row in rows} for rows in (train, heldout)]
    assert [len(one) for one in files] == [12, 4] and not files[0] & files[1]
    assert {row["label"] for row in train} == set(prepare_sqlite.QUESTIONS)
    for row in train + heldout:
        metadata = row["metadata"]
        with closing(sqlite3.connect(out / metadata["database"])) as database:
            names = [name for (name,) in database.execute("SELECT name FROM sqlite_master")]
            tables = [(name, database.execute(f"SELECT * FROM {name}").fetchall()) for name in names]
        right = answers(tables, metadata["question"])
        given = metadata["answer"] if isinstance(right, str) else float(metadata["answer"])
        assert given == (right if isinstance(right, str) else pytest.approx(right, abs=0.0051)), row
        assert metadata["question"] == row["prompt"]
    assert all(row["metadata"]["demo"]["observations"][-1] == "The answer is right." for row in train)
    monkeypatch.setenv("SQLITE_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="is not .*sqlite.yaml's tcod_data_root"):
        prepare_sqlite.main()
