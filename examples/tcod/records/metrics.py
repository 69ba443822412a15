"""TCOD's metrics, computed from finished samples; they reach every tracker through slime's own logging.

The KL of a token is log pi_student - log pi_teacher with the rollout engine's log-probs (slime's advantage uses
Megatron's own unless --use-rollout-logprobs), and the teacher's as it scored: with its note, where it was shown one.
Its sum over a trajectory's sampled tokens is a one-sample estimate of the reverse KL between the two policies over
whole episodes, in nats.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..episode.episode import Episode, EpisodeRecord
from ..episode.rows import task_key, task_of
from .repeats import grouped, statistics_of

Metrics = dict[str, float]
OF_EACH_ENVIRONMENT = ("episodes", "k", "success", "turns/student", "kl/trajectory", "kl/token")


def rollout_metrics(trained: Sequence[Any], drawn: Sequence[Any]) -> Metrics:
    """`rollout/tcod/*` of one training step.

    Args:
        trained: the samples that go to training.
        drawn: all samples that were played for it, failed, aborted and surplus ones included.
    """
    episodes = [Episode.of(sample) for sample in trained]
    records = [episode.record for episode in episodes]
    # One depth for all, unless horizons differ, or a fully asynchronous rollout spans a change of it.
    metrics = {"k": fmean(record.k for record in records)}
    metrics |= {**_episodes(records), **_kl(episodes), **_notes(episodes), **_failures(drawn)}
    metrics |= _by_environment(episodes)
    metrics |= _by_index("success_by_start", ((record.replayed, record.won) for record in records))
    by_label = ((str(sample.label or ""), record.won) for sample, record in zip(trained, records, strict=True))
    metrics |= _by_index("success_by_type", by_label)
    metrics |= _tokens(episodes)
    played = [Episode.of(sample).record for sample in drawn]
    metrics["steps"] = sum(len(record.replayed_turns) + len(record.turns) for record in played)
    if replayed := [turn.as_sampled for record in records for turn in record.replayed_turns]:
        metrics["replayed_as_sampled"] = fmean(replayed)
    # The teacher scores after the episode; both are shares of the time that trajectories were under way.
    env_s = sum(record.env_s for record in records)
    teacher_s = sum(record.teacher_s for record in records)
    total_s = sum(record.episode_s for record in records) + teacher_s
    metrics |= {"env_s": env_s / len(trained), "teacher_s": teacher_s / len(trained)}
    metrics |= {"env_share": env_s / total_s, "teacher_share": teacher_s / total_s}
    return {f"rollout/tcod/{name}": value for name, value in metrics.items()}


def imitation_metrics(trained: Sequence[Any], drawn: Sequence[Any]) -> Metrics:
    """`rollout/tcod/*` of a step on demonstrations, in which nothing was played. Arguments as for rollout_metrics."""
    metrics = {**_tokens(list(map(Episode.of, trained))), **_failures(drawn)}
    return {f"rollout/tcod/{name}": value for name, value in metrics.items()}


def eval_metrics(datasets: Mapping[str, Sequence[Any]]) -> Metrics:
    """`eval/tcod/{dataset}/*` of the samples of each data set of one evaluation.

    Success and turns are means over the episodes that were played to their end; failed ones are counted beside them.
    """
    metrics: Metrics = {}
    for name, samples in datasets.items():
        repeats = _repeats(samples)
        played = [Episode.of(sample) for sample in samples if not Episode.of(sample).record.failure]
        values = {"episodes": len(played), **_failures(samples)} if samples else {}
        if played:
            values |= {**_episodes([episode.record for episode in played]), **_kl(played), **statistics_of(repeats)}
            values |= _by_environment(played)
            for label, group in grouped(repeats, "task_type").items():
                values |= {f"{key}_by_type/{label}": value for key, value in statistics_of(group).items()}
        metrics |= {f"eval/tcod/{name}/{key}": value for key, value in values.items()}
    return metrics


def _repeats(samples: Sequence[Any]) -> list[dict[str, Any]]:
    """An evaluation's samples as repeats.py takes them, without those that failed."""
    times, repeats = Counter[str](), []
    for sample in sorted(samples, key=lambda sample: sample.index):
        record, task = Episode.of(sample).record, task_key(task_of(sample.metadata))
        about = {"task": task, "repeat": times[task], "task_type": str(sample.label or "")}
        times[task] += 1
        if not record.failure:
            repeats.append({**about, "won": record.won, "turns": len(record.turns), "score": record.best_grade})
    return repeats


def turn_kl(episode: Episode) -> dict[int, float]:
    """Sum of the tokens' KL, in nats, by absolute turn index (0-based, replayed turns counted)."""
    return {
        span.turn: sum(student - teacher for student, teacher in zip(span.log_probs, scores, strict=True))
        for span, scores in episode.sampled()
    }


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


def _by_environment(episodes: Sequence[Episode]) -> Metrics:
    """by_environment/{name}/*, where a run has several."""
    metrics: Metrics = {}
    for name in sorted({episode.record.environment for episode in episodes} - {""}):
        group = [episode for episode in episodes if episode.record.environment == name]
        records = [episode.record for episode in group]
        values = {"episodes": len(group), **_episodes(records), **_kl(group)}
        values |= {} if records[0].evaluation else {"k": fmean(record.k for record in records)}
        metrics |= {f"by_environment/{name}/{key}": values[key] for key in OF_EACH_ENVIRONMENT if key in values}
    return metrics


def _kl(episodes: Sequence[Episode]) -> Metrics:
    """Nothing without the log-probs of a teacher's server (there is none, or an evaluation without tcod_eval_kl)."""
    scored = [episode for episode in episodes if episode.is_scored]
    if not scored:
        return {}
    by_turn = [pair for episode in scored for pair in turn_kl(episode).items()]
    total = sum(kl for _, kl in by_turn)
    return {
        "kl/trajectory": total / len(scored),
        "kl/token": total / _sampled_tokens(scored),
        "kl/episodes": len(scored),
        **_by_index("kl_by_turn", by_turn),
    }


def _tokens(episodes: Sequence[Episode]) -> Metrics:
    sequences = [sequence for episode in episodes for sequence in episode.sequences]
    return {
        "tokens/scored": sum(len(sequence.teacher_log_probs or ()) for sequence in sequences),
        "tokens/trained": _sampled_tokens(episodes),
        "tokens/total": sum(len(sequence.tokens) for sequence in sequences),
        "samples": len(sequences),
    }


def _notes(episodes: Sequence[Episode]) -> Metrics:
    """Nothing where the teacher is shown none: then the loss is the paper's."""
    notes = [episode.note for episode in episodes if episode.note is not None]
    values = {f"note_{part}": [part in note.parts for note in notes] for part in ("demo", "hindsight")}
    values |= {"note_tokens": [note.tokens for note in notes], "note_cut": [note.left_out > 0 for note in notes]}
    return {name: fmean(each) for name, each in values.items() if each}


def _by_index(name: str, pairs: Iterable[tuple[int | str, float]]) -> Metrics:
    """Mean and count of the values of each index, or label."""
    groups = defaultdict(list)
    for index, value in pairs:
        groups[index].append(value)
    metrics: Metrics = {}
    for index, values in sorted(groups.items()):
        key = f"{index:02d}" if isinstance(index, int) else index
        metrics |= {f"{name}/{key}": fmean(values), f"{name}_count/{key}": len(values)}
    return metrics


def _sampled_tokens(episodes: Sequence[Episode]) -> int:
    return sum(len(span.ids) for episode in episodes for span, _ in episode.sampled())


def _failures(samples: Iterable[Any]) -> Metrics:
    counts = Counter(failed=0, aborted=0)
    for sample in samples:
        record = Episode.of(sample).record
        counts["aborted"] += sample.status.value == "aborted"
        if record.failure:
            counts.update(["failed", f"failed/{record.failure}"])
        if record.no_signal:
            counts["no_signal"] += 1
        if record.unscored:
            counts[f"unscored/{record.unscored}"] += 1
    return dict(counts)
