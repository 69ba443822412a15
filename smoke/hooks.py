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
NOT_SET = (
    "hf_checkpoint sglang_router_ip sglang_router_port rollout_num_gpus rollout_max_prompt_len "
    "rollout_max_response_len rollout_max_context_len rollout_stop rollout_stop_token_ids prompt_data label_key "
    "multimodal_keys save load dump_details buffer_filter_path rollout_batch_size over_sampling_batch_size "
    "custom_generate_function_path dynamic_sampling_filter_path rollout_sample_filter_path "
    "rollout_all_samples_process_path custom_config_path offload_train eval_datasets eval_function_path "
    "eval_max_prompt_len eval_max_context_len eval_reward_key rm_url custom_rm_path reward_key log_reward_category "
    "custom_reward_post_process_path custom_convert_samples_to_train_data_path opd_type global_batch_size "
    "custom_pg_loss_reducer_function_path custom_tis_function_path"
)
OFF = (
    "use_distributed_post rollout_skip_special_tokens apply_chat_template rollout_shuffle partial_rollout colocate "
    "group_rm use_rollout_routing_replay use_opd normalize_advantages use_dynamic_batch_size calculate_per_token_loss "
    "debug_train_only"
)
SLIME_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(NOT_SET.split()),
    **dict.fromkeys(OFF.split(), False),
    "sglang_server_concurrency": 512,
    "sglang_dp_size": 1,
    "rollout_num_gpus_per_engine": 1,
    "rollout_temperature": 1.0,
    "rollout_top_p": 1.0,
    "rollout_top_k": -1,
    "rollout_global_dataset": True,
    "input_key": "input",
    "metadata_key": "metadata",
    "tool_key": "tools",
    "apply_chat_template_kwargs": {},
    "rollout_seed": 42,
    "n_samples_per_prompt": 1,
    "rollout_function_path": "slime.rollout.sglang_rollout.generate_rollout",
    "rollout_sample_hook_path": [],
    "update_weight_transport": "nccl",
    "advantage_estimator": "grpo",
    "opd_kl_coef": 1.0,
    "loss_type": "policy_loss",
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
