"""The checks before a run starts: what would go wrong later, as far as slime's arguments and the settings show it.

slime has no hook before the first rollout, so they are made there, and by the run script before a GPU is taken.
"""

import inspect
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import PACKAGE, ConfigError, Failure
from ..environments.protocol import load_environment
from ..episode.episode import Note
from ..model.chat_tokens import ChatTokens
from ..model.student import Response, is_untempered
from ..training.turn_mean import is_turn_mean
from .build import history_factory, notes_of
from .config import SELF, TcodConfig, read_yaml
from .row_checks import check_training_rows
from .secrets import without_secrets

HOOKS = {
    "custom_generate_function_path": "tcod_rollout.generate",
    "custom_rm_path": "tcod_rollout.reward_func",
    "custom_reward_post_process_path": "tcod_rollout.post_process_rewards",
    "dynamic_sampling_filter_path": "tcod_rollout.drop_failed",
}
FORBIDDEN = {
    "normalize_advantages": "would whiten the KL away",
    "partial_rollout": "cannot continue a multi-turn episode",
    "use_rollout_routing_replay": "has no routes for an environment's tokens",
    "group_rm": "hands whole groups to the reward function",
    "reward_key": "does not apply, TCOD's reward is a number",
    "eval_reward_key": "does not apply, TCOD's reward is a number",
}
FORBIDDEN_WITH_TURN_MEAN = dict.fromkeys(  # turn_mean.py: the turns are the masks' runs, and their count is in them
    ["calculate_per_token_loss", "log_multi_turn", "use_opsm", "custom_tis_function_path"]
    + ["custom_convert_samples_to_train_data_path"],
    "sums up masks or may change them, in which the mean over turns keeps its count",
)


KL_OF_EVALUATIONS = (  # without a note, the student's KL to itself is 0
    "tcod_eval_kl asks a teacher's own server: remove it, or set TEACHER=sglang (--opd-type sglang)"
)


def check_run_arguments(args: Namespace, config: TcodConfig, rows: Sequence[Any] | None) -> None:
    """The settings against slime's arguments and the training data.

    Args:
        args: slime's arguments.
        config: the settings in them.
        rows: the training samples (each with .metadata), or None where the data source does not show them.

    Raises:
        ConfigError: with one sentence that names the flag and the fix.
    """
    if getattr(args, "custom_config_path", None):
        read_yaml(Path(args.custom_config_path))  # slime takes any key in it
    check_environment_class(config)
    if sentence := next(_refusals(args, config), None):
        raise ConfigError(sentence)
    if rows is not None:
        check_training_rows(config, rows, "--prompt-data")


def check_environment_class(config: TcodConfig) -> None:
    """Whether each environment's class is there and takes its arguments. Raises ConfigError."""
    for own in config.per_environment:
        environment = load_environment(own.tcod_environment)
        try:
            inspect.signature(environment).bind(own.tcod_data_root, **own.tcod_env_args)
        except TypeError as error:
            given = without_secrets(own.tcod_env_args)
            raise ConfigError(f"tcod_env_args {given} do not fit {environment.__name__}.__init__: {error}") from error


def reward_refusals(settings: Mapping[str, Any], has_teacher: bool, samples: int) -> Iterator[str]:
    """A sentence for each setting with which there would be no signal, or one that compares unlike episodes.

    Args:
        settings: the tcod_* settings, as far as they are given.
        samples: episodes of a task in a batch.
    """
    coef = settings.get("tcod_reward_coef")
    name = f"tcod_reward_coef (REWARD_COEF) {coef or 0}"
    if settings.get("tcod_variant") == "sft":
        if has_teacher or coef or samples > 1:
            yield (
                "tcod_variant sft trains on demonstrations, each once: it takes no --use-opd (TEACHER=none), no "
                "tcod_reward_coef (REWARD_COEF) and a --n-samples-per-prompt (SAMPLES_PER_TASK) of 1"
            )
    elif not (has_teacher or coef):
        yield f"--use-opd is missing (TEACHER=none) and {name}, so there is no signal: set one of the two"
    if coef and samples < 2:
        yield f"{name} compares episodes of a task: set --n-samples-per-prompt (SAMPLES_PER_TASK) to 2 or more"
    if coef and settings.get("tcod_variant") == "reopd":
        yield f"{name} compares episodes of a task, and reopd starts each at another turn: choose another tcod_variant"
    if settings.get("tcod_reward") == "grade" and not coef:
        yield f"tcod_reward grade is not trained on with {name}: set that above 0, or remove tcod_reward"


def _refusals(args: Namespace, config: TcodConfig) -> Iterator[str]:
    """A sentence for each flag that is missing, must be left out, or contradicts another."""
    hooks, needed = dict(HOOKS), {"rollout_max_context_len": "set the largest length of a sequence in tokens"}
    if str(args.custom_pg_loss_reducer_function_path).endswith(".turn_mean"):
        hooks["custom_pg_loss_reducer_function_path"] = "training.turn_mean.turn_mean"
    if args.opd_type == "sglang":
        needed["rm_url"] = f"set it to the teacher's http://HOST:PORT/generate, or to {SELF}"
    if config.tcod_history == "turns":
        needed["use_dynamic_batch_size"] = "tcod_history turns makes any number of samples, so set it"
    for name, function in hooks.items():
        if getattr(args, name) != (path := f"{PACKAGE}.{function}"):
            yield f"{_flag(name)} must be {path}, as --rollout-function-path is of {PACKAGE}: TCOD needs all its hooks"
    for name, why in needed.items():
        if not getattr(args, name):
            yield f"{_flag(name)} is missing: {why}"
    for name, why in _forbidden(args, config).items():
        if value := getattr(args, name, None):
            yield f"{_flag(name)} {'' if value is True else f'{value} '}{why}: remove it"
    yield from _contradictions(args, config)


def teacher_refusals(config: TcodConfig, teacher: str, mode: str) -> Iterator[str]:
    """Why a teacher's address, and what it is shown, do not fit TEACHER and MODE of the script."""
    if config.tcod_teacher_url:
        yield "tcod_teacher_url is of an entry of tcod_environments: the run's own is --rm-url (TEACHER_URL)"
    if teacher != "sglang" and any(own.tcod_teacher_url for own in config.per_environment):
        yield "tcod_teacher_url needs a teacher on SGLang: remove it, or set TEACHER=sglang (--opd-type sglang)"
    if config.tcod_teacher_sees and teacher not in ("sglang", SELF):
        yield "tcod_teacher_sees needs a teacher on SGLang: remove it, or set TEACHER=sglang (--opd-type sglang)"
    if config.tcod_eval_kl and teacher != "sglang":
        yield KL_OF_EVALUATIONS
    itself = f"TEACHER={SELF} (--rm-url {SELF})"
    if teacher == SELF and mode != "sync":
        yield f"{itself} needs MODE=sync: in the others training is ahead of the weights that score, and pulled back"
    if teacher == SELF and (not config.tcod_teacher_sees or config.tcod_sees_from):
        yield f"{itself} without a note has a KL of 0: set tcod_teacher_sees (TEACHER_SEES), leave tcod_sees_from out"


def check_notes(config: TcodConfig, chat: ChatTokens) -> None:
    """Whether the teacher can be shown a note, in a conversation up to the horizon. Raises ConfigError."""
    for own in config.per_environment if config.tcod_teacher_sees else ():
        history, notes = history_factory(own, chat)(sys.maxsize), notes_of(own, chat)
        history.begin("Rules.", "Begin.")
        for _ in range(own.tcod_horizon - 1):
            history.add_replayed("Do.", None)
            history.add_turn("Done.")
        history.add_response(Response([chat.end_of_turn], [0.0], False, {}))
        try:
            notes.check_room()
            notes.teacher_ids(history.sequences[-1], Note("A note."))
        except Failure as failure:
            said = f"no note for the teacher can be written: {failure}, or remove tcod_teacher_sees"
            raise ConfigError(said) from failure


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_fully_async(args: Namespace) -> bool:
    return args.rollout_function_path.endswith(".generate_rollout_fully_async")


def _forbidden(args: Namespace, config: TcodConfig) -> dict[str, str]:
    """Flags that must not be set, and why."""
    flags = dict(FORBIDDEN)
    if (args.over_sampling_batch_size or 0) > args.rollout_batch_size:
        flags["over_sampling_batch_size"] = "would train on the fastest episodes only"
    evaluation = args.eval_function_path or args.rollout_function_path
    if _is_fully_async(args) and evaluation.startswith((f"{PACKAGE}.", "slime.")):
        flags["eval_interval"] = f"has {evaluation} evaluate, which fails or hangs in a fully asynchronous run"
    if args.rollout_sample_filter_path:
        flags["calculate_per_token_loss"] = "counts a token for each sample that --rollout-sample-filter-path removes"
    if config.tcod_variant == "sft":
        for name in ("custom_pg_loss_reducer_function_path", "use_tis"):
            flags[name] = "is of the policy loss, which tcod_variant sft does not have"
        if _is_fully_async(args):
            flags["rollout_function_path"] = "plays ahead, and tcod_variant sft plays nothing"
    if config.tcod_history == "turns":
        flags["log_passrate"] = "expects --n-samples-per-prompt samples of a prompt, and every turn is a sample"
    if is_turn_mean(args):
        flags |= FORBIDDEN_WITH_TURN_MEAN
    if (is_turn_mean(args) or config.tcod_reward_coef) and args.advantage_estimator not in ("grpo", "gspo", "cispo"):
        flags["advantage_estimator"] = "takes neither the mean over turns nor tcod_reward_coef, unlike slime's grpo"
    return flags


def _contradictions(args: Namespace, config: TcodConfig) -> Iterator[str]:
    teacher = SELF if args.opd_type == "sglang" and args.rm_url == SELF else args.opd_type
    yield from teacher_refusals(config, teacher, "fully_async" if _is_fully_async(args) else "sync")
    yield from reward_refusals(config.model_dump(), args.use_opd, args.n_samples_per_prompt)
    if args.use_opd and not args.opd_kl_coef > 0:
        yield f"--opd-kl-coef {args.opd_kl_coef:g} must be above 0: to train on the reward alone, remove --use-opd"
    if (config.tcod_variant == "sft") != (args.loss_type == "sft_loss"):
        yield f"tcod_variant {config.tcod_variant} and --loss-type {args.loss_type}: sft and sft_loss belong together"
    if args.opd_type and not args.use_opd:
        yield f"--opd-type {args.opd_type} names a teacher that nothing asks without --use-opd: remove it"
    if (turn := args.rollout_max_response_len) >= (whole := args.rollout_max_context_len):
        yield f"--rollout-max-response-len {turn} bounds one turn and must be below --rollout-max-context-len {whole}"
    # On GPUs that engines and training share, slime pushes copies in main memory.
    pushed = "--opd-type megatron" if args.opd_type == "megatron" else "--offload-train" if args.offload_train else ""
    if pushed and not (args.colocate and args.update_weight_transport != "disk"):
        yield (
            f"{pushed} needs --colocate, and no --update-weight-transport disk: elsewhere slime pushes the teacher's "
            "weights to the engines, or memory that it has given up"
        )
    if args.opd_type == "sglang" and (args.rollout_temperature, args.rollout_top_p, args.rollout_top_k) != (1, 1, -1):
        yield "the teacher scores untempered: set --rollout-temperature 1, --rollout-top-p 1 and --rollout-top-k -1"
    datasets = getattr(args, "eval_datasets", None) or []
    ours = (None, args.custom_generate_function_path)
    for dataset in datasets:  # slime hands samples without a reward function of their own to ours
        if dataset.custom_generate_function_path not in ours and not dataset.custom_rm_path:
            yield f"the evaluation data set {dataset.name} has its own generate function: give it a custom_rm_path too"
    if config.tcod_eval_kl and datasets and not any(is_untempered(vars(dataset)) for dataset in datasets):
        yield "tcod_eval_kl needs an evaluation with temperature 1, top_p 1 and top_k -1: set it (EVAL_TEMPERATURE=1)"
