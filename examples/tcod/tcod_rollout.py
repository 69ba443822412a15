"""TCOD on slime: multi-turn on-policy distillation with a temporal curriculum (arXiv 2604.24005).

slime loads these hooks by flag, with this folder on PYTHONPATH:

    --rollout-function-path           tcod_rollout.generate_rollout
    --custom-generate-function-path   tcod_rollout.generate
    --custom-rm-path                  tcod_rollout.reward_func
    --custom-reward-post-process-path tcod_rollout.post_process_rewards
    --dynamic-sampling-filter-path    tcod_rollout.drop_failed
    --custom-config-path              configs/alfworld_{opd,f2b,b2f}.yaml

slime's train_async.py takes tcod_rollout.generate_rollout_fully_async as its rollout function, and the other hooks.

One training step n:
    1. generate_rollout computes the depth k from n, stamps it on every sample it draws, and runs slime's rollout loop.
    2. generate plays one episode on the student's engine: replayed demonstration turns, then sampled turns.
    3. reward_func has the teacher score the finished trajectory once and returns whether the task was solved.
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
from dataclasses import dataclass, fields
from typing import Any

from .curriculum import EpisodePlan
from .environment import Environment, EnvironmentFailure, EnvironmentPool, Observation, load_environment
from .chat import ChatTokens
from .config import ConfigError, TcodConfig, check_models, check_settings, teacher_base_url, untempered
from .sglang_client import RequestFailure, SGLangClient
from .metrics import eval_metrics, rollout_metrics
from .teacher import TeacherClient, TeacherFailure, is_log_prob

from slime.observability.trace_utils import build_sglang_meta_trace_attrs, trace_span
from slime.rollout import sglang_rollout
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

ENGINE_RETRIES = 8  # 1.5 minutes, in which slime's fault tolerance may restart an engine.

__all__ = [
    "generate_rollout",
    "generate_rollout_fully_async",
    "generate",
    "reward_func",
    "post_process_rewards",
    "drop_failed",
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
    config = _launch(args, data_source)
    started = time.monotonic()
    if evaluation:
        output = sglang_rollout.generate_rollout(args, rollout_id, data_source, evaluation=True)
        output.metrics = {**(output.metrics or {}), **eval_metrics(output.data, time.monotonic() - started)}
        return output
    source = _OneRolloutSource(args, config, rollout_id, data_source)
    output = sglang_rollout.generate_rollout(args, rollout_id, source)
    seconds = time.monotonic() - started
    output.metrics = {**(output.metrics or {}), **rollout_metrics(_flat(output.samples), source.drawn, seconds)}
    return output


def generate_rollout_fully_async(
    args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """slime's fully asynchronous rollout (train_async.py), in which episodes go on while the model is trained.

    An episode's depth is k(rollout id when it was drawn). slime has no filter there, so groups with a failed sample,
    and those drawn more than tcod_max_staleness rollouts ago, are dropped here and others taken instead.

    Raises:
        ConfigError: on the first call, when a setting cannot work; always in an evaluation, which slime lacks there.
        RuntimeError: when more than tcod_max_replacements whole batches of failed groups were replaced.
    """
    global _continuous_source
    if evaluation:
        raise ConfigError("slime cannot evaluate in a fully asynchronous run: remove --eval-interval")
    from slime.rollout.fully_async_rollout import generate_rollout_fully_async as collect

    config = _launch(args, data_source)
    started = time.monotonic()
    # slime's worker draws from the first source that it was given, for ever.
    if _continuous_source is None or _continuous_source.source is not data_source:
        _continuous_source = _StampedSource(config, data_source)
    _continuous_source.rollout_id = rollout_id
    kept: list[list[Sample]] = []
    dropped: list[list[Sample]] = []
    stale: list[list[Sample]] = []
    while missing := args.rollout_batch_size - len(kept):
        if len(dropped) > config.tcod_max_replacements * args.rollout_batch_size:
            raise _too_many_failures(rollout_id, missing, _flat(dropped))
        # The size of the batch is all that slime reads from these arguments; its worker keeps those of the first call.
        fewer = missing < args.rollout_batch_size
        wanted = Namespace(**{**vars(args), "rollout_batch_size": missing}) if fewer else args
        for group in collect(wanted, rollout_id, _continuous_source):
            if rollout_id - group[0].metadata["tcod"]["n"] > config.tcod_max_staleness:
                stale.append(group)
            elif drop_failed(args, group).keep:
                kept.append(group)
            else:
                dropped.append(group)
    if stale:
        logger.warning(
            "rollout %d: %d groups were drawn more than tcod_max_staleness %d rollouts ago and dropped; a lower "
            "--sglang-server-concurrency draws fewer ahead",
            *(rollout_id, len(stale), config.tcod_max_staleness),
        )
    trained = _flat(kept)
    metrics = rollout_metrics(trained, trained + _flat(dropped), time.monotonic() - started)
    return RolloutFnTrainOutput(samples=kept, metrics={**metrics, "rollout/tcod/stale": len(_flat(stale))})


async def generate(
    args: Namespace, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample:
    """Play one episode. Sets tokens, masks, log-probs and status; in an evaluation also the reward.

    An exception would end slime's run, so a failure of the engine or the environment, or a demonstration that does not
    fit, becomes Status.FAILED with a reason in sample.metadata["tcod"] and reward 0.0.
    """
    _reset(sample)
    sample.metadata["tcod"]["evaluation"] = evaluation
    try:
        await _play(args, sample, sampling_params, evaluation)
    except _Aborted:
        if evaluation:  # nobody plays an evaluation episode again
            _fail(sample, "engine_aborted", "the engine aborted an evaluation request")
        else:
            _reset(sample, Sample.Status.ABORTED)
    except (_EpisodeFailure, EnvironmentFailure) as failure:
        _fail(sample, failure.reason, str(failure))
    except ConfigError:
        raise
    except Exception as error:
        logger.exception("episode failed")
        _fail(sample, "internal", repr(error))
    if evaluation and not _kl_wanted(args, sample):
        sample.reward = float(sample.metadata["tcod"]["won"])
    return sample


async def reward_func(args: Namespace, sample: Sample, **kwargs: Any) -> float:
    """1.0 if the task was solved, else 0.0; before that the teacher scores the trajectory (--opd-type sglang).

    Sets sample.teacher_log_probs, one number per response token. A training sample without a usable score is FAILED.
    """
    episode = sample.metadata["tcod"]
    if sample.status == Sample.Status.FAILED:
        return 0.0
    if args.opd_type == "sglang":
        started = time.monotonic()
        prompt_length = len(sample.tokens) - sample.response_length
        try:
            with trace_span(sample, "teacher"):
                sample.teacher_log_probs = await _runtime(args).teacher.score(
                    sample.tokens, prompt_length, unwanted=lambda: _has_ended(args)
                )
        except Exception as error:  # it would end slime's run
            reason = error.reason if isinstance(error, TeacherFailure) else "internal"
            if reason == "internal":
                logger.exception("scoring failed")
            if episode["evaluation"]:
                logger.warning("evaluation episode without a KL: %s", error)
                episode["unscored"] = reason
            elif _has_ended(args):  # a surplus episode: slime throws it away
                _reset(sample, Sample.Status.ABORTED)
                return 0.0
            else:
                _fail(sample, reason, str(error))
                return 0.0
        episode["teacher_s"] = time.monotonic() - started
    return float(episode["won"])


def drop_failed(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Keep a group only if all of its samples can be trained on; slime draws another one for a dropped one."""
    for sample in samples:
        if sample.status == Sample.Status.FAILED:
            return DynamicFilterOutput(keep=False, reason=sample.metadata["tcod"]["failure"])
        if sample.status == Sample.Status.ABORTED:
            return DynamicFilterOutput(keep=False, reason="aborted")
    return DynamicFilterOutput(keep=True)


def post_process_rewards(args: Namespace, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]:
    """(solved, 0.0) per sample: the first is logged, the second trained on, so the KL is the only signal.

    The last gate before training, because slime asks the first sample alone whether a batch has teacher log-probs.

    Raises:
        ValueError: a sample is incomplete; it must never be trained on.
    """
    for sample in samples:
        needed = {"loss_mask": sample.loss_mask, "rollout_log_probs": sample.rollout_log_probs}
        if args.opd_type == "sglang":
            needed["teacher_log_probs"] = sample.teacher_log_probs
        for name, values in needed.items():
            if values is None or len(values) != sample.response_length or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"sample {sample.index} ({sample.status.value}) has no complete and finite {name}: "
                    "is --dynamic-sampling-filter-path tcod_rollout.drop_failed set?"
                )
    return [float(sample.reward) for sample in samples], [0.0] * len(samples)


# ------------------------------------------------------------------------------------- drawing samples at depth k


class _StampedSource:
    """slime's data source with the depth stamped on every sample, since `generate` is not told the rollout id."""

    def __init__(self, config: TcodConfig, source: Any, rollout_id: int = 0) -> None:
        self.config, self.source, self.rollout_id = config, source, rollout_id

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        groups = self.source.get_samples(num_samples)
        stamp = {"n": self.rollout_id, "k": self.config.curriculum.depth(self.rollout_id)}
        for sample in _flat(groups):
            sample.metadata["tcod"] = dict(stamp)
        return groups

    def add_samples(self, groups: list[list[Sample]]) -> None:
        """Take back aborted groups; their finished samples too are played again, at the depth of the next draw."""
        for sample in _flat(groups):
            _reset(sample)
        self.source.add_samples(groups)


class _OneRolloutSource(_StampedSource):
    """The source of one synchronous rollout: keeps what was drawn, and replaces dropped groups one by one."""

    def __init__(self, args: Namespace, config: TcodConfig, rollout_id: int, source: Any) -> None:
        super().__init__(config, source, rollout_id)
        self.args = args
        self.drawn: list[Sample] = []
        self._replaced = 0

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        first = not self.drawn
        if not first:
            # slime asks for a whole over-sampling batch when a single group was dropped, and would abort the surplus.
            missing = self.args.rollout_batch_size - GenerateState(self.args).remaining_batch_size
            num_samples = min(num_samples, missing)
            if self._replaced + num_samples > self.config.tcod_max_replacements * self.args.rollout_batch_size:
                raise _too_many_failures(self.rollout_id, missing, self.drawn)
        groups = super().get_samples(num_samples)
        self._replaced += 0 if first else len(groups)
        self.drawn += _flat(groups)
        return groups


def _too_many_failures(rollout_id: int, missing: int, samples: list[Sample]) -> RuntimeError:
    reasons = Counter(
        sample.metadata["tcod"].get("failure", "aborted")
        for sample in samples
        if sample.status in (Sample.Status.FAILED, Sample.Status.ABORTED)
    )
    return RuntimeError(
        f"rollout {rollout_id} stops: more than tcod_max_replacements whole batches of failed groups were replaced "
        f"and {missing} are still missing; failures by reason: {dict(reasons)}"
    )


def _flat(groups: list[list[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


# ------------------------------------------------------------------------------------------------ one episode


class _Aborted(Exception):
    """slime ends this rollout: the episode is undone."""


class _EpisodeFailure(Exception):
    """The episode cannot be trained on; `reason` is what is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


async def _play(args: Namespace, sample: Sample, sampling_params: dict[str, Any], evaluation: bool) -> None:
    """The one episode loop of all arms and of evaluation; the plan says who acts at which turn."""
    runtime = _runtime(args)
    demo = _Demonstration([], None) if evaluation else _Demonstration.of(sample)
    plan = runtime.plan(sample, demo, evaluation)
    record = sample.metadata["tcod"] = {
        **sample.metadata.get("tcod", {}),
        **{"replayed": plan.replayed, "budget": plan.budget, "turns": [], "won": False, "context_limited": False},
        "untempered": untempered(sampling_params),
    }
    started = time.monotonic()
    async with runtime.pool.borrow() as environment:
        _stop_if_ended(args)  # while it waited for an engine
        student = _Student(args, runtime, sample, sampling_params)
        observation = await _in_environment(sample, environment.reset(sample.metadata))
        sample.tokens = runtime.chat.prompt(runtime.environment.system_prompt(), runtime.render(observation, True))
        for turn in range(plan.replayed + plan.budget):
            _stop_if_ended(args)
            if turn < plan.replayed:
                action = demo.replay(runtime, sample, turn, observation)
            elif student.has_room():
                action = await student.respond(turn)
                record["turns"][-1]["admissible"] = _is_admissible(action, observation)
            else:
                break
            observation = await _in_environment(sample, environment.step(action))
            if turn < plan.replayed and (observation.won or observation.done):
                raise _EpisodeFailure("demo_won_early", f"the episode ends at replayed turn {turn + 1}: {action!r}")
            if observation.won or observation.done or turn + 1 == plan.replayed + plan.budget:
                break
            if not student.observe(runtime.render(observation, False)):
                break
        record["won"] = observation.won
        record["env_s"] = sample.non_generation_time = environment.seconds
    record["episode_s"] = time.monotonic() - started
    if not sample.response_length:
        raise _EpisodeFailure("prompt_too_long", "no room for a response: raise --rollout-max-context-len")
    response = sample.tokens[-sample.response_length :]
    sample.response = runtime.chat.tokenizer.decode(response, skip_special_tokens=False)
    cut = record["context_limited"] or (record["turns"][-1]["cut"] and not record["won"])
    sample.status = Sample.Status.TRUNCATED if cut else Sample.Status.COMPLETED


def _has_ended(args: Namespace) -> bool:
    """Whether slime has all the groups that this rollout needs; an evaluation never runs meanwhile."""
    return GenerateState(args).aborted


def _stop_if_ended(args: Namespace) -> None:
    if _has_ended(args):
        raise _Aborted


async def _in_environment(sample: Sample, call: Any) -> Observation:
    with trace_span(sample, "environment"):
        return await call


def _is_admissible(action: str, observation: Observation) -> bool:
    return not observation.admissible or action in observation.admissible  # not every environment lists them


@dataclass(frozen=True)
class _Demonstration:
    """A recorded solution: actions, and the teacher's responses they were parsed from where those were recorded."""

    actions: list[str]
    responses: list[str] | None

    @staticmethod
    def of(sample: Sample) -> "_Demonstration":
        demo = sample.metadata.get("demo") or {}
        return _Demonstration(
            [" ".join(action.split()) for action in demo.get("actions") or []], demo.get("responses")
        )

    def check(self, horizon: int) -> None:
        if not self.actions:
            raise _EpisodeFailure("demo_missing", "b2f needs a demonstration and this row has no actions")
        if len(self.actions) > horizon:
            raise _EpisodeFailure("demo_too_long", f"{len(self.actions)} actions, the horizon is {horizon}")
        if self.responses is not None and len(self.responses) != len(self.actions):
            raise _EpisodeFailure("demo_mismatch", f"{len(self.responses)} responses, {len(self.actions)} actions")

    def replay(self, runtime: "_Runtime", sample: Sample, turn: int, observation: Observation) -> str:
        """Append the demonstration's turn to the prompt, as the chat turn it was, and return its action."""
        action = self.actions[turn]
        if not _is_admissible(action, observation):
            raise _EpisodeFailure("demo_inadmissible", f"turn {turn + 1} of the demonstration: {action!r}")
        response = self.responses[turn] if self.responses else runtime.environment.format_action(action)
        if runtime.environment.parse_action(response) != (action, True):
            raise _EpisodeFailure("demo_mismatch", f"turn {turn + 1}: {action!r} is not the action of {response!r}")
        sample.tokens += runtime.chat.assistant(response)
        return action


class _Student:
    """The student's side of an episode: samples responses and keeps the sample's tokens append-only."""

    def __init__(self, args: Namespace, runtime: "_Runtime", sample: Sample, sampling_params: dict[str, Any]) -> None:
        self.args, self.runtime, self.sample, self.chat = args, runtime, sample, runtime.chat
        # A copy: all samples of an evaluation share one dict.
        self.sampling_params = {**sampling_params, "no_stop_trim": True}
        stop_ids = set(sampling_params.get("stop_token_ids") or []) | self.chat.stop_ids
        self.sampling_params["stop_token_ids"] = sorted(stop_ids)
        self.max_response_len = sampling_params["max_new_tokens"]
        # The turns of one episode should reach the same engine: its cache holds the episode's prefix.
        self.headers = {"X-SMG-Routing-Key": sample.session_id or uuid.uuid4().hex}
        self.url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
        self.open = False  # the last response lacks its end-of-turn token: cut by a length, or ended by --rollout-stop

    @property
    def record(self) -> dict[str, Any]:
        return self.sample.metadata["tcod"]

    def has_room(self) -> bool:
        """Whether one more response fits the context; else the episode ends here, context-limited."""
        if self._room() < 1:
            self.record["context_limited"] = True
        return not self.record["context_limited"]

    async def respond(self, turn: int) -> str:
        """Sample one response, append its ids as trainable tokens and return the action in it."""
        max_new_tokens = min(self.max_response_len, self._room())
        payload = {
            "input_ids": self.sample.tokens,
            "sampling_params": {**self.sampling_params, "max_new_tokens": max_new_tokens},
            "return_logprob": True,
        }
        with trace_span(self.sample, "sglang_generate", attrs={"max_new_tokens": max_new_tokens}) as span:
            try:
                output = await self.runtime.engine.post(
                    self.url, payload, self.headers, unwanted=lambda: _has_ended(self.args)
                )
            except RequestFailure as failure:
                if failure.reason == "unwanted":
                    raise _Aborted from failure
                raise _EpisodeFailure(f"engine_{failure.reason}", str(failure)) from failure
            ids, log_probs, meta_info = self._checked(output)
            span.update(build_sglang_meta_trace_attrs(meta_info))
        start = self.sample.response_length
        self.sample.append_response_tokens(
            self.args, tokens=ids, log_probs=log_probs, trainable=True, meta_info=meta_info
        )
        self.open = ids[-1] not in self.chat.stop_ids
        cut = meta_info["finish_reason"]["type"] == "length"
        action, valid = self.runtime.environment.parse_action(self.chat.text(ids))
        self.record["turns"].append(
            {"turn": turn, "start": start, "end": start + len(ids), "action": action, "valid": valid, "cut": cut}
        )
        return action

    def observe(self, text: str) -> bool:
        """Append the environment's turn as untrained tokens; False if no further response would fit behind it."""
        ids = self.chat.user(text)
        if not self.sample.response_length:  # still replaying: the turn belongs to the prompt
            self.sample.tokens += ids
            return self.has_room()
        if self.open:
            ids = [self.chat.end_of_turn] + ids
        if self._room() - len(ids) < 1:
            self.record["context_limited"] = True
            return False
        self.sample.append_response_tokens(self.args, tokens=ids, trainable=False)
        return True

    def _room(self) -> int:
        """Tokens a response may have; one place is kept for the end-of-turn token of a cut response."""
        return self.args.rollout_max_context_len - len(self.sample.tokens) - 1

    def _checked(self, output: Any) -> tuple[list[int], list[float], dict[str, Any]]:
        """The sampled ids and log-probs of an engine's reply, if they can be trained on."""
        try:
            meta_info = output["meta_info"]
            if meta_info["finish_reason"]["type"] == "abort":
                raise _Aborted
            log_probs = [entry[0] for entry in meta_info["output_token_logprobs"]]
            ids = [entry[1] for entry in meta_info["output_token_logprobs"]]
        except (KeyError, TypeError, IndexError) as error:
            raise _EpisodeFailure("engine_invalid", f"{error!r} in the reply {str(output)[:200]}") from error
        if not ids:
            raise _EpisodeFailure("nothing_sampled", "the engine returned an empty response")
        if not all(isinstance(i, int) and 0 <= i < self.chat.vocab_size for i in ids):
            raise _EpisodeFailure("engine_invalid", "a sampled id is outside the tokenizer's vocabulary")
        if not all(map(is_log_prob, log_probs)):
            raise _EpisodeFailure("engine_invalid", "a value is no log-probability")
        return ids, log_probs, meta_info


# What a sample has before it is played; all its other fields are an episode's.
_DRAWN = {
    *("group_index", "index", "rollout_id", "prompt", "label", "metadata", "train_metadata", "session_id"),
    *("generate_function_path", "custom_rm_path", "apply_chat_template_kwargs"),
    *("multimodal_inputs", "multimodal_train_inputs", "multimodal_train_input_id"),
}


def _reset(sample: Sample, status: Sample.Status = Sample.Status.PENDING) -> None:
    """Undo an episode: the sample is as it was drawn, stamp included, but for its status."""
    fresh = Sample(status=status)
    for field in fields(Sample):
        if field.name not in _DRAWN:
            setattr(sample, field.name, getattr(fresh, field.name))
    episode = sample.metadata.get("tcod") or {}
    sample.metadata["tcod"] = {key: episode[key] for key in ("n", "k", "evaluation") if key in episode}


def _fail(sample: Sample, reason: str, detail: str) -> None:
    line = " ".join(detail.removeprefix(f"{reason}: ").split())  # Ray tells of a dead worker in ten
    logger.warning("sample %s failed, %s: %s", sample.index, reason, line[:500])
    _reset(sample, Sample.Status.FAILED)
    sample.reward = 0.0
    sample.metadata["tcod"] |= {"won": False, "turns": [], "failure": reason}


def _kl_wanted(args: Namespace, sample: Sample) -> bool:
    """Whether an evaluation episode is scored, by leaving its reward to reward_func. Where sampling changes the policy
    (any temperature but 1), the difference of the engine's and the teacher's log-probs would be no KL."""
    wanted = _runtime(args).config.tcod_eval_kl and args.opd_type == "sglang"
    return wanted and sample.status != Sample.Status.FAILED and sample.metadata["tcod"]["untempered"]


# ------------------------------------------------------------------------------------------------- per process


@dataclass
class _Runtime:
    """What the episodes of one event loop share."""

    args: Namespace
    config: TcodConfig
    environment: type[Environment]
    chat: ChatTokens
    pool: EnvironmentPool
    engine: SGLangClient
    teacher: TeacherClient | None

    @classmethod
    def create(cls, args: Namespace) -> "_Runtime":
        config = TcodConfig.from_args(args)
        pool = EnvironmentPool(
            config.tcod_environment,
            config.tcod_data_root,
            workers=config.tcod_env_workers,
            engines_per_worker=config.tcod_engines_per_worker,
            timeout_s=config.tcod_env_timeout_s,
        )
        chat = ChatTokens(GenerateState(args).tokenizer, args.apply_chat_template_kwargs)
        engine = SGLangClient(config.tcod_engine_timeout_s, ENGINE_RETRIES)
        teacher = None
        if args.opd_type == "sglang":
            teacher = TeacherClient(
                f"{teacher_base_url(args)}/generate",
                timeout_s=config.tcod_teacher_timeout_s,
                retries=config.tcod_teacher_retries,
                concurrency=config.tcod_teacher_concurrency,
                vocab_size=chat.vocab_size,
            )
        return cls(args, config, load_environment(config.tcod_environment), chat, pool, engine, teacher)

    def render(self, observation: Observation, first: bool) -> str:
        return self.environment.render(observation, first, self.config.tcod_admissible == "turn")

    def plan(self, sample: Sample, demo: _Demonstration, evaluation: bool) -> EpisodePlan:
        curriculum = self.config.curriculum
        if evaluation:
            return curriculum.full_plan()
        if "k" not in sample.metadata["tcod"]:
            raise ConfigError("--rollout-function-path must be tcod_rollout.generate_rollout: it stamps the depth")
        if curriculum.variant == "b2f":
            demo.check(curriculum.horizon)
        return curriculum.plan(sample.metadata["tcod"]["k"], len(demo.actions))


# Engines, sessions and semaphores belong to one event loop; slime has one, its fully asynchronous mode another.
_runtimes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Runtime] = weakref.WeakKeyDictionary()
_launched: Namespace | None = None
_continuous_source: _StampedSource | None = None


def _runtime(args: Namespace) -> _Runtime:
    loop = asyncio.get_running_loop()
    runtime = _runtimes.get(loop)
    if runtime is None or runtime.args is not args:
        runtime = _runtimes[loop] = _Runtime.create(args)
    return runtime


def _launch(args: Namespace, data_source: Any) -> TcodConfig:
    """The launch checks, once per run: slime has no earlier hook than the first rollout or evaluation."""
    global _launched
    if _launched is args:
        return TcodConfig.from_args(args)
    dataset = getattr(data_source, "dataset", None)
    config = check_settings(args, getattr(dataset, "samples", None))
    check_models(args, GenerateState(args).tokenizer)
    logger.info("TCOD: %s", config)
    _launched = args
    return config
