"""TCOD on slime: multi-turn on-policy distillation with a temporal curriculum (arXiv 2604.24005).

slime loads these hooks by flag; the recipe lies in slime's examples/ and slime's folder is on PYTHONPATH:

    --rollout-function-path           examples.tcod.tcod_rollout.generate_rollout
    --custom-generate-function-path   examples.tcod.tcod_rollout.generate
    --custom-rm-path                  examples.tcod.tcod_rollout.reward_func
    --custom-reward-post-process-path examples.tcod.tcod_rollout.post_process_rewards
    --dynamic-sampling-filter-path    examples.tcod.tcod_rollout.drop_failed
    --custom-config-path              examples/tcod/configs/alfworld.yaml

slime's train_async.py takes the rollout function of fully_async_rollout.py, and the other hooks.

One training step n:
    1. generate_rollout stamps the depth k (schedule.py) on every sample it draws, and runs slime's rollout loop.
    2. generate plays one episode (episode.py): replayed demonstration turns, then turns sampled from the student.
    3. reward_func has the teacher score the finished trajectory and returns whether the task was solved.
    4. drop_failed keeps groups with a failed sample out of training; slime draws others instead.
    5. post_process_rewards hands slime (solved, 0.0): it logs success and trains on the KL to the teacher alone.
"""

import asyncio
import logging
import math
import time
import uuid
import weakref
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slime.rollout import sglang_rollout
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.types import Sample

from . import ABORTED, ConfigError, Failure
from .curriculum import EpisodePlan
from .episode.loop import Assignment, EpisodeRecord, Runtime, play_episode
from .episode.rows import Demonstration
from .model.chat_tokens import ChatTokens, engine_eos_ids
from .model.teacher import TeacherClient
from .records.about import write_about
from .records.episode_log import save_evaluation, save_rollout
from .records.metrics import eval_metrics, rollout_metrics
from .records.run_log import log_eval, log_rollout
from .settings.checks import check_settings
from .settings.config import TcodConfig
from .settings.server_checks import base_url, check_models
from .training.samples import Groups, fail, fill, flat, timeline_span, to_train
from .training.schedule import check_data_source, count_rollout, depth_of
from .training.turn_mean import count_turns, is_turn_mean

logger = logging.getLogger(__name__)

__all__ = [
    "drop_failed",
    "generate",
    "generate_rollout",
    "log_eval",
    "log_rollout",
    "post_process_rewards",
    "reward_func",
]

# ---------------------------------------------------------------------------------------------- slime's hooks


def generate_rollout(
    args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """slime's rollout at depth k(rollout_id); evaluation always plays the full horizon.

    Raises:
        ConfigError: on the first call, when a setting cannot work.
        RuntimeError: when more than tcod_max_replacements whole batches of failed groups were replaced.
    """
    config = checked_config(args, data_source)
    started = time.monotonic()
    if evaluation:
        output = sglang_rollout.generate_rollout(args, rollout_id, data_source, evaluation=True)
        metrics = eval_metrics(output.data, time.monotonic() - started)
        metrics |= save_evaluation(args, rollout_id, output.data)
        output.metrics = {**(output.metrics or {}), **metrics}
        return output
    source = _OneRolloutSource(args, config, rollout_id, data_source)
    output = sglang_rollout.generate_rollout(args, rollout_id, source)
    metrics = rollout_metrics(flat(output.samples), source.drawn, time.monotonic() - started)
    metrics |= count_rollout(config, data_source, rollout_id, flat(output.samples))
    metrics |= save_rollout(args, rollout_id, source.drawn)
    output.metrics = {**(output.metrics or {}), **metrics}
    output.samples = to_train(args, config, output.samples)
    return output


async def generate(
    args: Namespace, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample:
    """Play one episode. Sets tokens, masks, log-probs and status; in an evaluation also the reward.

    A failure of the engine or the environment, or a demonstration that does not fit, becomes Status.FAILED with a
    reason in the sample's EpisodeRecord and reward 0.0.
    """
    runtime = _runtime(args)
    record = EpisodeRecord(evaluation=True) if evaluation else _drawn_record(sample)
    sample.session_id = sample.session_id or uuid.uuid4().hex  # an evaluation's samples have none
    try:
        plan, demo = _plan(runtime.config, record, sample)
        task = Assignment(
            metadata=sample.metadata,
            plan=plan,
            demo=demo,
            sampling_params=sampling_params,
            max_context_len=_max_context_len(args, evaluation),
            is_unwanted=_is_unwanted(args),
            trace=lambda name: timeline_span(sample, name),
            session=sample.session_id,
        )
        fill(args, sample, await play_episode(runtime.episodes, task, record), record)
    except Failure as failure:
        fail(sample, record, failure)
    except Exception as error:  # it would end slime's run
        logger.exception("slime does not take the episode")
        fail(sample, record, Failure("internal", repr(error)))
    if evaluation and not _is_scored(args, sample):
        sample.reward = float(EpisodeRecord.of(sample).won)
    return sample


async def reward_func(args: Namespace, sample: Sample, **kwargs: Any) -> float:
    """1.0 if the task was solved, else 0.0; before that the teacher scores the trajectory (--opd-type sglang).

    Sets sample.teacher_log_probs, one number per response token (0.0 in the prompt of a later sequence). A training
    sample without a usable score is FAILED.
    """
    if sample.status == Sample.Status.FAILED:
        return 0.0
    record = EpisodeRecord.of(sample)
    if args.opd_type == "sglang":
        started = time.monotonic()
        try:
            with timeline_span(sample, "teacher"):
                sample.teacher_log_probs = await _runtime(args).teacher.score_all(
                    sample.tokens, record.sequences(len(sample.tokens)), sample.session_id, _is_unwanted(args)
                )
        except Exception as error:  # it would end slime's run
            failure = error if isinstance(error, Failure) else Failure("internal", repr(error))
            if failure.reason == "internal":
                logger.exception("scoring failed")
            if _is_unwanted(args)():
                failure = Failure(ABORTED, str(failure))  # a surplus episode: its failure costs nothing
            if not record.evaluation:
                fail(sample, record, failure)
                return 0.0
            logger.warning("evaluation episode without a KL: %s", failure)
            record.unscored = failure.reason
        record.teacher_s = time.monotonic() - started
        record.store(sample)
    return float(record.won)


def drop_failed(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Keep a group only if all of its samples can be trained on; slime draws another one for a dropped one."""
    for sample in samples:
        if sample.status == Sample.Status.FAILED:
            return DynamicFilterOutput(keep=False, reason=EpisodeRecord.of(sample).failure)
        if sample.status == Sample.Status.ABORTED:
            return DynamicFilterOutput(keep=False, reason=ABORTED)
    return DynamicFilterOutput(keep=True)


def post_process_rewards(args: Namespace, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """(solved, 0.0) per sample: the first is logged, the second trained on, so the KL is the only signal.

    Under tcod_history turns slime logs a mean over turns; rollout/tcod/success is that over episodes.

    The last gate before training, because slime asks the first sample alone whether a batch has teacher log-probs.
    Where the loss is a mean over turns (loss.py), their count is written into the masks here.

    Raises:
        ValueError: a sample is incomplete; it must never be trained on.
    """
    for sample in samples:
        if len(sample.metadata.get("tcod", {}).get("prompts", ())) > 1:
            raise ValueError(f"sample {sample.index} is a whole episode of several sequences: see to_train")
        needed = {"loss_mask": sample.loss_mask, "rollout_log_probs": sample.rollout_log_probs}
        if args.opd_type == "sglang":
            needed["teacher_log_probs"] = sample.teacher_log_probs
        for name, values in needed.items():
            if values is None or len(values) != sample.response_length or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"sample {sample.index} ({sample.status.value}) has no complete and finite {name}: "
                    f"is --dynamic-sampling-filter-path {__name__}.drop_failed set?"
                )
    if is_turn_mean(args):
        count_turns(samples, args.global_batch_size)  # the last look at a whole batch before its micro-batches
    return [float(sample.reward) for sample in samples], [0.0] * len(samples)


# ------------------------------------------------------------------------------------- drawing samples at depth k


class StampedSource:
    """slime's data source with the depth stamped on every sample, since `generate` is not told the rollout id."""

    def __init__(self, config: TcodConfig, source: Any, rollout_id: int = 0) -> None:
        self.config, self.source, self.rollout_id = config, source, rollout_id

    def get_samples(self, num_samples: int) -> Groups:
        k = depth_of(self.config, self.source, self.rollout_id)
        groups = self.source.get_samples(num_samples)
        for sample in flat(groups):
            EpisodeRecord(n=self.rollout_id, k=k).store(sample)
        return groups

    def add_samples(self, groups: Groups) -> None:
        self.source.add_samples(groups)


class _OneRolloutSource(StampedSource):
    """The source of one synchronous rollout: keeps what was drawn, and replaces dropped groups one by one."""

    def __init__(self, args: Namespace, config: TcodConfig, rollout_id: int, source: Any) -> None:
        super().__init__(config, source, rollout_id)
        self.args = args
        self.drawn: list[Sample] = []
        self._replaced = 0

    def get_samples(self, num_samples: int) -> Groups:
        first = not self.drawn
        if not first:
            # slime asks for a whole over-sampling batch when a single group was dropped, and would abort the surplus.
            missing = self.args.rollout_batch_size - GenerateState(self.args).remaining_batch_size
            num_samples = min(num_samples, missing)
            if self._replaced + num_samples > self.config.tcod_max_replacements * self.args.rollout_batch_size:
                raise too_many_failures(self.rollout_id, missing, self.drawn)
        groups = super().get_samples(num_samples)
        self._replaced += 0 if first else len(groups)
        self.drawn += flat(groups)
        return groups


def too_many_failures(rollout_id: int, missing: int, samples: list[Sample]) -> RuntimeError:
    lost = [sample for sample in samples if sample.status in (Sample.Status.FAILED, Sample.Status.ABORTED)]
    reasons = Counter(EpisodeRecord.of(sample).failure or ABORTED for sample in lost)
    return RuntimeError(
        f"rollout {rollout_id} stops: more than tcod_max_replacements whole batches of failed groups were replaced "
        f"and {missing} are still missing; failures by reason: {dict(reasons)}"
    )


# ------------------------------------------------------------------------------------------------ one episode


def _drawn_record(sample: Sample) -> EpisodeRecord:
    if "tcod" not in sample.metadata:
        raise ConfigError(f"--rollout-function-path must be {__name__}.generate_rollout: it stamps the depth")
    return EpisodeRecord.of(sample)


def _plan(config: TcodConfig, record: EpisodeRecord, sample: Sample) -> tuple[EpisodePlan, Demonstration]:
    """Who acts when, and the demonstration that is replayed. Raises Failure where the arm cannot use it."""
    if record.evaluation:
        return config.curriculum.full_plan(), Demonstration()
    demo = Demonstration()
    if config.curriculum.replays:
        demo = Demonstration.of(sample.metadata)
        demo.check(config.tcod_horizon)
    return config.curriculum.plan(record.k, len(demo.actions), record.n, sample.index), demo


def _max_context_len(args: Namespace, evaluation: bool) -> int:
    """slime fills --eval-max-context-len in, and enforces neither."""
    return (args.eval_max_context_len if evaluation else None) or args.rollout_max_context_len


def _is_scored(args: Namespace, sample: Sample) -> bool:
    """Whether an evaluation episode is scored, by leaving its reward to reward_func. Where sampling changes the policy
    (any temperature but 1), the difference of the engine's and the teacher's log-probs would be no KL."""
    wanted = _runtime(args).config.tcod_eval_kl and args.opd_type == "sglang"
    return wanted and sample.status != Sample.Status.FAILED and EpisodeRecord.of(sample).untempered


def _is_unwanted(args: Namespace) -> Callable[[], bool]:
    """A function that says whether slime has all the groups that this rollout needs; in an evaluation never."""
    return lambda: GenerateState(args).aborted


# ------------------------------------------------------------------------------------------------- per process


@dataclass(frozen=True)
class _HookState:
    """What the hooks of one event loop share."""

    args: Namespace
    config: TcodConfig
    episodes: Runtime
    teacher: TeacherClient | None

    @classmethod
    def create(cls, args: Namespace) -> "_HookState":
        config = TcodConfig.from_args(args)
        chat = _chat(args, config)
        engine_url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
        teacher = None
        if args.opd_type == "sglang":
            teacher = TeacherClient(
                f"{base_url(args.rm_url)}/generate",
                timeout_s=config.tcod_teacher_timeout_s,
                concurrency=config.tcod_teacher_concurrency,
                vocab_size=chat.vocab_size,
            )
        return cls(args, config, Runtime.create(config, chat, engine_url), teacher)


# Engines, sessions and semaphores belong to one event loop; slime has one, its fully asynchronous mode another.
_runtimes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _HookState] = weakref.WeakKeyDictionary()
_launched: tuple[Namespace, TcodConfig] | None = None


def _runtime(args: Namespace) -> _HookState:
    loop = asyncio.get_running_loop()
    runtime = _runtimes.get(loop)
    if runtime is None or runtime.args is not args:
        runtime = _runtimes[loop] = _HookState.create(args)
    return runtime


def _chat(args: Namespace, config: TcodConfig) -> ChatTokens:
    tokenizer = GenerateState(args).tokenizer
    try:
        eos_ids = engine_eos_ids(args.hf_checkpoint)
        return ChatTokens(tokenizer, args.apply_chat_template_kwargs, eos_ids, **config.chat_choices)
    except ValueError as error:
        raise ConfigError(f"--hf-checkpoint {args.hf_checkpoint}: {error}") from error


def checked_config(args: Namespace, data_source: Any) -> TcodConfig:
    """The settings, after the launch checks of the first call: slime has no earlier hook than the first rollout."""
    global _launched
    if _launched and _launched[0] is args:
        return _launched[1]
    dataset = getattr(data_source, "dataset", None)
    config = check_settings(args, getattr(dataset, "samples", None))
    check_data_source(config, data_source)
    chat = _chat(args, config)
    for warning in chat.warnings:
        logger.warning("--hf-checkpoint %s: %s", args.hf_checkpoint, warning)
    check_models(args, config, chat)
    logger.info("TCOD: %s", config)
    write_about(args)
    _launched = args, config
    return config
