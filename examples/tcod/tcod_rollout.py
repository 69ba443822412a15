"""TCOD on slime: multi-turn on-policy distillation with a temporal curriculum (arXiv 2604.24005).

slime loads these hooks by flag; the recipe lies in slime's examples/ and slime's folder is on PYTHONPATH:

    --rollout-function-path                 examples.tcod.tcod_rollout.generate_rollout
                                            (in train_async.py also .generate_rollout_fully_async)
    --custom-generate-function-path         examples.tcod.tcod_rollout.generate
    --custom-rm-path                        examples.tcod.tcod_rollout.reward_func
    --custom-reward-post-process-path       examples.tcod.tcod_rollout.post_process_rewards
    --dynamic-sampling-filter-path          examples.tcod.tcod_rollout.drop_failed
    --custom-config-path                    a YAML of tcod_* settings

A sample's way through one training step n:
    1. settings/run.py           the first call checks all settings; the first episode makes the objects
    2. training/task_source.py   a task is drawn, and gets n and k = Curriculum.depth(n)
    3. curriculum.py             who acts at which turn
    4. episode/loop.py           the episode is played: an Episode, in metadata["tcod"]
    5. episode/history.py        what the student sees at a turn, and which tokens are trained (Span.is_trained)
    6. model/teacher.py          the teacher scores what was sampled: reward_func, through EnvironmentSetup.score in
                                 settings/run.py, which puts what episode/note.py shows it before the tokens
    7. drop_failed               a group with a failed sample, or with nothing to learn from, is replaced
                                 (sft plays nothing: SynchronousSource.imitated_groups)
    8. records/                  metrics, and some episodes to read
    9. training/samples.py       slime's samples are made of the episodes, loss masks included
   10. post_process_rewards      slime is given the reward to log, and what is trained on of it beside the KL
"""

import asyncio
import functools
import logging
import time
import uuid
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from slime.rollout import sglang_rollout
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.rm_hub import async_rm
from slime.utils import async_utils
from slime.utils.types import Sample

from . import ABORTED, ConfigError, Failure
from .curriculum import Curriculum, EpisodePlan
from .episode.demonstration import Demonstration
from .episode.episode import Episode, EpisodeRecord
from .episode.loop import Assignment, failures_go_to
from .records.metrics import Metrics, eval_metrics, imitation_metrics, rollout_metrics
from .records.run_folder import rollouts_before, run_dir, write_metrics
from .records.saved_episodes import choose_to_save
from .settings.run import Run, begin_rollout, checked_run, imitate_row, run_of, setup_of
from .training.rewards import NO_SIGNAL, normalised, reward_of
from .training.samples import Groups, check_complete, flat, set_status, timeline_span, to_samples, write_tokens
from .training.task_source import AsynchronousSource, SynchronousSource
from .training.turn_mean import count_turns, is_turn_mean

__all__ = [
    "drop_failed",
    "generate",
    "generate_rollout",
    "generate_rollout_fully_async",
    "post_process_rewards",
    "reward_func",
]

logger = logging.getLogger(__name__)


def generate_rollout(
    args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """slime's rollout at depth k(rollout_id); evaluation always plays the full horizon.

    Raises:
        ConfigError: on the first call, when a setting cannot work.
        RuntimeError: when more than tcod_max_replacements whole batches of groups were replaced.
    """
    run = checked_run(args, data_source)
    started = time.monotonic()
    if evaluation:
        output = sglang_rollout.generate_rollout(args, rollout_id, data_source, evaluation=True)
        return _evaluated(run, rollout_id, output, started)
    source = begin_rollout(SynchronousSource, run, data_source, rollout_id)
    if run.config.tcod_variant == "sft":
        groups = source.imitated_groups(functools.partial(imitate_row, run), run.chat.tokenizer)
        metrics = imitation_metrics(flat(groups), source.drawn)
        return _trained(run, rollout_id, groups, [], metrics, started)
    output = sglang_rollout.generate_rollout(args, rollout_id, source)
    source.end(output.samples)
    metrics = (output.metrics or {}) | rollout_metrics(flat(output.samples), source.drawn)
    return _trained(run, rollout_id, output.samples, source.drawn, metrics, started)


def generate_rollout_fully_async(
    args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """slime's fully asynchronous rollout (train_async.py), in which episodes go on while the model is trained.

    An episode's depth is k(rollout id when it was drawn). slime has no filter there, so groups with a failed sample
    are dropped here and others taken instead.

    Raises:
        ConfigError: on the first call, when a setting cannot work; always in an evaluation, which slime lacks there.
        RuntimeError: when more than tcod_max_replacements whole batches of groups were replaced, or slime's
            worker has lost a group.
    """
    if evaluation:
        raise ConfigError("slime cannot evaluate in a fully asynchronous run: remove --eval-interval")
    run = checked_run(args, data_source)
    started = time.monotonic()
    source = begin_rollout(AsynchronousSource, run, data_source, rollout_id)
    for group in source.played_groups():
        source.add_ended(group, keep=drop_failed(args, group).keep)
    trained, dropped = source.take()
    drawn = flat(trained) + flat(dropped)
    metrics = rollout_metrics(flat(trained), drawn)
    oldest = rollout_id - run.config.tcod_max_staleness
    metrics["rollout/tcod/stale"] = sum(Episode.of(sample).record.n < oldest for sample in flat(trained))
    metrics["rollout/tcod/under_way"] = source.under_way * args.n_samples_per_prompt
    return _trained(run, rollout_id, trained, drawn, metrics, started)


async def generate(
    args: Namespace, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample:
    """Play one episode. Sets status and response; in an evaluation also tokens, masks and log-probs.

    What is played is kept in the Episode in metadata["tcod"]. In training the task source has put it there, with the
    depth; in an evaluation it is made here.

    A failure of the engine or the environment, or a demonstration that does not fit, becomes Status.FAILED with a
    reason in the EpisodeRecord and reward 0.0. An episode that its rollout no longer needs becomes Status.ABORTED.
    """
    if evaluation:
        sample.metadata["tcod"] = Episode(EpisodeRecord(evaluation=True))
    elif "tcod" not in sample.metadata:
        hook = f"{__name__}.generate_rollout"
        raise ConfigError(f"--rollout-function-path must be {hook} or {hook}_fully_async: it stamps the depth")
    episode = Episode.of(sample)
    sample.session_id = sample.session_id or uuid.uuid4().hex  # an evaluation's samples have none
    check_wanted = functools.partial(_check_wanted, args)
    with failures_go_to(episode.fail, check_wanted):
        setup = setup_of(args, sample.metadata)
        episode.record.environment = setup.config.name
        plan, demonstration = _plan(setup.config.curriculum, episode.record, sample)
        assignment = Assignment(
            metadata=sample.metadata,
            plan=plan,
            demonstration=demonstration,
            sampling_params=sampling_params,
            max_context_len=(evaluation and args.eval_max_context_len) or args.rollout_max_context_len,
            session=sample.session_id,
            check_wanted=check_wanted,
            trace=functools.partial(timeline_span, sample),
        )
        await setup.player.play(assignment, episode)
        if evaluation:
            write_tokens(args, sample, episode.sequences)
    set_status(sample, run_of(args).chat.tokenizer)
    return sample


async def reward_func(args: Namespace, sample: Sample | list[Sample], **kwargs: Any) -> float | list[float]:
    """The episode's reward (tcod_reward; in an evaluation: won); the teacher scores it, too (--opd-type sglang).

    Sets the teacher's log-probs of the episode's sequences; in an evaluation only with tcod_eval_kl, and only of
    episodes sampled at temperature 1. A training sample without a reward or a usable score is FAILED. A list is what
    another generate function of an evaluation has made: each sample's own function is asked.
    """
    if isinstance(sample, list):
        return [await async_rm(args, one, **kwargs) for one in sample]
    episode = Episode.of(sample)
    record, run = episode.record, run_of(args)
    if record.failure:
        return 0.0
    is_scored = not record.evaluation or (run.config.tcod_eval_kl and record.untempered)
    check_wanted = functools.partial(_check_wanted, args)
    with failures_go_to(episode.leave_unscored if record.evaluation else episode.fail, check_wanted):
        reward = reward_of(record, "won" if record.evaluation else run.config.tcod_reward)
        if args.opd_type == "sglang" and is_scored:
            await _score(args, sample, check_wanted)
    if record.failure:
        set_status(sample, run.chat.tokenizer)
        return 0.0
    return reward


def drop_failed(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Drop a group with a failed or an aborted sample, and one with nothing to learn from; slime draws another one.

    Without a teacher, equal rewards teach nothing: such a group is dropped however long its episodes took, and its
    records say so (no_signal).
    """
    for sample in samples:
        if sample.status == Sample.Status.FAILED:
            return DynamicFilterOutput(keep=False, reason=Episode.of(sample).record.failure)
        if sample.status == Sample.Status.ABORTED:
            return DynamicFilterOutput(keep=False, reason=ABORTED)
    if not getattr(args, "use_opd", True) and len({sample.reward for sample in samples}) == 1:
        for sample in samples:
            Episode.of(sample).record.no_signal = True
        return DynamicFilterOutput(keep=False, reason=NO_SIGNAL)
    return DynamicFilterOutput(keep=True)


def post_process_rewards(args: Namespace, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """(rewards, what is trained on of them) per sample. slime logs the first.

    The second is tcod_reward_coef x the reward, normalised in its group; slime subtracts --opd-kl-coef x KL from it.
    With a coefficient of 0 the KL is the only signal. Under tcod_history turns slime logs a mean over turns; that
    over episodes is rollout/tcod/success (with tcod_reward: grade rollout/tcod/reward).

    The last gate before training, because slime asks the first sample alone whether a batch has teacher log-probs.
    Where the loss is a mean over turns (training/turn_mean.py), their count is written into the masks here.

    Raises:
        ValueError: a sample is incomplete; it must never be trained on.
    """
    check_complete(args, samples, needs=f"--dynamic-sampling-filter-path {__name__}.drop_failed")
    if is_turn_mean(args):
        count_turns(samples, args.global_batch_size)  # the last look at a whole batch before its micro-batches
    rewards = [float(sample.reward) for sample in samples]
    return rewards, normalised(samples, getattr(args, "tcod_reward_coef", 0.0))


def _plan(curriculum: Curriculum, record: EpisodeRecord, sample: Sample) -> tuple[EpisodePlan, Demonstration]:
    """Who acts when, and the demonstration that is replayed. Raises Failure where the arm cannot use it."""
    demonstration = Demonstration()
    if record.evaluation:
        return curriculum.full_plan(), demonstration
    if curriculum.needs_demonstration:
        demonstration = Demonstration.of(sample.metadata)
        demonstration.check(curriculum.horizon)
    return curriculum.plan(record.k, len(demonstration.actions), record.n, sample.index), demonstration


async def _score(args: Namespace, sample: Sample, check_wanted: Callable[[], None]) -> None:
    """Have the teacher score an episode, with the note that it is shown. Raises Failure."""
    episode, started = Episode.of(sample), time.monotonic()
    with timeline_span(sample, "teacher"):
        setup = setup_of(args, sample.metadata)
        episode.note = setup.notes.write(sample.metadata, episode)
        for sequence in episode.sequences:  # one after the other: each finds the one before in the cache
            sequence.teacher_log_probs = await setup.score(sequence, episode.note, sample.session_id, check_wanted)
    episode.record.teacher_s = time.monotonic() - started


def _score_plainly(run: Run, samples: list[Sample]) -> None:
    """tcod_save_plain_scores: once more without a note, for people to read. What fails leaves an episode as it is."""

    async def score(sample: Sample) -> None:
        episode = Episode.of(sample)
        with failures_go_to(lambda *failure: logger.warning("no scores without a note, %s: %s", *failure)):
            setup = setup_of(run.args, sample.metadata)
            for sequence in episode.sequences if episode.note and episode.is_scored else ():
                sequence.plain_log_probs = await setup.score(sequence, None, sample.session_id)

    async def score_all() -> None:
        await asyncio.gather(*map(score, samples))

    async_utils.run(score_all())


def _check_wanted(args: Namespace) -> None:
    """Raises Failure(ABORTED) once slime has all the groups that this rollout needs; in an evaluation never."""
    if sglang_rollout.GenerateState(args).aborted:
        raise Failure(ABORTED, "the rollout has all the episodes it needs")


def _trained(
    run: Run, rollout_id: int, groups: Groups, drawn: list[Sample], metrics: Metrics, started: float
) -> RolloutFnTrainOutput:
    """A rollout as slime takes it: under tcod_history turns an episode is a list of samples."""
    if run.config.tcod_save_plain_scores and run_dir():
        _score_plainly(run, choose_to_save(drawn, run.episode_log.limit))
    metrics["rollout/tcod/rollout_s"] = time.monotonic() - started
    metrics["rollout/tcod/unsaved_episodes"] = run.episode_log.save("train", rollout_id, drawn)
    write_metrics("rollout", rollout_id, metrics, started)
    made = [[to_samples(run.args, sample, run.chat.tokenizer) for sample in group] for group in groups]
    if run.config.tcod_history == "append":
        made = [flat(group) for group in made]
    return RolloutFnTrainOutput(samples=made, metrics=metrics)


def _evaluated(run: Run, rollout_id: int, output: RolloutFnEvalOutput, started: float) -> RolloutFnEvalOutput:
    """An evaluation as slime takes it. Samples that other hooks have made pass through."""
    ours = {
        name: [sample for sample in result["samples"] if isinstance((sample.metadata or {}).get("tcod"), Episode)]
        for name, result in output.data.items()
    }
    n = rollouts_before(rollout_id)
    metrics = (output.metrics or {}) | eval_metrics(ours) | {"eval/tcod/eval_s": time.monotonic() - started}
    for name, samples in ours.items():
        metrics[f"eval/tcod/{name}/unsaved_episodes"] = run.episode_log.save(f"eval_{name}", n, samples)
        for sample in samples:
            sample.metadata["tcod"] = Episode.of(sample).record.as_dict()
    write_metrics("eval", n, metrics, started)
    output.metrics = metrics
    return output
