"""Episodes on any SGLang server, outside training: what collect_demos.py and evaluate.py share.

It is the recipe's one episode loop, tcod_rollout.generate in evaluation mode: the full horizon, no curriculum, no
teacher. So slime must be importable, as it is in slime's container.
"""

import argparse
import asyncio
import copy
import itertools
import json
import math
import os
from argparse import Namespace
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import ray
import yaml
from ..environment import WORKER_CPUS, load_environment
from ..chat import ChatTokens
from ..config import ConfigError, TcodConfig, probe, read_settings
from ..tcod_rollout import generate
from ..teacher import TeacherFailure

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.types import Sample

HERE = Path(__file__).resolve().parent
FAILURES_IN_A_ROW = 32  # then something is broken for good

Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser, temperature: float) -> None:
    """The options of `start`; `temperature` is the default one."""
    parser.add_argument("--url", required=True, help="the SGLang server: http://HOST:PORT")
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint that it serves, for the tokenizer")
    parser.add_argument("--temperature", type=float, default=temperature, help="default: %(default)s")
    parser.add_argument("--max-turn-len", type=int, default=512, help="tokens of one turn, default: %(default)s")
    parser.add_argument("--max-context-len", type=int, default=16384, help="of an episode, default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=64, help="episodes at once, default: %(default)s")
    parser.add_argument(
        "--config",
        type=Path,
        default=HERE / "configs" / "alfworld_opd.yaml",
        help="YAML of tcod_* settings (horizon, environment, ...; the curriculum plays no part), default: %(default)s",
    )


def start(options: Namespace) -> Namespace:
    """Check the server against the options, start Ray, and return slime's arguments for `play`.

    Raises:
        ConfigError: with one sentence that names the option and the fix.
    """
    if options.concurrency < 1:
        raise ConfigError(f"--concurrency must be >= 1, got {options.concurrency}")
    if not 0 < options.max_turn_len < options.max_context_len:
        raise ConfigError(
            f"--max-turn-len {options.max_turn_len} bounds one turn: set it above 0 and below "
            f"--max-context-len {options.max_context_len}"
        )
    args = _slime_args(options)
    config = read_settings(args)
    _check_server(options, args)
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level="warning", log_to_driver=False)
    else:
        cpus = math.ceil(max(os.cpu_count() or 1, config.tcod_env_workers * WORKER_CPUS))
        ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="warning", log_to_driver=False)
    return args


def settings(options: Namespace, args: Namespace) -> dict[str, Any]:
    """What success depends on beside the games: results and journals record it."""
    config = TcodConfig.from_args(args)
    return {
        "model": options.model,
        "temperature": options.temperature,
        "max_turn_len": options.max_turn_len,
        "max_context_len": options.max_context_len,
        "horizon": config.tcod_horizon,
        "environment": config.tcod_environment,
        "admissible": config.tcod_admissible,
    }


def read_rows(path: Path, args: Namespace) -> list[Row]:
    """The rows of a JSONL file, each of them checked by the environment.

    Raises:
        ConfigError: the file cannot be used; the message names the line.
    """
    config = TcodConfig.from_args(args)
    environment = load_environment(config.tcod_environment)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"--rows {path} cannot be read ({error.strerror}): make it with prepare_alfworld.py"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row = {name: row[name] for name in ("prompt", "label", "metadata")}
            environment.check_row(row["metadata"], config.tcod_data_root)
            first = seen.setdefault(task_key(task(row)), number)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"line {number} of {path} cannot be played ({error}): prepare the data anew") from error
        if first != number:
            raise ConfigError(f"lines {first} and {number} of {path} are the same task: remove one of them")
        rows.append(row)
    if not rows:
        raise ConfigError(f"--rows {path} is empty: make it with prepare_alfworld.py")
    return rows


def task(row: Row) -> dict[str, Any]:
    """What tells one task from another: a row's metadata without its demonstration."""
    return {name: value for name, value in row["metadata"].items() if name != "demo"}


def task_key(task: dict[str, Any]) -> str:
    """The same for all spellings of a task, to look things up by."""
    return json.dumps(task, sort_keys=True)


async def play(args: Namespace, rows: Iterable[Row]) -> AsyncIterator[tuple[int, Sample]]:
    """Play an episode for each row, --concurrency of them at once.

    Yields:
        (position in `rows`, finished sample), in the order in which they finish. `failure(sample)` says whether an
        episode was lost to the engine or the environment; else sample.metadata["tcod"] is its record.

    Raises:
        RuntimeError: FAILURES_IN_A_ROW episodes failed one after the other.
    """
    sampling_params = GenerateState(args).sampling_params
    waiting = enumerate(rows)
    running: set[asyncio.Task[Sample]] = set()
    in_a_row: list[str] = []
    while True:
        for index, row in itertools.islice(waiting, args.sglang_server_concurrency - len(running)):
            sample = Sample(
                index=index, prompt=row["prompt"], label=row["label"], metadata=copy.deepcopy(row["metadata"])
            )
            running.add(asyncio.create_task(generate(args, sample, sampling_params, evaluation=True)))
        if not running:
            return
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for finished in done:
            sample = finished.result()
            in_a_row = [*in_a_row, failure(sample)] if failure(sample) else []
            yield sample.index, sample
            if len(in_a_row) == FAILURES_IN_A_ROW:
                raise RuntimeError(
                    f"the last {FAILURES_IN_A_ROW} episodes failed ({dict(Counter(in_a_row))}): see the warnings above"
                )


def failure(sample: Sample) -> str | None:
    """Why an episode was lost, or None for one that was played to its end."""
    return sample.metadata["tcod"].get("failure")


def _slime_args(options: Namespace) -> Namespace:
    """Those of slime's arguments that its sampling parameters and `generate` read."""
    host, _, port = options.url.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--url must be http://HOST:PORT, got {options.url}")
    if not options.config.is_file():
        raise ConfigError(f"--config {options.config} is not a file: name a YAML of tcod_* settings")
    args = Namespace(
        # engines
        hf_checkpoint=options.model,
        sglang_router_ip=host,
        sglang_router_port=int(port),
        sglang_server_concurrency=options.concurrency,
        sglang_dp_size=1,
        rollout_num_engines=1,
        use_distributed_post=False,
        # sampling
        apply_chat_template_kwargs={"enable_thinking": False},
        rollout_temperature=options.temperature,
        rollout_top_p=1.0,
        rollout_top_k=-1,
        rollout_stop=None,
        rollout_stop_token_ids=None,
        rollout_skip_special_tokens=False,
        rollout_max_response_len=options.max_turn_len,
        rollout_max_context_len=options.max_context_len,
        # no teacher
        opd_type=None,
        custom_config_path=str(options.config),
    )
    for key, value in (yaml.safe_load(options.config.read_text()) or {}).items():  # as slime does
        setattr(args, key, value)
    return args


def _check_server(options: Namespace, args: Namespace) -> None:
    try:
        tokenizer = GenerateState(args).tokenizer
        ChatTokens(tokenizer, args.apply_chat_template_kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--model {options.model}: {reason}; name the checkpoint that the server serves") from error
    try:
        url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
        limit = probe(url, tokenizer, args.apply_chat_template_kwargs)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no SGLang server answers at --url {options.url} ({error}): start it first") from error
    except TeacherFailure as error:
        raise ConfigError(
            f"the server at --url does not encode text as --model {options.model} does ({error}): "
            "name the checkpoint that it serves"
        ) from error
    if limit < options.max_context_len:
        raise ConfigError(
            f"the server takes sequences of at most {limit} tokens, less than --max-context-len "
            f"{options.max_context_len}: lower that, or raise the server's --context-length"
        )
