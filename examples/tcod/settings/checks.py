"""The checks before a run starts: what would go wrong later, as far as slime's arguments and the servers show it.

slime has no hook before the first rollout, so they are made there, and by the run script before a GPU is taken.
"""

import inspect
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import PACKAGE, ConfigError
from ..environments.protocol import load_environment
from ..episode.loop import is_untempered
from ..episode.rows import check_demonstrations, check_rows
from ..training.turn_mean import is_turn_mean
from .config import TcodConfig, read_yaml

logger = logging.getLogger(__name__)


def check_settings(args: Namespace, rows: Sequence[Any] | None) -> TcodConfig:
    """The settings by themselves, then against slime's arguments and the training data.

    Args:
        args: slime's arguments.
        rows: the training samples (each with .metadata), or None where the data source does not show them.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    if getattr(args, "custom_config_path", None):
        read_yaml(Path(args.custom_config_path))  # slime takes any key in it
    config = TcodConfig.from_args(args)
    check_environment(config)
    _check_hooks(args)
    _check_sampling(args)
    _check_over_sampling(args)
    _check_evaluation_hooks(args)
    _check_loss(args)
    _check_fan_out(args, config)
    if args.opd_type == "sglang":
        _check_teacher_flags(args)
    _check_weight_push(args)
    _check_evaluation_kl(args, config)
    if rows is not None:
        check_training_rows(config, rows, "--prompt-data")
    return config


def check_environment(config: TcodConfig) -> None:
    """Whether the environment's class is there and takes its arguments. Raises ConfigError."""
    environment = load_environment(config.tcod_environment)
    try:
        inspect.signature(environment).bind(config.tcod_data_root, **config.tcod_env_args)
    except TypeError as error:
        raise ConfigError(
            f"tcod_env_args {config.tcod_env_args} do not fit {environment.__name__}.__init__: {error}"
        ) from error


def check_training_rows(config: TcodConfig, rows: Sequence[Any], source: str) -> None:
    """Whether rows (or slime's samples) can be trained on, as far as they show it. Raises ConfigError."""
    check_rows(rows, source, load_environment(config.tcod_environment), config.tcod_data_root)
    if config.curriculum.needs_demonstration:
        check_demonstrations(rows, source, config.tcod_variant, config.tcod_horizon)


def _check_hooks(args: Namespace) -> None:
    hooks = {
        "custom_generate_function_path": "generate",
        "custom_rm_path": "reward_func",
        "custom_reward_post_process_path": "post_process_rewards",
        "dynamic_sampling_filter_path": "drop_failed",
    }
    for name, function in hooks.items():
        path = f"{PACKAGE}.tcod_rollout.{function}"
        if getattr(args, name, None) != path:
            raise ConfigError(
                f"--{name.replace('_', '-')} must be {path}, as --rollout-function-path is of {PACKAGE}: "
                "TCOD needs all of its hooks"
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
        raise ConfigError("--rollout-max-context-len is missing: set the largest length of a sequence in tokens")
    if args.rollout_max_response_len >= args.rollout_max_context_len:
        raise ConfigError(
            f"--rollout-max-response-len {args.rollout_max_response_len} bounds one turn and must be below "
            f"--rollout-max-context-len {args.rollout_max_context_len}"
        )


def _check_loss(args: Namespace) -> None:
    """Refuse flags under which the chosen mean (loss.py) would not be exact."""
    if args.calculate_per_token_loss and args.rollout_sample_filter_path:
        raise ConfigError(
            "--calculate-per-token-loss counts a token for each sample that --rollout-sample-filter-path removes: "
            "remove one of them"
        )
    reducer = args.custom_pg_loss_reducer_function_path
    if not is_turn_mean(args):
        if (reducer or "").endswith(".turn_mean.turn_mean"):
            raise ConfigError(
                "--custom-pg-loss-reducer-function-path must be "
                f"{PACKAGE}.training.turn_mean.turn_mean, not {reducer}: "
                "the other hooks are of this package and count its turns"
            )
        return
    if args.calculate_per_token_loss:
        raise ConfigError(
            f"--calculate-per-token-loss is the mean over tokens and {reducer} the mean over turns: remove one of them"
        )
    if args.advantage_estimator not in ("grpo", "gspo", "cispo"):
        raise ConfigError(
            f"--advantage-estimator {args.advantage_estimator} reads the masks in which the mean over turns keeps its "
            "count: use grpo"
        )
    for name in ("log_multi_turn", "use_opsm"):
        if getattr(args, name, False):
            raise ConfigError(
                f"--{name.replace('_', '-')} takes sums of masks for lengths, and {reducer} keeps its count there: "
                "remove it"
            )
    for name in ("custom_tis_function_path", "custom_convert_samples_to_train_data_path"):
        if getattr(args, name, None):
            raise ConfigError(
                f"--{name.replace('_', '-')} may change the masks, whose runs are the turns of {reducer}: "
                "remove one of them"
            )


def _check_fan_out(args: Namespace, config: TcodConfig) -> None:
    """Refuse flags that take one sample for one episode, where every turn is a sample."""
    if config.tcod_history == "append":
        return
    if not args.use_dynamic_batch_size:
        raise ConfigError(
            "tcod_history turns makes a sample of every turn, and micro-batches of a fixed size need a fixed number: "
            "set --use-dynamic-batch-size and --max-tokens-per-gpu"
        )
    if getattr(args, "log_passrate", False):
        raise ConfigError(
            "--log-passrate expects --n-samples-per-prompt samples of a prompt, and tcod_history turns makes one of "
            "every turn: remove the flag"
        )


def _check_teacher_flags(args: Namespace) -> None:
    if not args.rm_url:
        raise ConfigError("--rm-url is missing: set it to the teacher's http://HOST:PORT/generate")
    if (args.rollout_temperature, args.rollout_top_p, args.rollout_top_k) != (1.0, 1.0, -1):
        raise ConfigError(
            "the teacher's scores are untempered, so --opd-type sglang needs --rollout-temperature 1, "
            f"--rollout-top-p 1 and --rollout-top-k -1, not {args.rollout_temperature:g}, {args.rollout_top_p:g} and "
            f"{args.rollout_top_k}"
        )


def _check_weight_push(args: Namespace) -> None:
    """slime pushes what the training GPUs hold, which may be the teacher, or memory that was given up. On GPUs that
    engines and training share (--colocate) it pushes copies in main memory."""
    from_copies = args.colocate and args.update_weight_transport != "disk"
    if args.opd_type == "megatron" and not from_copies:
        raise ConfigError(
            "--opd-type megatron needs --colocate, and no --update-weight-transport disk: elsewhere slime pushes the "
            "teacher's weights to the engines, or memory that it has given up"
        )
    if args.offload_train and not from_copies:
        raise ConfigError(
            "--offload-train gives up the memory that slime pushes weights from, but with --colocate, and without "
            "--update-weight-transport disk: remove it"
        )


def _check_over_sampling(args: Namespace) -> None:
    size = getattr(args, "over_sampling_batch_size", None) or args.rollout_batch_size
    if size > args.rollout_batch_size:
        raise ConfigError(
            f"--over-sampling-batch-size {size} would train on the fastest episodes only: remove the flag"
        )


def _check_evaluation_hooks(args: Namespace) -> None:
    """slime hands samples of a data set without a reward function of its own to ours, whoever generated them."""
    for dataset in getattr(args, "eval_datasets", None) or []:
        generate = getattr(dataset, "custom_generate_function_path", None)
        if generate not in (None, args.custom_generate_function_path) and not getattr(dataset, "custom_rm_path", None):
            raise ConfigError(
                f"the evaluation data set {dataset.name} has its own custom_generate_function_path: give it a "
                "custom_rm_path too"
            )


def _check_evaluation_kl(args: Namespace, config: TcodConfig) -> None:
    datasets = getattr(args, "eval_datasets", None) or []
    if config.tcod_eval_kl and datasets and not any(is_untempered(vars(dataset)) for dataset in datasets):
        raise ConfigError(
            "tcod_eval_kl measures a KL only on evaluation datasets with temperature 1, top_p 1 and top_k -1 and "
            "there is none: add one with --eval-config, or set tcod_eval_kl to false"
        )
