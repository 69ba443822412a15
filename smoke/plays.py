"""What a smoke run plays: ALFWorld games made here, ScienceWorld's own tasks, or any rows with their config."""

import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import yaml
from tqdm import tqdm

from examples.tcod import ConfigError
from examples.tcod.environments.protocol import load_environment
from examples.tcod.episode.jsonl import read_lines
from examples.tcod.episode.rows import check_rows, read_rows
from examples.tcod.settings.checks import check_environment_class, check_training_rows
from examples.tcod.settings.config import TcodConfig, read_yaml
from examples.tcod.tools.prepare import write_jsonl
from smoke.make_games import make_games

CONFIGS = Path(__file__).resolve().parent / "configs"
# The tiny models take sequences of 4,096 tokens, and spell words other than ALFWorld's letter by letter.
FOREIGN = ["--context-len", "4000", "--batch", "8", "--concurrency", "8"]
FOREIGN_ABOUT = (
    "What can be seen: episodes are played, replayed, scored and trained on. What cannot: success, or whether the "
    "method helps. The tiny models know the words of small ALFWorld games only, and their KL here is that of babble."
)
SCIENCEWORLD_TASKS = ("lifespan-longest-lived", "find-non-living-thing")  # solved in 3 to 7 actions


@dataclass(frozen=True)
class Play:
    """The arms' configurations; a folder of train.jsonl and heldout.jsonl; and train_arm's flags for them.

    Attributes:
        thinks: the models are those that think before they act.
    """

    configs: dict[str, Path]
    data: Path
    about: str = "What can be seen: the student, a damaged copy of the teacher, recovers."
    flags: list[str] = field(default_factory=list)
    thinks: bool = False


def choose(options: Namespace) -> Play:
    """What the options ask for, with its rows on disk. What cannot be played is one sentence and exit status 1."""
    try:
        if options.config:
            return _given(options)
        return {"alfworld": _alfworld, "scienceworld": _scienceworld}[options.environment](options)
    except (ConfigError, OSError) as error:
        sys.exit(f"smoke run: {error}")
    except subprocess.CalledProcessError as error:  # the prepare tool has said why
        sys.exit(error.returncode)


def _alfworld(options: Namespace) -> Play:
    data = options.out / "games"
    with tqdm(total=options.train_games + options.heldout_games, desc="games", unit="game", disable=None) as bar:
        make_games(data, options.train_games, options.heldout_games, progress=bar.update)
    name = "thoughts_{}" if options.thoughts else "{}"
    return Play({arm: CONFIGS / f"{name.format(arm)}.yaml" for arm in options.arms}, data, thinks=options.thoughts)


def _scienceworld(options: Namespace) -> Play:
    if shutil.which("java") is None:
        sys.exit("ScienceWorld needs Java: install a runtime first, on Debian or Ubuntu: default-jre-headless")
    data = options.out / "scienceworld"
    configs = {arm: CONFIGS / f"scienceworld_{arm}.yaml" for arm in options.arms}
    command = [sys.executable, "-m", "examples.tcod.tools.prepare_scienceworld", "--out", str(data), "--variations"]
    command += ["8", "--tasks", *SCIENCEWORLD_TASKS, "--config", str(configs[options.arms[0]])]
    subprocess.run(command, check=True)
    _take(data / "dev.jsonl", data / "heldout.jsonl", options.heldout_games)
    return Play(configs, data, FOREIGN_ABOUT, FOREIGN)


def _given(options: Namespace) -> Play:
    """The rows of --data, as many as a smoke run plays. Without a heldout.jsonl, training rows are evaluated.

    The settings are those of --config, with processes for a laptop, and a KL for the evaluations' table.
    """
    settings, data = read_yaml(options.config), options.out / "rows"
    given = TcodConfig.from_mapping(settings, str(options.config))
    check_environment_class(given)
    train, heldout = options.data / "train.jsonl", options.data / "heldout.jsonl"
    heldout = heldout if heldout.exists() else train
    check_training_rows(given, read_rows(train), str(train))
    check_rows(read_rows(heldout), str(heldout), load_environment(given.tcod_environment), given.tcod_data_root)
    settings |= {"tcod_env_workers": min(given.tcod_env_workers, 2), "tcod_eval_kl": True}
    data.mkdir(parents=True, exist_ok=True)
    config = data / "tcod.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    _take(train, data / "train.jsonl", options.train_games)
    _take(heldout, data / "heldout.jsonl", options.heldout_games)
    return Play({given.tcod_variant: config}, data, FOREIGN_ABOUT, FOREIGN)


def _take(source: Path, target: Path, rows: int) -> None:
    write_jsonl(target, [row for _, row in islice(read_lines(source), rows)])
