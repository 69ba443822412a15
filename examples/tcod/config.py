"""The recipe's settings (`tcod_*` keys of slime's --custom-config-path YAML) and the checks made before a run starts.

slime turns every key of that YAML into an attribute of `args` and accepts typing errors; here an unknown key, a wrong
type, a value out of range or a contradicting slime flag stops the run with one sentence that names it and the fix.
"""

import http.client
import json
import math
import os
import time
import typing
import urllib.request
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from .curriculum import Curriculum
from .environment import load_environment
from .chat import ChatTokens
from .teacher import TeacherFailure, check_scores, scoring_request

ROUTER_PATIENCE_S = 60.0  # The router lists an engine only after its own check of it, which slime does not wait for.
PROBED_TOKENS = 256  # Of the vocabulary, evenly spaced: two tokenizers may agree on a short text.


class ConfigError(ValueError):
    """A setting that cannot work. The message is one sentence that names the setting and the fix."""


@dataclass(frozen=True)
class TcodConfig:
    """The recipe's settings; every field is a key of the YAML. Times are in seconds, depths and horizons in turns."""

    tcod_variant: str
    """opd, f2b or b2f, see curriculum.py."""
    tcod_horizon: int
    """T: the largest number of turns of an episode, replayed ones included."""
    tcod_k_start: int = 1
    """Depth at rollout 0."""
    tcod_eta: int = 5
    """Rollouts per turn of depth."""
    tcod_b2f_budget: str = "slack"
    """The student's turns after b2f's hand-over: "slack" (k + tcod_b2f_slack) or "horizon" (all that T leaves)."""
    tcod_b2f_slack: int = 2
    """Turns beyond k under tcod_b2f_budget: slack."""
    tcod_environment: str = ".env_alfworld.AlfworldEnvironment"
    """Import path of the environment class, see environment.py."""
    tcod_data_root: str = "$ALFWORLD_DATA"
    """Folder that the rows' game_file paths are relative to; environment variables are expanded."""
    tcod_admissible: Literal["turn", "never"] = "turn"
    """List the admissible actions in each user turn, or never."""
    tcod_env_workers: int = 16
    """Ray actors that host environment engines."""
    tcod_engines_per_worker: int = 8
    """Engines in each actor; workers x engines bounds the episodes that play at once."""
    tcod_env_timeout_s: float = 120.0
    """Longest reset or step, waiting in the worker's queue included; then the worker is replaced."""
    tcod_engine_timeout_s: float = 1800.0
    """Longest request for one response, waiting in the engine's queue included; it is not repeated."""
    tcod_teacher_timeout_s: float = 300.0
    """Longest scoring request, waiting in the teacher's queue included; it is not repeated."""
    tcod_teacher_retries: int = 8
    """Further attempts after a failure that can heal (connection, 429, 5xx), within about 1.5 minutes."""
    tcod_teacher_concurrency: int = 64
    """Scoring requests in flight at once."""
    tcod_max_replacements: int = 4
    """Stop the run when failed groups were replaced more than this many whole batches within one rollout."""
    tcod_max_staleness: int = 2
    """Fully asynchronous mode: a group drawn more than this many rollouts ago is dropped."""
    tcod_eval_kl: bool = False
    """Score evaluation episodes too (those sampled at temperature 1), to measure the full-horizon KL."""

    @classmethod
    def from_args(cls, args: Namespace) -> "TcodConfig":
        """Read the `tcod_*` attributes of slime's args. Raises ConfigError."""
        known = {field.name: field for field in fields(cls)}
        given = {key: value for key, value in vars(args).items() if key.startswith("tcod_")}
        for key in given.keys() - known.keys():
            raise ConfigError(f"unknown setting {key} in {_yaml_name(args)}: the settings are {', '.join(known)}")
        types = typing.get_type_hints(cls)
        values = {}
        for key, field in known.items():
            if key in given:
                values[key] = _typed(key, given[key], types[key])
            elif field.default is MISSING:
                raise ConfigError(f"{key} is missing in {_yaml_name(args)}: add it, see configs/alfworld_f2b.yaml")
        values["tcod_data_root"] = _expand(values.get("tcod_data_root", cls.tcod_data_root))
        config = cls(**values)
        for key in (
            "tcod_env_workers",
            "tcod_engines_per_worker",
            "tcod_teacher_concurrency",
            "tcod_max_replacements",
        ):
            if getattr(config, key) < 1:
                raise ConfigError(f"{key} must be >= 1, got {getattr(config, key)}")
        for key in ("tcod_env_timeout_s", "tcod_engine_timeout_s", "tcod_teacher_timeout_s"):
            if not 0 < getattr(config, key) < float("inf"):
                raise ConfigError(f"{key} must be a positive number of seconds, got {getattr(config, key)}")
        for key in ("tcod_teacher_retries", "tcod_max_staleness"):
            if getattr(config, key) < 0:
                raise ConfigError(f"{key} must be >= 0, got {getattr(config, key)}")
        try:
            config.curriculum  # noqa: B018  its constructor checks the schedule
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return config

    @property
    def curriculum(self) -> Curriculum:
        return Curriculum(
            variant=self.tcod_variant,
            horizon=self.tcod_horizon,
            k_start=self.tcod_k_start,
            eta=self.tcod_eta,
            b2f_budget=self.tcod_b2f_budget,
            b2f_slack=self.tcod_b2f_slack,
        )


def check_settings(args: Namespace, dataset: Sequence[Any] | None) -> TcodConfig:
    """What would go wrong later, as far as settings and data show it; for before the first rollout.

    Args:
        args: slime's arguments.
        dataset: the training samples (each with .metadata), or None where the data source does not show them.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    config = read_settings(args)
    _check_hooks(args)
    _check_sampling(args)
    _check_evaluation_kl(args, config)
    if dataset is not None:
        check_training_rows(config, dataset, "--prompt-data")
    return config


def read_settings(args: Namespace) -> TcodConfig:
    """The settings by themselves, without slime's arguments. Raises ConfigError."""
    check_yaml(args)
    config = TcodConfig.from_args(args)
    if not Path(config.tcod_data_root).is_dir():
        raise ConfigError(f"tcod_data_root {config.tcod_data_root} is not a folder: set it to the game data's root")
    try:
        load_environment(config.tcod_environment)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"tcod_environment {config.tcod_environment} cannot be imported: {error}") from error
    return config


def check_models(args: Namespace, tokenizer: Any) -> None:
    """The same for the student's chat template, its engines, and the teacher, which must score the student's tokens.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    check_chat_template(args, tokenizer)
    _check_engines(args)
    if args.opd_type == "sglang":
        check_teacher(args, tokenizer)


def check_chat_template(args: Namespace, tokenizer: Any) -> None:
    """Whether turns of the student's chat template can be appended to a context. Raises ConfigError."""
    try:
        ChatTokens(tokenizer, args.apply_chat_template_kwargs)
    except ValueError as error:
        raise ConfigError(f"--hf-checkpoint {args.hf_checkpoint}: {error}") from error


def teacher_base_url(args: Namespace) -> str:
    return args.rm_url.rstrip("/").removesuffix("/generate")


def _yaml_name(args: Namespace) -> str:
    return getattr(args, "custom_config_path", None) or "--custom-config-path"


def _typed(key: str, value: Any, wanted: Any) -> Any:
    if typing.get_origin(wanted) is Literal:
        if value not in typing.get_args(wanted):
            raise ConfigError(f"{key} must be one of {', '.join(typing.get_args(wanted))}, got {value!r}")
        return value
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:  # not isinstance: True would pass for 1
        raise ConfigError(f"{key} must be of type {wanted.__name__}, got {value!r}")
    return value


def _expand(root: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(root))
    if "$" in expanded:
        raise ConfigError(f"tcod_data_root is {root}, but that variable is not set: export it or write the path")
    return expanded


def check_yaml(args: Namespace) -> None:
    """Raise ConfigError if the YAML holds anything but tcod_* keys."""
    path = getattr(args, "custom_config_path", None)
    if not path:
        return
    with open(path) as file:
        foreign = [key for key in yaml.safe_load(file) or {} if not str(key).startswith("tcod_")]
    if foreign:
        raise ConfigError(
            f"{path} sets {', '.join(map(str, foreign))}: slime reads this file too late for its own arguments, "
            "so pass those on the command line and keep tcod_* keys only"
        )


def _check_hooks(args: Namespace) -> None:
    hooks = {
        "custom_generate_function_path": "generate",
        "custom_rm_path": "reward_func",
        "custom_reward_post_process_path": "post_process_rewards",
        "dynamic_sampling_filter_path": "drop_failed",
    }
    for name, function in hooks.items():
        if not (getattr(args, name, None) or "").endswith(f"tcod_rollout.{function}"):
            raise ConfigError(
                f"--{name.replace('_', '-')} must be tcod_rollout.{function}: TCOD needs all of its hooks"
            )


def _check_sampling(args: Namespace) -> None:
    if not args.use_opd:
        raise ConfigError("--use-opd is missing: without it slime trains on the zero rewards alone")
    if not args.opd_kl_coef:
        raise ConfigError("--opd-kl-coef is 0: the KL is the only signal, so set it above 0")
    if args.normalize_advantages:
        raise ConfigError("--normalize-advantages would whiten the KL away: remove the flag")
    if args.partial_rollout:
        raise ConfigError("--partial-rollout cannot continue a multi-turn episode: remove the flag")
    if getattr(args, "use_rollout_routing_replay", False):
        raise ConfigError("--use-rollout-routing-replay has no routes for an environment's tokens: remove the flag")
    if args.group_rm:
        raise ConfigError("--group-rm hands whole groups to the reward function: remove the flag")
    if args.reward_key or args.eval_reward_key:
        raise ConfigError("--reward-key and --eval-reward-key do not apply, TCOD's reward is a number: remove them")
    if not args.rollout_max_context_len:
        raise ConfigError("--rollout-max-context-len is missing: set the largest length of a whole episode in tokens")
    if args.rollout_max_response_len >= args.rollout_max_context_len:
        raise ConfigError(
            f"--rollout-max-response-len {args.rollout_max_response_len} bounds one turn and must be below "
            f"--rollout-max-context-len {args.rollout_max_context_len}"
        )
    if args.opd_type == "megatron":
        if not args.offload_train:
            raise ConfigError(
                "--opd-type megatron needs --offload-train, or slime pushes the teacher's weights to the engines first"
            )
        return
    if not args.rm_url:
        raise ConfigError("--rm-url is missing: set it to the teacher's http://HOST:PORT/generate")
    if (args.rollout_temperature, args.rollout_top_p, args.rollout_top_k) != (1.0, 1.0, -1):
        raise ConfigError(
            "the teacher's scores are untempered, so --opd-type sglang needs --rollout-temperature 1, "
            f"--rollout-top-p 1 and --rollout-top-k -1, not {args.rollout_temperature:g}, {args.rollout_top_p:g} and "
            f"{args.rollout_top_k}"
        )


def untempered(sampling: Any) -> bool:
    """Whether temperature, top_p and top_k leave the policy as it is: the teacher's log-probs are always so."""
    return (sampling["temperature"], sampling["top_p"], sampling["top_k"]) == (1.0, 1.0, -1)


def _check_evaluation_kl(args: Namespace, config: TcodConfig) -> None:
    datasets = getattr(args, "eval_datasets", None) or []
    if config.tcod_eval_kl and datasets and not any(untempered(vars(dataset)) for dataset in datasets):
        raise ConfigError(
            "tcod_eval_kl measures a KL only on evaluation datasets with temperature 1, top_p 1 and top_k -1 and "
            "there is none: add one with --eval-config, or set tcod_eval_kl to false"
        )


def check_rows(config: TcodConfig, rows: Sequence[Any], source: str) -> None:
    """Whether samples can be played, as far as they and the files show it.

    Args:
        rows: with .metadata each.
        source: the flag or file that they come from, for the message.

    Raises:
        ConfigError: with the first row that cannot.
    """
    if not len(rows):
        raise ConfigError(f"{source} has no rows: prepare the data first, see README.md")
    environment = load_environment(config.tcod_environment)
    for number, row in enumerate(rows, 1):
        try:
            _check_demonstration(row.metadata)
            environment.check_row(row.metadata, config.tcod_data_root)
        except ValueError as error:
            raise ConfigError(f"row {number} of {source} cannot be played: {error}") from error


def check_training_rows(config: TcodConfig, rows: Sequence[Any], source: str) -> None:
    """The same for training samples, which b2f needs demonstrations for. Raises ConfigError."""
    check_rows(config, rows, source)
    if config.tcod_variant != "b2f":
        return
    lengths = [len((row.metadata.get("demo") or {}).get("actions") or []) for row in rows]
    empty = sum(length == 0 for length in lengths)
    long = sum(length > config.tcod_horizon for length in lengths)
    if empty or long:
        raise ConfigError(
            f"tcod_variant b2f needs a demonstration of 1 to {config.tcod_horizon} (tcod_horizon) actions for every "
            f"row of {source}: of {len(lengths)} rows {empty} have none and {long} are longer"
        )


def _check_demonstration(metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata is no JSON object but {metadata!r}")
    demo = metadata.get("demo") or {}
    if not isinstance(demo, dict):
        raise ValueError(f"its demo is no JSON object but {str(demo)[:80]!r}")
    for key in ("actions", "responses"):
        texts = demo.get(key) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{key} of its demo is no list of texts")


def _check_engines(args: Namespace) -> None:
    router = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
    deadline = time.monotonic() + ROUTER_PATIENCE_S
    try:
        while True:
            engines = [worker["url"] for worker in _ask(f"{router}/workers")["workers"]]
            if engines or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        limits = [_context_limit(engine) for engine in engines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the student's engines behind {router} do not answer ({error}): see their logs") from error
    if not limits:
        raise ConfigError(f"the router {router} knows no engine of the student: see the engines' logs")
    if min(limits) < args.rollout_max_context_len:
        raise ConfigError(
            f"the student's engine takes sequences of at most {min(limits)} tokens, less than "
            f"--rollout-max-context-len {args.rollout_max_context_len}: raise --sglang-context-length"
        )


def check_teacher(args: Namespace, tokenizer: Any) -> None:
    """Whether the teacher at --rm-url scores the student's tokens, and long enough episodes. Raises ConfigError."""
    try:
        limit = probe(teacher_base_url(args), tokenizer, args.apply_chat_template_kwargs)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no teacher answers at --rm-url {args.rm_url} ({error}): start it first") from error
    except TeacherFailure as failure:
        raise ConfigError(
            f"the teacher at --rm-url does not score a text as the student's tokens ({failure}): "
            "use a teacher with the student's tokenizer"
        ) from failure
    if limit < args.rollout_max_context_len:
        raise ConfigError(
            f"the teacher scores sequences of at most {limit} tokens, less than --rollout-max-context-len "
            f"{args.rollout_max_context_len}: raise its --context-length"
        )


def probe(server: str, tokenizer: Any, template_kwargs: dict[str, Any] | None) -> float:
    """The longest sequence, in tokens, that the SGLang server at this base URL is sure to take.

    Raises:
        OSError, ValueError: it does not answer, or not as SGLang does.
        TeacherFailure: it does not encode a text as this tokenizer does.
    """
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Go to cabinet 1: żółw, 龟, 🐢."}],
        tokenize=False,
        add_generation_prompt=True,
        **(template_kwargs or {}),
    )
    every = max(1, len(tokenizer) // PROBED_TOKENS)
    text += tokenizer.decode(list(range(0, len(tokenizer), every)), skip_special_tokens=True)
    limit = _context_limit(server)
    check_scores(_ask(f"{server}/generate", scoring_request(0, text=text)), tokenizer.encode(text), 0, len(tokenizer))
    return limit


def _context_limit(server: str) -> float:
    """The longest sequence, in tokens, that an SGLang server is sure to take; infinite where it does not say."""
    limit = _ask(f"{server}/server_info").get("max_req_input_len")
    return limit - 1 if isinstance(limit, int) else math.inf


def _ask(url: str, payload: dict[str, Any] | None = None) -> Any:
    """GET, or POST with a payload; a JSON object. Raises OSError, ValueError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # inside the cluster: never through a proxy
    data = json.dumps(payload).encode() if payload is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=60) as reply:
            answer = json.load(reply)
    except http.client.HTTPException as error:  # a reply that was cut off, or is no HTTP
        raise OSError(repr(error)) from error
    if not isinstance(answer, dict):
        raise ValueError(f"{url} answers with {str(answer)[:200]}")
    return answer
