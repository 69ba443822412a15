"""What was drawn and not trained survives a resume of the asynchronous modes, through slime's own data source."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.tcod import ConfigError, tcod_rollout
from examples.tcod.episode.episode import Episode
from examples.tcod.settings.run import begin_rollout, run_of
from examples.tcod.training import task_source
from examples.tcod.training.task_source import AsynchronousSource, SynchronousSource
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.types import Sample

BATCH = 2


@pytest.fixture
def source(rig, tmp_path):
    """source(saved=n) -> slime's data source of forty tasks, as it was saved with the checkpoint of rollout n."""

    def make(saved=None):
        rows = [{"goal": 1 + i} for i in range(40)]
        args = rig.args(rows, rollout_batch_size=BATCH, n_samples_per_prompt=2, save=str(tmp_path), load=str(tmp_path))
        made = RolloutDataSourceWithBuffer(args)
        if saved is not None:
            made.load(saved)
        return made

    return make


def draw(kind, source, rollout_id):
    drawn = kind(source.args, source, lambda row, n: n + 1, max_replacements=4, max_staleness=2, rollout_id=rollout_id)
    drawn.begin(rollout_id)
    return drawn


def tasks(groups):
    return [group[0].metadata["goal"] for group in groups]


def finish(groups):
    """As slime leaves groups that were played."""
    for group in groups:
        for sample in group:
            sample.status, sample.tokens = Sample.Status.COMPLETED, [1, 2]
            sample.weight_versions.append("7")
    return groups


def test_a_synchronous_run_resumes_behind_what_it_trained(source):
    before = source()
    drawn = draw(SynchronousSource, before, 0)
    drawn.end(finish(drawn.get_samples(BATCH)))
    before.save(0)
    assert tasks(draw(SynchronousSource, source(0), 1).get_samples(BATCH)) == [3, 4]


def test_the_batch_that_was_drawn_ahead_comes_first_after_a_resume(source):
    """slime's train_async.py saves rollout 0 after rollout 1 was played."""
    before = source()
    drawn = draw(SynchronousSource, before, 0)
    drawn.end(finish(drawn.get_samples(BATCH)))
    drawn.begin(1)
    drawn.end(finish(drawn.get_samples(BATCH)))
    before.save(0)
    resumed = draw(SynchronousSource, source(0), 1)
    groups = resumed.get_samples(BATCH)
    assert tasks(groups) == [3, 4] and [[sample.index for sample in group] for group in groups] == [[4, 5], [6, 7]]
    for sample in (sample for group in groups for sample in group):  # as they were drawn
        record = Episode.of(sample).record
        assert (record.n, record.k) == (1, 2)
        assert (sample.status, sample.tokens, sample.weight_versions) == (Sample.Status.PENDING, [], [])
    resumed.end(finish(groups))
    resumed.begin(2)
    assert tasks(resumed.get_samples(BATCH)) == [5, 6]


def test_a_killed_run_goes_on_where_it_was(rig, tmp_path):
    """What is left of a process is the checkpoint behind its last rollout but one: the last one is played again."""
    rows = [{"goal": goal} for goal in range(5, 15)]

    def play(folder, *rollouts):
        """(k, tasks) of each, in a process of its own."""
        changes = {"rollout_batch_size": 4, "rollout_shuffle": True, "save": folder, "load": folder}
        args = rig.args(rows, **changes, tcod_variant="f2b", tcod_eta=2)
        data, played = RolloutDataSourceWithBuffer(args), []
        data.load(rollouts[0] - 1)
        for n in rollouts:
            output = tcod_rollout.generate_rollout(args, n, data)
            played.append((output.metrics["rollout/tcod/k"], tasks(output.samples)))
            if n != rollouts[-1]:
                data.save(n)
        return played

    whole = play(tmp_path / "whole", *range(6))
    assert [k for k, _ in whole] == [1, 1, 2, 2, 3, 3]
    drawn = [goal for _, goals in whole for goal in goals]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == [row["goal"] for row in rows]
    assert play(tmp_path / "killed", *range(4)) == whole[:4] and play(tmp_path / "killed", 3, 4, 5) == whole[3:]


def test_what_is_left_over_is_not_lost_by_a_second_checkpoint(source):
    before = source()
    drawn = draw(AsynchronousSource, before, 0)
    for _ in range(6):
        drawn.get_samples(1)
    before.save(0)
    resumed = source(0)
    drawn = draw(SynchronousSource, resumed, 1)
    drawn.end(finish(drawn.get_samples(BATCH)))
    resumed.save(1)
    again = draw(SynchronousSource, source(1), 2)
    assert [tasks(again.get_samples(1)) for _ in range(5)] == [[3], [4], [5], [6], [7]]


def test_fully_asynchronous_draws_are_all_trained_once(source):
    """Killed after any rollout: what played, what was ready and what is drawn later are trained, each once."""
    trained, current, n = Counter(), source(), 0
    drawn = draw(AsynchronousSource, current, n)
    playing = []
    while trained.total() < 10:
        playing += [group for _ in range(3) for group in drawn.get_samples(1)]
        while not drawn.is_complete:
            drawn.add_ended(playing.pop(), keep=True)  # the newest one ends first
        batch, dropped = drawn.take()
        trained.update(tasks(finish(batch)))
        assert dropped == []
        current.save(n)
        n += 1
        if n in (1, 3):
            current, playing = source(n - 1), []
            drawn = draw(AsynchronousSource, current, n)
    kept = current.get_metadata()[task_source.KEY].values()
    under_way = [one["samples"][0]["metadata"]["goal"] for one in kept if one["trained_in"] is None]
    assert sorted([*trained.elements(), *under_way]) == list(range(1, trained.total() + len(under_way) + 1))
    assert drawn.under_way == len(under_way) > 0  # what rollout/tcod/under_way counts


def test_a_rollout_waits_for_what_was_drawn_two_before_it_and_draws_no_further_ahead(source):
    drawn = draw(AsynchronousSource, source(), 0)

    def draw_all():
        return [group for _ in range(9) for group in drawn.get_samples(1)]

    oldest, *quick = draw_all()
    assert len(quick) == 3 * BATCH - 1
    for trained in ([2, 3], [4, 5]):
        for group in quick:
            drawn.add_ended(group, keep=True)
        assert drawn.is_complete and tasks(drawn.take()[0]) == trained
        quick = draw_all()
        assert len(quick) == BATCH
    for group in quick:
        drawn.add_ended(group, keep=True)
    assert not drawn.is_complete
    drawn.add_ended(oldest, keep=True)
    assert drawn.is_complete and tasks(drawn.take()[0]) == [1, 6]


def test_failed_groups_are_done_with_and_aborted_ones_are_drawn_again(source):
    current = source()
    drawn = draw(AsynchronousSource, current, 0)
    first, second, *others = [group for _ in range(9) for group in drawn.get_samples(1)]
    assert len(others) == 3 * BATCH - 2  # as many as may be under way
    drawn.add_samples(finish([second]))
    [again] = drawn.get_samples(1)
    assert tasks([again]) == [2] and again[0].tokens == [] and again[0].status == Sample.Status.PENDING
    drawn.add_ended(first, keep=False)
    for group in (again, *others):
        drawn.add_ended(group, keep=True)
    assert drawn.is_complete and tasks(drawn.take()[0]) == [2, 3]
    current.save(0)
    assert tasks(draw(AsynchronousSource, source(0), 1).get_samples(2)) == [4, 5]


def test_groups_of_another_size_are_refused_after_a_resume(source):
    before = source()
    draw(AsynchronousSource, before, 0).get_samples(1)
    before.save(0)
    resumed = source(0)
    resumed.args.n_samples_per_prompt = 4
    with pytest.raises(ConfigError, match="SAMPLES_PER_TASK. is 4, and the tasks that were drawn .* have 2 samples"):
        draw(AsynchronousSource, resumed, 1)


def test_no_checkpoint_is_written_between_a_draw_and_its_note(source):
    current, held = source(), []

    def is_free():
        free = drawn._lock.acquire(blocking=False)
        return free and drawn._lock.release() is None

    def looking(call):
        def look(*args):
            with ThreadPoolExecutor(1) as another_thread:
                held.append(not another_thread.submit(is_free).result())
            return call(*args)

        return look

    current.get_samples, current.save = looking(current.get_samples), looking(current.save)
    drawn = draw(AsynchronousSource, current, 0)
    drawn.get_samples(1)
    current.save(0)
    assert held == [True, True]


def test_slimes_worker_draws_while_a_batch_is_waited_for(source):
    drawn = draw(AsynchronousSource, source(), 0)

    class Meanwhile(int):
        def __gt__(self, other):
            drawn.get_samples(1)
            return int(self) > other

    for group in [group for _ in range(BATCH) for group in drawn.get_samples(1)]:
        drawn.add_ended(group, keep=True)
    drawn.rollout_id = Meanwhile(0)
    drawn.get_samples(1)
    assert drawn.is_complete and drawn.under_way == BATCH + 2


def test_a_draw_is_of_one_rollout_if_the_next_one_begins_meanwhile(source):
    drawn = draw(AsynchronousSource, source(), 0)

    def depth(*row_and_rollout):
        drawn.rollout_id += 1
        return row_and_rollout[-1] + 1

    drawn._depth = depth
    [group] = drawn.get_samples(1)
    assert {(Episode.of(one).record.n, Episode.of(one).record.k) for one in group} == {(0, 1)}
    assert [*drawn._playing.values()] == [0]


def test_a_source_without_metadata_is_drawn_from_all_the_same(source):
    class Bare:
        def __init__(self, real):
            self.args, self.get_samples = real.args, real.get_samples

    drawn = draw(SynchronousSource, Bare(source()), 0)
    drawn.end(drawn.get_samples(BATCH))
    drawn.begin(1)
    assert tasks(drawn.get_samples(BATCH)) == [3, 4]


def test_one_source_for_a_run(source):
    current = source()
    run = run_of(current.args)
    one = begin_rollout(SynchronousSource, run, current, 0)
    assert begin_rollout(SynchronousSource, run, current, 1) is one and one.rollout_id == 1
    assert begin_rollout(SynchronousSource, run, source(), 1) is not one
