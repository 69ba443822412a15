import asyncio
import copy
import inspect
import logging
import uuid
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer

from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.filter_hub.base_types import call_dynamic_filter
from slime.rollout.rm_hub import async_rm
from slime.utils.async_utils import run
from slime.utils.data import Dataset
from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.http_utils import get, get_rollout_num_engines, post
from slime.utils.misc import SingletonMeta, load_function
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

_REFUSED = (
    "partial_rollout group_rm apply_chat_template multimodal_keys rollout_sample_filter_path rollout_sample_hook_path "
    "rollout_all_samples_process_path buffer_filter_path rollout_max_prompt_len eval_max_prompt_len "
    "sglang_enable_deterministic_inference use_rollout_routing_replay use_distributed_post"
)


def _sampling_params(args: Namespace, temperature: float, top_p: float, top_k: int, length: int) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_new_tokens": length,
        "stop": args.rollout_stop,
        "stop_token_ids": args.rollout_stop_token_ids,
        "skip_special_tokens": args.rollout_skip_special_tokens,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }


class GenerateState(metaclass=SingletonMeta):
    """The state of the rollout in progress, one per process."""

    def __init__(self, args: Namespace):
        if refused := [name for name in _REFUSED.split() if getattr(args, name, None)]:
            raise NotImplementedError(
                f"the slime stand-in has no {', '.join(refused)}: set SLIME_DIR to a slime checkout"
            )
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.hf_checkpoint, trust_remote_code=True)
        self.semaphore = asyncio.Semaphore(args.sglang_server_concurrency * get_rollout_num_engines(args))
        self.sampling_params = _sampling_params(
            args, args.rollout_temperature, args.rollout_top_p, args.rollout_top_k, args.rollout_max_response_len
        )
        self.reset()

    def reset(self) -> None:
        self.remaining_batch_size = 0
        self.pendings: set[asyncio.Task] = set()
        self.aborted = False

    def submit_generate_tasks(self, samples: list[list[Sample]]) -> None:
        for group in samples:
            task = generate_and_rm_group(self.args, group, self.sampling_params.copy(), evaluation=False)
            self.pendings.add(asyncio.create_task(task))
        self.remaining_batch_size += len(samples)


async def generate_and_rm(
    args: Namespace, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample:
    state = GenerateState(args)
    async with state.semaphore:
        if state.aborted:
            sample.status = Sample.Status.ABORTED
            return sample
        generate = load_function(sample.generate_function_path or args.custom_generate_function_path)
        takes = inspect.signature(generate).parameters
        further = {"evaluation": evaluation} if "evaluation" in takes else {}
        sample = await generate(args, sample, sampling_params, **further)
    if isinstance(sample, list):  # of a function that makes several samples
        asked = [one for one in sample if one.reward is None]
        for one, reward in zip(asked, await load_function(args.custom_rm_path)(args, asked), strict=True):
            one.reward = reward
    elif sample.status != Sample.Status.ABORTED and sample.reward is None:
        sample.reward = await async_rm(args, sample)
    return sample


async def generate_and_rm_group(
    args: Namespace, group: list[Sample], sampling_params: dict[str, Any], evaluation: bool = False
) -> list[Sample]:
    if GenerateState(args).aborted:
        return group
    for sample in group:
        sample.session_id = sample.session_id or str(uuid.uuid4())
    return await asyncio.gather(*(generate_and_rm(args, s, sampling_params.copy(), evaluation) for s in group))


async def _abort_until_idle(url: str) -> None:
    while True:
        try:
            await post(f"{url}/abort_request", {"abort_all": True})
            loads = (await get(f"{url}/v1/loads?include=core"))["loads"]
        except Exception as error:
            logger.warning("aborting the requests of %s failed: %s", url, error)
            return
        if not sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads):
            return
        await asyncio.sleep(0.2)  # slime: 3 s


async def abort(args: Namespace) -> None:
    """End whatever still runs; what it had produced is lost."""
    state = GenerateState(args)
    assert not state.aborted
    state.aborted = True
    workers = (await get(f"http://{args.sglang_router_ip}:{args.sglang_router_port}/workers"))["workers"]
    await asyncio.gather(*(_abort_until_idle(worker["url"]) for worker in workers))
    if state.pendings:
        await asyncio.wait(state.pendings)


async def _train_rollout(args: Namespace, get_samples: Callable[[int], list[list[Sample]]]) -> RolloutFnTrainOutput:
    state = GenerateState(args)
    path = args.dynamic_sampling_filter_path
    dynamic_filter = None if path is None else load_function(path)
    drops: Counter[str] = Counter()
    target, data = args.rollout_batch_size, []
    while len(data) < target:
        while state.remaining_batch_size < target:
            state.submit_generate_tasks(get_samples(args.over_sampling_batch_size))
        done, state.pendings = await asyncio.wait(state.pendings, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            group = task.result()
            assert len(group) == args.n_samples_per_prompt
            verdict = call_dynamic_filter(dynamic_filter, args, group)
            if not verdict.keep:
                state.remaining_batch_size -= 1
                if verdict.reason:
                    drops[verdict.reason] += 1
            elif len(data) < target:
                data.append(group)
    await abort(args)
    state.reset()
    metrics = {f"rollout/dynamic_filter/drop_{reason}": count for reason, count in drops.items()}
    return RolloutFnTrainOutput(sorted(data, key=lambda group: group[0].index), metrics)


async def _eval_dataset(args: Namespace, config: EvalDatasetConfig) -> dict[str, list]:
    # One dict for all samples, as in slime.
    params = _sampling_params(args, config.temperature, config.top_p, config.top_k, config.max_response_len)
    keys = {"prompt_key": config.input_key, "label_key": config.label_key, "metadata_key": config.metadata_key}
    samples = [
        copy.deepcopy(prompt)
        for prompt in Dataset(config.path, **keys).samples
        for _ in range(config.n_samples_per_eval_prompt)
    ]
    for index, sample in enumerate(samples):
        sample.index = index
        sample.metadata = sample.metadata | config.metadata_overrides
        sample.custom_rm_path = config.custom_rm_path
        sample.generate_function_path = config.custom_generate_function_path
    made = await asyncio.gather(*(generate_and_rm(args, s, params, evaluation=True) for s in samples))
    data = [sample for one in made for sample in (one if isinstance(one, list) else [one])]
    key = args.eval_reward_key or args.reward_key
    return {
        "rewards": [sample.reward[key] if key else sample.reward for sample in data],
        "truncated": [sample.status == Sample.Status.TRUNCATED for sample in data],
        "samples": sorted(data, key=lambda sample: sample.index),
    }


async def _eval_rollout(args: Namespace) -> RolloutFnEvalOutput:
    configs = args.eval_datasets or []
    results = await asyncio.gather(*(_eval_dataset(args, config) for config in configs))
    return RolloutFnEvalOutput({config.name: result for config, result in zip(configs, results, strict=True)})


def generate_rollout(
    args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    assert args.rollout_global_dataset
    return run(_eval_rollout(args) if evaluation else _train_rollout(args, data_source.get_samples))
