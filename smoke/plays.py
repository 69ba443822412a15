"""What a smoke run plays: games and databases made here, ScienceWorld's own tasks, or any rows with their config."""

import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from examples.tcod import ConfigError
from examples.tcod.settings.checks import check_environment_class
from examples.tcod.settings.config import OF_AN_ENVIRONMENT, TcodConfig, read_yaml
from examples.tcod.settings.row_checks import check_evaluation_rows, check_training_rows
from examples.tcod.tools.common.jsonl import read_lines, read_rows, write_jsonl
from smoke.make_games import make_games

CONFIGS = Path(__file__).resolve().parent / "configs"
# What an arm sets beside its name: a curriculum that ends within a smoke run.
CURRICULA = {"f2b": {"tcod_k_start": 4, "tcod_eta": 1}, "b2f": {"tcod_k_start": 1, "tcod_eta": 2}}
IMITATION = {"tcod_eval_kl": False}  # it has no teacher
THOUGHTS = {"tcod_history": "turns", "tcod_thoughts": "keep"}
# The tiny models take sequences of 4,096 tokens, and spell words other than ALFWorld's letter by letter.
FOREIGN = ["--context-len", "4000", "--batch", "8", "--concurrency", "8"]
FOREIGN_ABOUT = (
    "What can be seen: episodes are played, replayed, scored and trained on. What cannot: success, or whether the "
    "method helps. The tiny models know the words of small ALFWorld games only, and their KL here is that of babble."
)
SCIENCEWORLD_TASKS = ("lifespan-longest-lived", "find-non-living-thing")  # solved in 3 to 7 actions


@dataclass(frozen=True)
class Play:
    """What is run.

    Attributes:
        name: the first part of its files' names; no two plays have the same.
        arms: the recipe's settings of each.
        data: folder of train.jsonl and heldout.jsonl.
        about: what can be seen, for the beginning.
        title: what was run, for the end.
        flags: train_arm's, for these rows.
        thinks: the models are those that think before they act.
    """

    name: str
    arms: dict[str, dict[str, Any]]
    data: Path
    about: str = FOREIGN_ABOUT
    title: str = "models that do not know this environment"
    flags: list[str] = field(default_factory=lambda: FOREIGN)
    thinks: bool = False


def choose(options: Namespace) -> Play:
    """What the options ask for, with its rows on disk. What cannot be played is one sentence and exit status 1."""
    try:
        own = {"alfworld": _alfworld, "scienceworld": _scienceworld, "sqlite": _sqlite, "mixed": _mixed}
        play = (_given if options.config else own[options.environment])(options)
        if "sft" in play.arms:
            record(play.data, play.arms["sft"])
        return play
    except (ConfigError, OSError) as error:
        sys.exit(f"smoke run: {error}")
    except subprocess.CalledProcessError as error:  # the prepare tool has said why
        sys.exit(error.returncode)


def settings_of(environment: str, variant: str, **more: Any) -> dict[str, Any]:
    """The recipe's settings for an arm in one of the smoke run's own environments."""
    arm = {"tcod_variant": variant, **CURRICULA.get(variant, {}), **(IMITATION if variant == "sft" else {})}
    return {**read_yaml(CONFIGS / f"{environment}.yaml"), **arm, **more}


def _alfworld(options: Namespace) -> Play:
    data = options.out / "data" / "alfworld"
    with tqdm(total=options.train_games + options.heldout_games, desc="games", unit="game", disable=None) as bar:
        make_games(data, options.train_games, options.heldout_games, progress=bar.update)
    more = {"tcod_data_root": str(data), **(THOUGHTS if options.thoughts else {})}
    return Play(
        name="alfworld-thoughts" if options.thoughts else "alfworld",
        arms={arm: settings_of("alfworld", arm, **more) for arm in options.variant or CURRICULA},
        data=data,
        about="What can be seen: the student, a damaged copy of the teacher, recovers.",
        title="recovery of a perturbed teacher",
        flags=[],
        thinks=options.thoughts,
    )


def _scienceworld(options: Namespace) -> Play:
    if shutil.which("java") is None:
        sys.exit("ScienceWorld needs Java: install a runtime first, on Debian or Ubuntu: default-jre-headless")
    play = _prepared(options, "scienceworld", "--variations", "8", "--tasks", *SCIENCEWORLD_TASKS)
    _take(play.data / "dev.jsonl", play.data / "heldout.jsonl", options.heldout_games)
    return play


def _sqlite(options: Namespace) -> Play:
    databases = ["--databases", str(options.train_games // 4), "--heldout", str(options.heldout_games // 4)]
    flags = [*databases, "--questions", "1", "--processes", "2"]
    return _prepared(options, "sqlite", *flags, tcod_data_root=str(options.out / "data" / "sqlite"))


def _prepared(options: Namespace, environment: str, *flags: str, **settings: Any) -> Play:
    """Rows that the recipe's own tool prepares."""
    data = options.out / "data" / environment
    arms = {arm: settings_of(environment, arm, **settings) for arm in options.variant or CURRICULA}
    config = write_settings(data / "tcod.yaml", next(iter(arms.values())))
    command = [sys.executable, "-m", f"examples.tcod.tools.prepare_{environment}", "--out", str(data)]
    subprocess.run([*command, "--config", str(config), *flags], check=True)
    return Play(environment, arms, data)


def _mixed(options: Namespace) -> Play:
    """All of them in one run, ScienceWorld where there is Java."""
    makers = [_alfworld, _sqlite, *([_scienceworld] if shutil.which("java") else [])]
    plays = {play.name: play for play in (make(options) for make in makers)}
    arms = {}
    for arm, settings in plays["alfworld"].arms.items():
        of_all = {key: value for key, value in settings.items() if key not in OF_AN_ENVIRONMENT}
        entries = {
            name: {key: value for key, value in play.arms[arm].items() if key in OF_AN_ENVIRONMENT}
            for name, play in plays.items()
        }
        arms[arm] = {**of_all, "tcod_horizon": settings["tcod_horizon"], "tcod_environments": entries}
    data = options.out / "data" / "mixed"
    for split in ("train.jsonl", "heldout.jsonl"):
        rows = [(name, row) for name, play in plays.items() for _, row in read_lines(play.data / split)]
        write_jsonl(data / split, [row | {"metadata": {"environment": name, **row["metadata"]}} for name, row in rows])
    return Play("mixed", arms, data)


def _given(options: Namespace) -> Play:
    """The rows of --data, as many as a smoke run plays. Without a heldout.jsonl, training rows are evaluated.

    The settings are those of --config, with processes for a laptop, and a KL for the evaluations' table.
    """
    settings = read_yaml(options.config)
    variants: Sequence[str] = options.variant or [settings.get("tcod_variant", "f2b")]
    arms = {arm: {**settings, "tcod_variant": arm, "tcod_eval_kl": arm != "sft"} for arm in variants}
    train, heldout = options.data / "train.jsonl", options.data / "heldout.jsonl"
    heldout = heldout if heldout.exists() else train
    for arm in arms.values():
        given = TcodConfig.from_mapping(arm, str(options.config))
        check_environment_class(given)
        check_training_rows(given, read_rows(train), str(train), recorded=False)
        check_evaluation_rows(given, read_rows(heldout), str(heldout))
        arm["tcod_env_workers"] = min(given.tcod_env_workers, 2)
        for entry in arm.get("tcod_environments", {}).values():
            entry["tcod_env_workers"] = min(entry.get("tcod_env_workers", 2), 2)
    name = f"{options.config.stem}-{options.data.name}"
    data = options.out / "data" / name
    data.mkdir(parents=True, exist_ok=True)
    _take(train, data / "train.jsonl", options.train_games)
    _take(heldout, data / "heldout.jsonl", options.heldout_games)
    return Play(name, arms, data)


def record(data: Path, settings: dict[str, Any]) -> None:
    """Have the training rows tell what the environment says in their demonstrations: imitation asks it nothing."""
    rows = data / "train.jsonl"
    config = write_settings(data / "record.yaml", settings)
    command = [sys.executable, "-m", "examples.tcod.tools.check_environment", "--config", str(config)]
    subprocess.run([*command, "--rows", str(rows), "--record", str(rows)], check=True, stdout=subprocess.DEVNULL)


def _take(source: Path, target: Path, rows: int) -> None:
    write_jsonl(target, [row for _, row in islice(read_lines(source), rows)])


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    """A YAML for --config."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path
