"""How tasks are drawn for a rollout, at which depth, and what happens to those that were drawn and not trained.

The depth k is a function of the rollout's number at the draw. slime saves its position in the data with a checkpoint,
and its asynchronous modes have drawn further by then. So what was drawn and not trained is kept in the metadata that
slime saves beside that position, and comes first after a resume.
"""

import copy
import logging
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from logging.handlers import BufferingHandler
from typing import Any

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.types import Sample

from .. import ConfigError
from ..episode.episode import Episode, EpisodeRecord
from ..episode.loop import failures_go_to
from .rewards import NO_SIGNAL
from .samples import Groups, flat, set_status

# In the data source's metadata: {group index: {"trained_in": rollout or None, "samples": as they were drawn}}.
KEY = "tcod_untrained"
Untrained = dict[int, dict[str, Any]]

POLL_S = 0.05  # how often slime's fully asynchronous worker is asked for groups that have ended


class TaskSource:
    """slime's data source, with the depth stamped on every sample: `generate` is not told the rollout's number.

    Args:
        args: slime's arguments.
        data_source: slime's data source.
        depth: k by a row's metadata and the number of a rollout.
        max_replacements: the run stops when more than so many whole batches of groups were replaced in one rollout.
        max_staleness: how many rollouts ago a group may have been drawn, in the fully asynchronous mode.
        rollout_id: the first rollout that is played here.

    Raises:
        ConfigError: what is kept from before a resume has another number of episodes of a task.
    """

    def __init__(
        self,
        args: Namespace,
        data_source: Any,
        depth: Callable[[dict[str, Any], int], int],
        *,
        max_replacements: int,
        max_staleness: int,
        rollout_id: int,
    ) -> None:
        self.args, self.data_source, self.rollout_id = args, data_source, rollout_id
        self._depth, self._max_replacements, self._max_staleness = depth, max_replacements, max_staleness
        # A source of one's own may have no metadata: then nothing survives a resume but its position.
        self._metadata: dict[str, Any] = data_source.get_metadata() if hasattr(data_source, "get_metadata") else {}
        self._lock = threading.RLock()  # slime's fully asynchronous worker draws in a thread of its own
        if hasattr(data_source, "save"):
            self._save, data_source.save = data_source.save, self.save
        self._remember(
            lambda kept: {
                index: {**entry, "trained_in": None}
                for index, entry in kept.items()
                if entry["trained_in"] is None or entry["trained_in"] >= rollout_id
            }
        )
        self._again = [entry["samples"] for entry in self._metadata[KEY].values()]
        if sizes := {*map(len, self._again)} - {args.n_samples_per_prompt}:
            raise ConfigError(
                f"--n-samples-per-prompt (SAMPLES_PER_TASK) is {args.n_samples_per_prompt}, and the tasks that were "
                f"drawn before the checkpoint have {sizes.pop()} samples: take that number back"
            )

    def begin(self, rollout_id: int) -> None:
        """A rollout begins."""
        self.rollout_id = rollout_id

    def get_samples(self, num_samples: int) -> Groups:
        """slime's call. What was left over comes first."""
        again, self._again = self._again[:num_samples], self._again[num_samples:]
        groups = [[Sample.from_dict(copy.deepcopy(fields)) for fields in group] for group in again]
        with self._lock:
            if len(groups) < num_samples:
                groups += self.data_source.get_samples(num_samples - len(groups))
            as_drawn = [copy.deepcopy([sample.to_dict() for sample in group]) for group in groups]
            drawn = {group[0]["group_index"]: {"trained_in": None, "samples": group} for group in as_drawn}
            self._remember(lambda kept: {**kept, **drawn})
        n = self.rollout_id  # read once: the next rollout may begin meanwhile
        for sample in flat(groups):
            sample.metadata["tcod"] = Episode(EpisodeRecord(n=n, k=self._depth(sample.metadata, n)))
        return groups

    def add_samples(self, groups: Groups) -> None:
        """slime's call, with groups that were aborted: they are drawn again, as they were."""
        self._again += [self._metadata[KEY][group[0].group_index]["samples"] for group in groups]

    def save(self, *rollout_id: int) -> None:
        """slime's call, on its own source: never between a draw and its record, or the draw would be lost."""
        with self._lock:
            self._save(*rollout_id)

    def _remember(self, change: Callable[[Untrained], Untrained]) -> None:
        with self._lock:
            self._metadata[KEY] = change(self._metadata.get(KEY, {}))  # a new one: slime may be saving the old one

    def _mark_trained(self, groups: Groups, played: list[Sample]) -> None:
        """These groups are trained in this rollout; what else was played is lost; the others are kept for a resume."""
        trained = {group[0].group_index for group in groups}
        lost = {sample.group_index for sample in played} - trained
        self._remember(
            lambda kept: {
                index: {**entry, "trained_in": self.rollout_id} if index in trained else entry
                for index, entry in kept.items()
                if index in trained or (entry["trained_in"] is None and index not in lost)
            }
        )

    def _check_replacements(self, replaced: int, missing: int, drawn: list[Sample]) -> None:
        if replaced > self._max_replacements * self.args.rollout_batch_size:
            records = [Episode.of(sample).record for sample in drawn]
            reasons = [record.failure for record in records if record.failure]
            reasons += [NO_SIGNAL for record in records if record.no_signal]
            raise RuntimeError(
                f"rollout {self.rollout_id} stops: more than tcod_max_replacements whole batches of groups "
                f"were replaced and {missing} are still missing; samples by reason: {dict(Counter(reasons))}"
            )


class SynchronousSource(TaskSource):
    """Rollouts one after the other: each ends with all that it drew. Dropped groups are replaced one by one.

    Attributes:
        drawn: the samples of this rollout.
    """

    def begin(self, rollout_id: int) -> None:
        super().begin(rollout_id)
        self.drawn: list[Sample] = []

    def get_samples(self, num_samples: int) -> Groups:
        if self.drawn:
            # slime asks for a whole over-sampling batch when a single group was dropped, and would abort the surplus.
            missing = self.args.rollout_batch_size - GenerateState(self.args).remaining_batch_size
            num_samples = min(num_samples, missing)
            self._check_replacements(self._replaced(missing), missing, self.drawn)
        groups = super().get_samples(num_samples)
        self.drawn += flat(groups)
        return groups

    def imitated_groups(self, imitate: Callable[[dict[str, Any], Episode], None], tokenizer: Any) -> Groups:
        """A whole rollout of demonstrations, made episodes by `imitate`. One that fails is replaced."""
        groups: Groups = []
        while missing := self.args.rollout_batch_size - len(groups):
            self._check_replacements(self._replaced(missing), missing, self.drawn)
            drawn = flat(super().get_samples(missing))
            self.drawn += drawn
            for sample in drawn:
                episode, sample.reward = Episode.of(sample), 0.0
                with failures_go_to(episode.fail):
                    imitate(sample.metadata, episode)
                set_status(sample, tokenizer)
                groups += [] if episode.record.failure else [[sample]]
        self.end(groups)
        return groups

    def end(self, groups: Groups) -> None:
        """The rollout is complete: these groups are trained, what else it drew is lost."""
        self._mark_trained(groups, self.drawn)

    def _replaced(self, missing: int) -> int:
        """Groups of this rollout that were dropped. slime gives fewer than it is asked for, where rows are few."""
        return len(self.drawn) // self.args.n_samples_per_prompt + missing - self.args.rollout_batch_size


class AsynchronousSource(TaskSource):
    """Episodes that go on across rollouts, under slime's fully asynchronous worker.

    Nothing that was played is dropped for its age: that would train on the fastest episodes only. A rollout takes the
    oldest groups first, waits for those drawn max_staleness rollouts ago, and what is drawn ahead is bounded.

    Attributes:
        dropped: the groups of this rollout that had failed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._playing: dict[int, int] = {}  # the rollout of the draw, by group index
        self._ready: Groups = []
        self.dropped: Groups = []
        self._errors = BufferingHandler(capacity=100)
        self._errors.setLevel(logging.ERROR)
        logging.getLogger("slime.rollout.fully_async").addHandler(self._errors)

    def get_samples(self, num_samples: int) -> Groups:
        """slime's worker asks for one group after the other, until it gets none."""
        if self.under_way >= (self._max_staleness + 1) * self.args.rollout_batch_size:
            return []
        groups = super().get_samples(num_samples)
        self._playing |= {group[0].group_index: Episode.of(group[0]).record.n for group in groups}
        return groups

    def add_samples(self, groups: Groups) -> None:
        """slime's call, with groups that were aborted: nothing waits for them until they are drawn again."""
        for group in groups:
            del self._playing[group[0].group_index]
        super().add_samples(groups)

    @property
    def under_way(self) -> int:
        """Groups that were drawn and are not trained yet."""
        return len(self._playing) + len(self._ready)

    @property
    def is_complete(self) -> bool:
        """Whether a batch is ready, and no group is still played that is as old as it may get.

        Raises:
            RuntimeError: too many groups have failed.
        """
        missing = self.args.rollout_batch_size - len(self._ready)
        self._check_replacements(len(self.dropped), missing, flat(self.dropped))
        oldest = self.rollout_id - self._max_staleness
        playing = [*self._playing.values()]  # at once: the worker draws meanwhile
        return missing <= 0 and all(drawn_in > oldest for drawn_in in playing)

    def played_groups(self) -> Iterator[list[Sample]]:
        """Groups as their episodes end, until a batch is complete.

        Raises:
            RuntimeError: slime's worker has lost a group, which it says in its log alone: it would be waited for, for
                ever.
        """
        from slime.rollout.fully_async_rollout import _get_global_worker  # here: other modes do without it

        worker = _get_global_worker(self.args, self)
        while not self.is_complete:
            said = [f"{one.getMessage()} ({one.exc_info and one.exc_info[1]!r})" for one in self._errors.buffer]
            if not worker.worker_thread.is_alive():  # cancelled: slime reaps no such task
                said.append("its thread has ended")
            if said:
                raise RuntimeError(f"slime's fully asynchronous worker has lost episodes: {said[0]}")
            groups = worker.get_completed_groups()
            for _, group in groups:
                yield group
            if not groups:
                time.sleep(POLL_S)

    def add_ended(self, group: list[Sample], keep: bool) -> None:
        """A group has ended, and is trained sooner or later, or has failed."""
        del self._playing[group[0].group_index]
        (self._ready if keep else self.dropped).append(group)

    def take(self) -> tuple[Groups, Groups]:
        """The oldest groups, which are trained in this rollout, and those that failed. The next rollout begins."""
        self._ready.sort(key=lambda group: (Episode.of(group[0]).record.n, group[0].index))
        size = self.args.rollout_batch_size
        batch, self._ready, dropped, self.dropped = self._ready[:size], self._ready[size:], self.dropped, []
        self._mark_trained(batch, flat(dropped))
        self.rollout_id += 1  # of whatever the worker draws from now on
        return batch, dropped
