"""What the smoke run needs of slime besides the recipe's own imports, on the real slime and on the stand-in alike."""

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]  # of the repository: where the packages examples, smoke and tests lie
STANDIN = ROOT / "smoke" / "standin"

# slime's arguments that a rollout and the conversion of its samples read, with slime's defaults.
SLIME_DEFAULTS: dict[str, Any] = {
    # model and engines
    "hf_checkpoint": None,
    "sglang_router_ip": None,
    "sglang_router_port": None,
    "sglang_server_concurrency": 512,
    "sglang_dp_size": 1,
    "router_policy": "cache_aware",
    "rollout_num_gpus": None,
    "rollout_num_gpus_per_engine": 1,
    "use_distributed_post": False,
    # sampling
    "rollout_temperature": 1.0,
    "rollout_top_p": 1.0,
    "rollout_top_k": -1,
    "rollout_max_prompt_len": None,
    "rollout_max_response_len": None,
    "rollout_max_context_len": None,
    "rollout_stop": None,
    "rollout_stop_token_ids": None,
    "rollout_skip_special_tokens": False,
    # data
    "rollout_global_dataset": True,
    "prompt_data": None,
    "input_key": "input",
    "label_key": None,
    "metadata_key": "metadata",
    "tool_key": "tools",
    "multimodal_keys": None,
    "apply_chat_template": False,
    "apply_chat_template_kwargs": {},
    "rollout_shuffle": False,
    "rollout_seed": 42,
    "save": None,
    "load": None,
    "dump_details": None,
    "buffer_filter_path": None,
    # the rollout loop
    "rollout_batch_size": None,
    "n_samples_per_prompt": 1,
    "over_sampling_batch_size": None,
    "partial_rollout": False,
    "mask_offpolicy_in_partial_rollout": False,
    "rollout_function_path": "slime.rollout.sglang_rollout.generate_rollout",
    "custom_generate_function_path": None,
    "dynamic_sampling_filter_path": None,
    "rollout_sample_filter_path": None,
    "rollout_sample_hook_path": [],
    "rollout_all_samples_process_path": None,
    "custom_config_path": None,
    "ci_test": False,
    "offload_train": None,
    "colocate": False,
    "update_weight_transport": "nccl",
    # evaluation
    "eval_datasets": None,
    "eval_function_path": None,
    "eval_max_prompt_len": None,
    "eval_max_context_len": None,
    "eval_reward_key": None,
    # reward, OPD and the train batch
    "rm_type": None,
    "rm_url": None,
    "custom_rm_path": None,
    "group_rm": False,
    "reward_key": None,
    "log_reward_category": None,
    "custom_reward_post_process_path": None,
    "custom_convert_samples_to_train_data_path": None,
    "advantage_estimator": "grpo",
    "use_rollout_routing_replay": False,
    "use_opd": False,
    "opd_type": None,
    "opd_kl_coef": 1.0,
    "normalize_advantages": False,
    "global_batch_size": None,
    "use_dynamic_batch_size": False,
    "calculate_per_token_loss": False,
    "custom_pg_loss_reducer_function_path": None,
    "custom_tis_function_path": None,
}

# The flags with which the recipe is launched.
RECIPE_FLAGS: dict[str, Any] = {
    "rollout_function_path": "examples.tcod.tcod_rollout.generate_rollout",
    "custom_generate_function_path": "examples.tcod.tcod_rollout.generate",
    "custom_rm_path": "examples.tcod.tcod_rollout.reward_func",
    "custom_reward_post_process_path": "examples.tcod.tcod_rollout.post_process_rewards",
    "dynamic_sampling_filter_path": "examples.tcod.tcod_rollout.drop_failed",
    "use_opd": True,
    "opd_type": "sglang",
}


def find_slime() -> str:
    """Make `slime` importable: the checkout in SLIME_DIR, else an installed one, else the stand-in. Says which."""
    put_first(ROOT)
    if folder := os.environ.get("SLIME_DIR"):
        if not (Path(folder) / "slime" / "rollout").is_dir():
            raise FileNotFoundError(f"SLIME_DIR={folder} is no checkout of slime: unset it, or set it to one")
        put_first(ROOT, folder)
    elif (spec := importlib.util.find_spec("slime")) is None or spec.origin is None:  # a mere folder has no origin
        put_first(ROOT, STANDIN)
    home = Path(importlib.util.find_spec("slime").origin).resolve().parents[1]
    if home == STANDIN:
        return "the minimal slime stand-in"
    from smoke import cpu_only

    cpu_only.prepare()  # slime imports sglang, and transformers' processors
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    git = subprocess.run(["git", "-C", home, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return f"slime at {home} ({git.stdout.strip() or 'no git commit'})"


def clear(run_dir: Path) -> None:
    """An empty run directory, as far as the recipe writes there: its hooks add to what they find."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "about.json"):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "rollouts", ignore_errors=True)


def put_first(*folders: Path | str) -> None:
    """Put these folders first on the import path, in this order.

    The repository's root belongs before all others: slime and Megatron-LM have a package `examples` too.
    """
    first = [str(folder) for folder in folders]
    sys.path[:] = first + [folder for folder in sys.path if folder not in first]


def python_path(*folders: Path | str) -> str:
    """PYTHONPATH of a child process: the repository's root, these folders, and what this process imports from."""
    return os.pathsep.join(dict.fromkeys(map(str, (ROOT, *folders, *filter(None, sys.path)))))


def rollout_args(**overrides: Any) -> Namespace:
    """slime's arguments: its defaults, over them the recipe's flags, over them `overrides`."""
    values = copy.deepcopy({**SLIME_DEFAULTS, **RECIPE_FLAGS, **overrides})
    # As slime's own validation fills them in.
    batch = (values["rollout_batch_size"] or 0) * values["n_samples_per_prompt"]
    values["global_batch_size"] = values["global_batch_size"] or batch
    values["over_sampling_batch_size"] = values["over_sampling_batch_size"] or values["rollout_batch_size"]
    values["eval_function_path"] = values["eval_function_path"] or values["rollout_function_path"]
    values["eval_reward_key"] = values["eval_reward_key"] or values["reward_key"]
    return Namespace(**values)


def flat(samples: list) -> list:
    """The samples of a rollout in one list, as slime's RolloutManager takes them."""
    while isinstance(samples[0], list):
        samples = [sample for group in samples for sample in group]
    return samples


def convert_samples_to_train_data(args: Namespace, samples: list) -> dict[str, Any]:
    """The batch that slime ships to Megatron, by slime's RolloutManager without its Ray actor."""
    from slime.ray.rollout import RolloutManager
    from slime.utils.misc import load_function

    actor = getattr(RolloutManager, "__ray_metadata__", None)
    manager_class = RolloutManager if actor is None else actor.modified_class
    manager = object.__new__(manager_class)
    manager.args = args
    manager.custom_convert_samples_to_train_data_func = None
    manager.custom_reward_post_process_func = load_function(args.custom_reward_post_process_path)
    return manager._convert_samples_to_train_data(samples)


def rollout_metrics(
    args: Namespace, samples: list, extra_metrics: dict[str, Any] | None, seconds: float
) -> dict[str, float]:
    """The metrics that slime logs for a rollout, and rollout/raw_reward, which its trainer logs."""
    from slime.observability.rollout_metrics import compute_metrics_from_samples, compute_perf_metrics_from_samples

    of_samples = compute_metrics_from_samples(args, samples)
    of_time = compute_perf_metrics_from_samples(args, samples, seconds)
    raw_rewards = convert_samples_to_train_data(args, samples)["raw_reward"]
    return {
        **(extra_metrics or {}),
        **{f"rollout/{name}": value for name, value in of_samples.items()},
        **{f"perf/{name}": value for name, value in of_time.items()},
        "rollout/raw_reward": sum(raw_rewards) / len(raw_rewards),
    }
