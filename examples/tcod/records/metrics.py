"""TCOD's metrics, computed from finished samples; they reach every tracker through slime's own logging.

The KL of a token is log pi_student - log pi_teacher with the rollout engine's log-probs (slime's advantage uses
Megatron's own unless --use-rollout-logprobs). Its sum over a trajectory's sampled tokens is a one-sample estimate of
the reverse KL between the two policies over whole episodes, in nats.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from ..episode.loop import EpisodeRecord

Metrics = dict[str, float]


def rollout_metrics(trained: Sequence[Any], drawn: Sequence[Any], seconds: float) -> Metrics:
    """`rollout/tcod/*` of one training step.

    Args:
        trained: the samples that go to training.
        drawn: all samples that were played for it, failed, aborted and surplus ones included.
        seconds: wall time of the rollout.
    """
    records = [EpisodeRecord.of(sample) for sample in trained]
    # One depth for all, unless a fully asynchronous rollout spans a change of it.
    metrics = {"k": fmean(record.k for record in records)}
    metrics |= {**_episodes(records), **_kl(trained), **_failures(drawn)}
    won_by_start = defaultdict(list)
    for record in records:
        won_by_start[record.replayed].append(record.won)
    for start, won in sorted(won_by_start.items()):
        metrics[f"success_by_start/{start:02d}"] = fmean(won)
        metrics[f"success_by_start_count/{start:02d}"] = len(won)
    lengths = [
        (begin - start, end - begin, sample.teacher_log_probs is not None)
        for record, sample in zip(records, trained, strict=True)
        for start, begin, end in record.sequences(len(sample.tokens))
    ]
    metrics["tokens/scored"] = sum(response for _, response, scored in lengths if scored)
    metrics["tokens/trained"] = sum(sum(sample.loss_mask) for sample in trained)
    metrics["tokens/total"] = sum(prompt + response for prompt, response, _ in lengths)
    metrics["samples"] = len(lengths)
    if replayed := [turn.sampled for record in records for turn in record.replay]:
        metrics["replayed_as_sampled"] = fmean(replayed)
    metrics["rollout_s"] = seconds
    # The teacher scores after the episode; both are shares of the time that trajectories were under way.
    env_s = sum(record.env_s for record in records)
    teacher_s = sum(record.teacher_s for record in records)
    total_s = sum(record.episode_s for record in records) + teacher_s
    metrics |= {"env_s": env_s / len(trained), "teacher_s": teacher_s / len(trained)}
    metrics |= {"env_share": env_s / total_s, "teacher_share": teacher_s / total_s}
    return {f"rollout/tcod/{name}": value for name, value in metrics.items()}


def eval_metrics(data: dict[str, dict[str, Any]], seconds: float) -> Metrics:
    """`eval/tcod/{dataset}/*` of one evaluation; `data` is RolloutFnEvalOutput.data, `seconds` its wall time.

    Success and turns are means over the episodes that were played to their end; failed ones are counted beside them.
    """
    metrics: Metrics = {"eval/tcod/eval_s": seconds}
    for name, result in data.items():
        ours = [sample for sample in result["samples"] if "tcod" in sample.metadata]  # a data set may have other hooks
        if not ours:
            continue
        played = [sample for sample in ours if not EpisodeRecord.of(sample).failure]
        values = {"episodes": len(played), **_failures(ours)}
        if played:
            values |= {**_episodes([EpisodeRecord.of(sample) for sample in played]), **_kl(played)}
        metrics |= {f"eval/tcod/{name}/{key}": value for key, value in values.items()}
    return metrics


def token_kl(sample: Any) -> list[float]:
    """log pi_student - log pi_teacher per response token, in nats; 0.0 where the token was not sampled."""
    return [
        student - teacher if trained else 0.0
        for student, teacher, trained in zip(
            sample.rollout_log_probs, sample.teacher_log_probs, sample.loss_mask, strict=True
        )
    ]


def turn_kl(sample: Any) -> dict[int, float]:
    """Sum of the tokens' KL by absolute turn index (0-based, replayed turns counted), in nats."""
    kl = token_kl(sample)
    return {turn.turn: sum(kl[turn.start : turn.end]) for turn in EpisodeRecord.of(sample).turns}


def deepest_kl(samples: Iterable[Any], k: int) -> float | None:
    """Mean KL per token, in nats, over the student's k-th turn and later ones, where its errors have added up.

    Only samples that were drawn at depth k count; None if none of them has such a turn.
    """
    values: list[float] = []
    for sample in samples:
        record = EpisodeRecord.of(sample)
        if record.k == k and sample.teacher_log_probs is not None:
            kl = token_kl(sample)
            for turn in record.turns[k - 1 :]:
                values += kl[turn.start : turn.end]
    return fmean(values) if values else None


def _episodes(records: Sequence[EpisodeRecord]) -> Metrics:
    turns = [turn for record in records for turn in record.turns]
    replayed = fmean(record.replayed for record in records)
    student = len(turns) / len(records)
    rewards = [record.reward for record in records if record.reward is not None]
    return {
        "success": fmean(record.won for record in records),
        "turns/replayed": replayed,
        "turns/student": student,
        "turns/total": replayed + student,
        "invalid_actions": fmean(not turn.valid for turn in turns),
        "inadmissible_actions": fmean(not turn.admissible for turn in turns),
        "refused_actions": fmean(turn.refused for turn in turns),
        "truncated_turns": fmean(turn.cut for turn in turns),
        "context_limited": fmean(record.context_limited for record in records),
        **({"reward": fmean(rewards)} if rewards else {}),
    }


def _kl(samples: Sequence[Any]) -> Metrics:
    """Nothing without the teacher's log-probs (--opd-type megatron, or an evaluation without tcod_eval_kl)."""
    scored = [sample for sample in samples if sample.teacher_log_probs is not None]
    if not scored:
        return {}
    by_turn = defaultdict(list)
    for sample in scored:
        for turn, kl in turn_kl(sample).items():
            by_turn[turn].append(kl)
    total = sum(sum(kls) for kls in by_turn.values())
    metrics = {
        "kl/trajectory": total / len(scored),
        "kl/token": total / sum(sum(sample.loss_mask) for sample in scored),
        "kl/episodes": len(scored),
    }
    for turn, kls in sorted(by_turn.items()):
        metrics[f"kl_by_turn/{turn:02d}"] = fmean(kls)
        metrics[f"kl_by_turn_count/{turn:02d}"] = len(kls)
    return metrics


def _failures(samples: Iterable[Any]) -> Metrics:
    counts: Metrics = {"failed": 0, "aborted": 0}
    for sample in samples:
        if sample.status.value == "aborted":
            counts["aborted"] += 1
        if reason := EpisodeRecord.of(sample).failure:
            counts["failed"] += 1
            counts[f"failed/{reason}"] = counts.get(f"failed/{reason}", 0) + 1
        if reason := EpisodeRecord.of(sample).unscored:
            counts[f"unscored/{reason}"] = counts.get(f"unscored/{reason}", 0) + 1
    return counts
