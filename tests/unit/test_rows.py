"""Lines of JSONL files, rows, and what makes a row playable."""

import json
import re

import pytest

from examples.tcod import ConfigError, Failure
from examples.tcod.environments.protocol import Observation
from examples.tcod.episode.demonstration import Demonstration, recorded
from examples.tcod.episode.rows import task_key, task_of
from examples.tcod.settings.config import TcodConfig
from examples.tcod.settings.row_checks import check_evaluation_rows, check_training_rows
from examples.tcod.tools.common.jsonl import read_lines, read_rows

NUM_GPUS = 0
SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x1cf"  # str.splitlines ends a line at each of them
B2F = TcodConfig(tcod_variant="b2f", tcod_horizon=3, tcod_environment="tests.support.corridor.Corridor")
ROW = {"prompt": SEPARATORS, "label": "", "metadata": {"goal": 1}}


def line(**changes: object) -> str:
    return json.dumps({**ROW, **changes}, ensure_ascii=False)


def test_lines_are_those_that_slime_reads(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"\n  \n{line()}\r\n\n\u00a0\n{line(label='é')}".encode())
    rows = read_rows(path)
    assert [(row.prompt, row.label, row.line) for row in rows] == [(SEPARATORS, "", 3), (SEPARATORS, "é", 6)]
    check_evaluation_rows(B2F, rows, str(path))


@pytest.mark.parametrize(
    "content, says",
    [
        (line(label=None).encode(), "its label is null"),
        (line(label=["x"]).encode(), 'its label is ["x"]'),
        (line(label=3).encode(), "its label is 3"),
        (line(prompt=[{"role": "user", "content": "x"}]).encode(), "its prompt is [{"),
        (line(metadata="{}").encode(), 'its metadata is "{}"'),
        (b'{"label": "", "metadata": {}}', "its prompt is missing"),
        (b"[]", "it is []"),
        (b'{"prompt": ', "Expecting value"),
        (b"[" * 100_000, "recursion"),
        (line(metadata={"goal": float("nan")}).encode(), "Out of range float values"),
        (line().replace("1}", "1e999}").encode(), "Out of range float values"),
        (json.dumps({**ROW, "label": "\ud800"}).encode(), "surrogates not allowed"),
        (line(label="é").encode("latin-1", "replace"), "it is not in UTF-8"),
        (b"\xef\xbb\xbf" + line().encode(), "byte order mark, and slime would leave it out"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_what_a_row_needs(tmp_path, content, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + content + b"\n")
    kind = f'line 2 of {path} is no row {{"prompt": text, "label": text, "metadata": {{..}}}}: '
    with pytest.raises(ConfigError, match="^" + re.escape(kind) + ".*" + re.escape(says)) as error:
        read_rows(path)
    assert "\n" not in str(error.value)


def test_lines_that_are_no_objects_are_left_out_on_request(tmp_path):
    path, left_out = tmp_path / "metrics.jsonl", []
    path.write_text('\ufeff{"n": 1}\nNaN\n{"n": NaN}\n{"n": ', "utf-8")
    assert [number for number, _ in read_lines(path, leave_out=left_out.append)] == [1, 3]
    reasons = (f"line 2 of {path} is no JSON object: it is NaN", f"line 4 of {path} is no JSON object: Expecting")
    assert all(map(str.startswith, left_out, reasons)) and len(left_out) == 2
    with pytest.raises(ConfigError, match="nowhere cannot be read .No such file"):
        list(read_lines(tmp_path / "nowhere"))


def test_one_check_says_which_line_has_no_usable_demonstration(tmp_path):
    path = tmp_path / "rows.jsonl"
    demos = [["right"], None, ["right"] * 4]
    rows = [{**ROW, "metadata": {"goal": goal, "demo": demo and {"actions": demo}}} for goal, demo in enumerate(demos)]
    path.write_text("".join("\n" + json.dumps(row) + "\n" for row in rows))
    rows = read_rows(path)
    check_evaluation_rows(B2F, rows, "f")
    reasons = re.escape(
        "2 of 3 rows have no usable demonstration {'demo_missing': 1, 'demo_too_long': 1}, the first is"
    )
    with pytest.raises(ConfigError, match=f"^{reasons} line 4 of f: it has none.*b2f needs one of 1 to 3 "):
        check_training_rows(B2F, rows, "f")
    with pytest.raises(ConfigError, match=r"^row \{'demo': 3\} of f cannot be played: its metadata has no goal"):
        check_evaluation_rows(B2F, [type("Sample", (), {"metadata": {"demo": 3}})], "f")


PARTS = [{"actions": "right"}, {"responses": [1]}, {"ids": "12"}, {"ids": [["a"]]}, {"seen": [1]}]


@pytest.mark.parametrize("demo", ["right", [], False, {"actions": None}, *PARTS])
def test_a_demonstration_of_another_form_is_malformed(demo):
    with pytest.raises(Failure, match=r"^its demo(\.\w+)* is .*: [^\n]*$"):
        Demonstration.of({"demo": demo})


@pytest.mark.parametrize("part", [{"responses": ["A"]}, {"ids": [[1]]}, {"observations": []}, {"seen": [{}]}])
def test_a_demonstrations_parts_are_of_all_its_actions(part):
    with pytest.raises(Failure, match=", 2 actions") as caught:
        Demonstration.of({"demo": {"actions": ["a", "b"], **part}}).check(4)
    assert caught.value.reason == "demo_mismatch"


def test_a_replayed_action_is_answered_as_it_was_recorded():
    demo = Demonstration(("right",), observations=("No.",))
    demo.check_step(0, Observation("No."), over=False)
    with pytest.raises(Failure, match="'right' gives 'You are at door 1.', not 'No.'") as caught:
        demo.check_step(0, Observation("You are at door 1."), over=False)
    assert caught.value.reason == "demo_mismatch"


def test_what_is_recorded_with_a_demonstration_is_what_was_seen():
    called = Observation("user", admissible=("user",), role="tool", results=("user", ""))
    seen = [Observation("user"), called, Observation("", won=True)]
    demo = {"actions": ["a", "b"], **recorded(seen)}
    demo = Demonstration.of({"demo": json.loads(json.dumps(demo))})
    assert [demo.seen_before(turn) for turn in range(2)] == seen[:2]


def test_the_first_turns_of_a_demonstration_are_those_of_all_its_parts():
    demo = Demonstration(("a", "b"), ("A", "B"), ([1], [2]), "v", ("x", "y"), ({"text": ""}, {}))
    assert demo.first(1) == Demonstration(("a",), ("A",), ([1],), "v", ("x",), ({"text": ""},))
    assert Demonstration(("a", "b")).first(1) == Demonstration(("a",))


def test_a_task_is_the_environments_own_keys_in_any_order():
    row = {"goal": 1, "demo": {"actions": []}, "tcod": {"n": 0}, "door": "left"}
    assert task_of(row) == {"goal": 1, "door": "left"}
    assert task_key(task_of(row)) == task_key({"door": "left", "goal": 1}) != task_key({"goal": 1})
