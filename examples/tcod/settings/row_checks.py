"""What makes rows playable, as far as they, the settings and the files show it."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from .. import ConfigError, Failure, words
from ..environments.protocol import Environment, ask, load_environment
from ..episode.demonstration import Demonstration
from ..episode.rows import place, task_of
from .config import TcodConfig

RowT = TypeVar("RowT")


def check_training_rows(config: TcodConfig, rows: Sequence[Any], source: str, recorded: bool = True) -> None:
    """Whether rows (or slime's samples) can be trained on.

    Args:
        source: the flag or file that they come from, for the message.
        recorded: False before what the environment said is recorded in the demonstrations, which imitation needs.

    Raises:
        ConfigError: with the first row that cannot, or with how many have no usable demonstration.
    """
    _check(config, rows, source, config.curriculum.needs_demonstration, recorded and config.tcod_variant == "sft")
    if "demo" in config.tcod_teacher_sees:
        _check_shown(config, rows, source)


def check_evaluation_rows(config: TcodConfig, rows: Sequence[Any], source: str) -> None:
    """Whether rows can be played. Raises ConfigError."""
    _check(config, rows, source)


def by_environment(config: TcodConfig, rows: Sequence[RowT], source: str) -> list[tuple[TcodConfig, list[RowT]]]:
    """The settings and the rows of each environment that has some. Raises ConfigError where a row names none."""
    groups: dict[str, list[RowT]] = {}
    for row in rows:
        try:
            groups.setdefault(config.for_row(row.metadata).name, []).append(row)
        except ConfigError as error:
            raise ConfigError(f"{place(row, source)} cannot be played: {error}") from error
    return [(own, groups[own.name]) for own in config.per_environment if own.name in groups]


def _check(
    config: TcodConfig, rows: Sequence[Any], source: str, needs_demo: bool = False, needs_seen: bool = False
) -> None:
    if not len(rows):
        raise ConfigError(f"{source} has no rows: prepare the data first, see README.md")
    for own, group in by_environment(config, rows, source):
        environment, reasons, first = load_environment(own.tcod_environment), Counter[str](), ""
        for row in group:
            try:
                _check_task(own, environment, row.metadata)
                demo = Demonstration.of(row.metadata)
                if needs_demo:
                    demo.check(own.tcod_horizon)
                for turn in range(len(demo.actions) if needs_seen else 0):
                    demo.seen_before(turn)
            except Failure as failure:
                reasons[failure.reason] += 1
                first = first or f"{place(row, source)}: {failure}"
            except Exception as error:  # ValueError is the environment's refusal, anything else its mistake
                reason = str(error) if isinstance(error, ValueError) else f"check_row raised {words(error)}"
                raise ConfigError(f"{place(row, source)} cannot be played: {reason}") from error
        if reasons:
            needs = f"; tcod_variant {own.tcod_variant} needs one of 1 to {own.tcod_horizon} (tcod_horizon) actions"
            raise ConfigError(
                f"{reasons.total()} of {len(group)} rows have no usable demonstration {dict(reasons)}, the first is "
                f"{first}{needs if needs_demo else ''}"
            )


def _check_shown(config: TcodConfig, rows: Sequence[Any], source: str) -> None:
    """Raises ConfigError where the teacher cannot be shown the demonstrations, or there is none to show."""
    shown = [row for row in rows if Demonstration.of(row.metadata).actions]
    for row in shown:
        try:
            Demonstration.of(row.metadata).check(math.inf)
        except Failure as failure:
            raise ConfigError(f"{place(row, source)} cannot be shown to the teacher: {failure}") from failure
    if not shown:
        raise ConfigError(
            f"no row of {source} has a demonstration: take demo out of tcod_teacher_sees (TEACHER_SEES), or add some"
        )


def _check_task(config: TcodConfig, environment: type[Environment], metadata: Any) -> None:
    """Raises ValueError, or whatever the environment's check_row does."""
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata is no JSON object but {metadata!r:.80}")
    environment.check_row(task := task_of(metadata), config.tcod_data_root)
    try:
        tools = ask(environment, "tools", task)
    except Failure as failure:
        raise ValueError(failure) from failure
    if tools and config.tcod_tool_parser is None:
        raise ValueError("its agent calls tools: set tcod_tool_parser to the model's parser in SGLang (qwen, ..)")
