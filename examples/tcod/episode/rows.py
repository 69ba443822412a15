"""Rows of a data set, and the demonstrations in them: how they are read, and what makes them usable.

A row is {"prompt": goal, "label": task type, "metadata": {the environment's own keys, "demo": {"actions": [..],
"responses": [..] or absent, "ids": [[..], ..] and "vocabulary": ".." or absent}}}, a line of a JSONL file. Only B2F
and ReOPD need `demo`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import ConfigError, Failure, words
from ..environments.protocol import Environment, Observation, as_listed, ask, is_admissible

if TYPE_CHECKING:
    from ..model.chat_tokens import ChatTokens


@dataclass(frozen=True)
class Row:
    """One task, as slime's Sample has it too."""

    prompt: str
    label: str
    metadata: dict[str, Any]

    @property
    def task(self) -> dict[str, Any]:
        """What tells one task from another, see task_of."""
        return task_of(self.metadata)


def task_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """The environment's own keys: metadata without the demonstration and the episode's record."""
    return {name: value for name, value in metadata.items() if name not in ("demo", "tcod")}


def task_key(task: dict[str, Any]) -> str:
    """The same for all spellings of a task, to look things up by."""
    return json.dumps(task, sort_keys=True)


@dataclass(frozen=True)
class Demonstration:
    """A recorded solution: L actions, and the responses that they were parsed from where those were recorded.

    Many texts are sampled with other tokens than a tokenizer encodes them with: `ids` are the sampled ones, under the
    vocabulary (a digest, see ChatTokens) that they belong to.
    """

    actions: tuple[str, ...] = ()
    responses: tuple[str, ...] | None = None
    ids: tuple[list[int], ...] | None = None
    vocabulary: str | None = None

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> "Demonstration":
        """A row's demonstration; one without actions where the row has none.

        Raises:
            Failure: demo_malformed.
        """
        demo = metadata.get("demo") or {}
        if not isinstance(demo, dict):
            raise Failure("demo_malformed", f"its demo is no JSON object but {str(demo)[:80]!r}")
        actions, responses = demo.get("actions", []), demo.get("responses")
        for key, texts in (("actions", actions), ("responses", responses or [])):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise Failure("demo_malformed", f"{key} of its demo is no list of texts")
        ids = demo.get("ids")
        if ids is not None and not (
            isinstance(ids, list) and all(isinstance(turn, list) and {*map(type, turn)} <= {int} for turn in ids)
        ):
            raise Failure("demo_malformed", "ids of its demo is no list of lists of token ids")
        responses, ids = (None if values is None else tuple(values) for values in (responses, ids))
        return cls(tuple(actions), responses, ids, demo.get("vocabulary"))

    def check(self, horizon: int) -> None:
        """Whether B2F or ReOPD can use it, as far as it shows without an engine.

        Raises:
            Failure: demo_missing, demo_too_long or demo_mismatch.
        """
        if not self.actions:
            raise Failure("demo_missing", "the arm needs a demonstration and this row has no actions")
        if len(self.actions) > horizon:
            raise Failure("demo_too_long", f"{len(self.actions)} actions, the horizon is {horizon}")
        for name, values in (("responses", self.responses), ("turns of ids", self.ids)):
            if values is not None and len(values) != len(self.actions):
                raise Failure("demo_mismatch", f"{len(values)} {name}, {len(self.actions)} actions")

    def response(self, turn: int, observation: Observation, environment: type[Environment]) -> str:
        """The response to replay at `turn` (0-based), to this observation.

        Raises:
            Failure: demo_inadmissible, or demo_mismatch where the response does not give the action.
        """
        action = self.actions[turn]
        if not is_admissible(action, observation, environment):
            raise Failure("demo_inadmissible", f"turn {turn + 1} of the demonstration: {action!r} is not admissible")
        response = self.responses[turn] if self.responses else ask(environment, "format_action", action)
        said, valid = ask(environment, "parse_action", response)
        if not valid or as_listed(said, observation) != action:
            raise Failure("demo_mismatch", f"turn {turn + 1}: {action!r} is not the action of {response!r}")
        return response

    def sampled_ids(self, turn: int, chat: "ChatTokens") -> list[int] | None:
        """The tokens that the response was sampled with; None where they are not known, or not of this vocabulary."""
        if self.ids is None or self.responses is None or self.vocabulary != chat.vocabulary:
            return None
        return self.ids[turn] if chat.spells(self.ids[turn], self.responses[turn]) else None

    def check_step(self, turn: int, observation: Observation, over: bool) -> None:
        """Whether the engine executed the action of `turn`, and the student can go on from this answer.

        Raises:
            Failure: demo_inadmissible; demo_won_early, where the episode is over.
        """
        action = self.actions[turn]
        if observation.refused:
            raise Failure("demo_inadmissible", f"turn {turn + 1} of the demonstration: the engine refuses {action!r}")
        if over:
            raise Failure("demo_won_early", f"the episode ends at replayed turn {turn + 1}: {action!r}")


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file.

    Raises:
        ConfigError: the file cannot be read, is empty, or has a line that is no row; the message names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): name a JSONL file, see README.md") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            rows.append(Row(fields["prompt"], fields["label"], fields["metadata"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"line {number} of {path} is no row ({error!r}): prepare the data anew") from error
    if not rows:
        raise ConfigError(f"{path} has no rows: prepare the data first, see README.md")
    return rows


def check_rows(rows: Sequence[Any], source: str, environment: type[Environment], data_root: str) -> None:
    """Whether rows (or slime's samples) can be played, as far as they and the files show it.

    Args:
        source: the flag or file that they come from, for the message.

    Raises:
        ConfigError: with the first row that cannot.
    """
    if not len(rows):
        raise ConfigError(f"{source} has no rows: prepare the data first, see README.md")
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row.metadata, dict):
                raise ValueError(f"its metadata is no JSON object but {row.metadata!r}")
            Demonstration.of(row.metadata)
            environment.check_row(task_of(row.metadata), data_root)
        except Exception as error:  # ValueError is the environment's refusal, anything else its mistake
            reason = str(error) if isinstance(error, ValueError | Failure) else f"check_row raised {words(error)}"
            raise ConfigError(f"row {number} of {source} cannot be played: {reason}") from error


def check_demonstrations(rows: Sequence[Any], source: str, variant: str, horizon: int) -> None:
    """Whether b2f or reopd has a usable demonstration for every row. Raises ConfigError, with how many have none."""
    reasons: Counter[str] = Counter()
    for row in rows:
        try:
            Demonstration.of(row.metadata).check(horizon)
        except Failure as failure:
            reasons[failure.reason] += 1
    if reasons:
        other = (
            f", and in {n} the numbers of actions and responses or ids differ"
            if (n := reasons["demo_mismatch"])
            else ""
        )
        raise ConfigError(
            f"tcod_variant {variant} needs a demonstration of 1 to {horizon} (tcod_horizon) actions for every row of "
            f"{source}: of {len(rows)} rows {reasons['demo_missing']} have none and {reasons['demo_too_long']} are "
            f"longer{other}"
        )


def check_unique(rows: Sequence[Row], path: Path) -> None:
    """Whether every row is a task of its own. Raises ConfigError, with the first two lines that are not."""
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        first = seen.setdefault(task_key(row.task), number)
        if first != number:
            raise ConfigError(f"lines {first} and {number} of {path} are the same task: remove one of them")
