"""The study: its numbers, its jobs, its controls, and its page against the results in the repository."""

import fcntl
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import report, study, study_arm, study_arms, study_data, study_figures, study_report, study_results
from benchmarks.study_results import Results
from examples.tcod.curriculum import Curriculum

FIRST = Results.load(study_arms.RESULTS, study_report.FIRST.arms)
SECOND = Results.load(study_arms.RESULTS / "losses", study_report.SECOND.arms)
THIRD = Results.load(study_arms.RESULTS / "baselines", study_report.BASE_ARMS)
PARTS = {
    "curricula": (FIRST, study_arms.curriculum_jobs(), study_report.FIRST, study_figures.draw_first),
    "losses": (SECOND, study_arms.loss_jobs(), study_report.SECOND, study_figures.draw_second),
    "baselines": (THIRD, study_arms.baseline_jobs(), None, study_figures.draw_third),
}


def run(arm, seed, successes, per_update=100, start=0):
    """A result with an evaluation every 2 updates, from `start` on."""
    updates = [
        {"n": n, "student_steps": per_update, "replayed_steps": 10, "success": 0.5, "kl": kl, "trained": 32}
        for n, kl in enumerate([2.0, 4.0, 9.0, 1.0, 3.0][: 2 * len(successes) - 2 + start])
    ]
    evaluations = [
        {"n": start + 2 * i, "success": s, "success_t1": s, "kl": 9.0, "kl_by_turn": [1.0, 4.0 + i]}
        | {"kl_by_turn_episodes": [3, 1 + i]}
        for i, s in enumerate(successes)
    ]
    return {"arm": arm, "settings": {"seed": seed, "batch": 16}, "updates": updates, "evaluations": evaluations}


@pytest.mark.parametrize("values", [[0.67, 0.69, 0.71, 0.77, 0.77], [0.1, 0.5, 0.2, 0.9, 0.4], [0.5] * 5])
def test_the_interval_is_that_of_all_draws(values):
    means = np.mean(list(itertools.product(values, repeat=5)), axis=1)
    exact = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert study_results.interval(values) == pytest.approx(exact, abs=2e-3)


def test_what_is_made_of_the_results():
    runs = [run("f2b", 1, [0.1, 0.5], 45), run("opd", 1, [0.4, 0.2], start=2), run("opd", 2, [0.3, 0.3, 0.7])]
    results = Results(runs, first=["opd"])
    assert results.arms == ["opd", "f2b"] and results.common_seeds("opd", "f2b") == [1]
    # Seed 1's start, which f2b's run has, is opd's too.
    assert list(results.evaluations.loc["opd"].loc[1]["success"]) == [0.1, 0.4, 0.2]
    assert results.before("opd") == pytest.approx((0.1 + 0.3) / 2)
    assert list(results.evaluations.loc["opd"].loc[1]["steps"]) == [0, 220, 440]
    # Both after the 110 steps that f2b took.
    assert results.leads("f2b", "opd") == pytest.approx([0.5 - 0.25])
    assert list(results.updates.loc["opd"].loc[2]["token_kl"]) == [1.0, 2.0, 4.5, 0.5]
    final = results.final().loc["opd"].loc[2]
    assert (final["success"], final["doublings"], final["kl_training"]) == (0.7, 1, 4.0)
    turns = study_results.kl_by_turn(results.evaluations.loc["f2b"])
    assert list(turns["kl"]) == pytest.approx([1.0, (4.0 + 2 * 5.0) / 3]) and list(turns["episodes"]) == [6, 3]


def test_what_went_on_with_another_jobs_weights_is_shown_behind_it():
    """Three arms of the third part: OPD, reward alone behind its first two updates, and imitation."""
    opd, grpo = run("opd", 1, [0.2, 0.4, 0.6]), run("opd-then-grpo", 1, [0.8], per_update=300, start=2)
    sft = run("sft", 1, [0.5], per_update=0, start=2)
    for one, scored in ((opd, 50), (grpo, 0), (sft, 0)):
        one["settings"] |= {"lr": 0.1, "keep": 2 if one is opd else 0, "after": "opd" if one is grpo else None}
        for of in one["updates"]:
            of |= {"scored": scored, "no_signal": 8 if one is grpo else 0, "replayed_steps": 0}
            of |= {"success": None, "kl": None} if one is sft else {}
    sft["updates"][0] |= {"demonstration_steps": 90, "demonstration_tokens": 70}
    results = Results([grpo, sft, opd], study_report.BASE_ARMS)
    behind = results.evaluations.loc["opd-then-grpo"].loc[1]
    assert behind["steps"].to_dict() == {0: 0, 2: 200, 4: 800} and [*behind["teacher_tokens"]] == [0, 100, 100]
    assert [*behind["success"]] == [0.2, 0.4, 0.8]
    assert [*results.evaluations.loc["sft"].loc[1]["steps"]] == [0, 90]
    # After the 400 steps of OPD, and after the 100 tokens of the two updates that both have.
    assert results.leads("opd-then-grpo", "opd") == pytest.approx([0.4 + 0.4 / 3 - 0.6])
    assert results.leads("opd-then-grpo", "opd", "teacher_tokens") == pytest.approx([0.8 - 0.4])
    end, pairs, course = (text for _, text in study_report.baseline_tables(results))
    assert "| opd-then-grpo | 0.1 | 0.80 | 0.80 | 800 | 100 | 16 |" in end and "| sft | 0.1 | 0.50 |" in end
    assert "| opd-then-grpo - opd | +0.20 | -0.07 | +0.40 |" in pairs
    assert "| sft | 2 | 90 | 70 | 0.50 |" in course


def test_a_job_waits_for_the_one_whose_weights_it_begins_with(tmp_path):
    arm = study_arms.BASELINES["sft-then-opd"]
    job = study_arms.Job("sft-then-opd-1", "sft-then-opd", arm, 1, 1e-3, "baselines", tmp_path)
    assert job.waits and study.work_off([job], tmp_path, SimpleNamespace(check_running=list), []) == [job.name]
    (tmp_path / "sft-1.json").touch()
    assert not job.waits
    with pytest.raises(RuntimeError, match="sft-1/kept is gone: move sft-1.json away"):
        study_data.student_of(tmp_path, job)


def test_weights_are_kept_when_their_update_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(
        study_arm.Trainer, "save", lambda self, folder: (folder / "weights").write_text(str(self.saves))
    )
    trainer, folder = object.__new__(study_arm.keeping(study_arm.Trainer, 2)), tmp_path / "weights"
    folder.mkdir()
    for _ in range(4):  # before the first update, and after each of three
        trainer.save(folder)
    assert (tmp_path / study_arms.KEPT / "weights").read_text() == "2"


def test_the_result_of_a_job_is_what_its_metrics_say():
    at_1, at_04 = study_results.AT_1, study_results.AT_04
    point = {f"{at_1}kl_by_turn/{i:02d}": i / 3 for i in range(11)}
    point |= {f"{at_1}kl_by_turn_count/{i:02d}": 20 - i for i in range(11)}
    point |= {f"{at_04}success": 0.25, f"{at_1}success": 0.123456, f"{at_1}kl/trajectory": 31.23456}
    point |= {f"{at_04}turns/student": 9.5, f"{at_04}episodes": 100}
    update = {"k": 3, "success": 0.5, "kl/trajectory": 2.0, "turns/student": 2.5, "turns/replayed": 4.25}
    update |= {
        "tokens/scored": 900,
        "tokens/total": 1500,
        "note_tokens": 50.0,
        "samples": 16,
        "tokens/trained": 300,
        "failed": 0,
        "rollout_s": 1.5,
    }
    rollout = {f"rollout/tcod/{key}": value for key, value in update.items()}
    lines = [{"kind": "eval", "n": 0, **point}, {"kind": "rollout", "n": 0, **rollout}]
    lines.append({"kind": "eval", "n": 1, "train_s": 0.25, **point})
    one = study_results.result(lines, batch=16)
    [evaluation, _], [made] = one["evaluations"], one["updates"]
    assert evaluation["kl_by_turn"][10] == pytest.approx(10 / 3, rel=1e-3)
    assert evaluation["kl_by_turn_episodes"] == list(range(20, 9, -1))
    assert evaluation["success_t1"] == 0.1235 and evaluation["kl"] == 31.23
    assert (made["student_steps"], made["replayed_steps"], made["read"], made["s"]) == (40, 68, 2300, 1.75)


def test_success_within_fewer_turns_is_read_off_the_saved_episodes(tmp_path):
    def episode(won, *turns):
        return {"won": won, "turns": [{"observation": seen, "action": action} for seen, action in turns]}

    seen = ("On the desk 1, you see a pen 1.", "take pen 1 from desk 1")
    walk = [("Nothing.", "look")]
    episodes = [episode(True, seen, *walk * 7), episode(True, *walk * 11, seen), episode(False, *walk * 20)]
    episodes.append(episode(True, ("Find a pen.", "take pen 1 from desk 1"), seen))
    (tmp_path / "eval_heldout_000030.jsonl").write_text("".join(json.dumps(one) + "\n" for one in episodes))
    one = {"evaluations": [{"n": 30, "episodes": 4}]}
    study_results.add_episodes(one, tmp_path)
    [point] = one["evaluations"]
    assert point["within"] == {8: 0.5, 12: 0.75, 20: 0.75} and point["turns_won"] == pytest.approx(22 / 3)
    assert point["blind"] == 0.25
    with pytest.raises(RuntimeError, match="4 of 5 episodes were saved"):
        study_results.add_episodes({"evaluations": [{"n": 30, "episodes": 5}]}, tmp_path)


def test_the_tables_of_what_the_teacher_sees(tmp_path):
    """Two arms and two seeds; the start of a seed is one arm's."""

    def noted(arm, seed, won, start):
        one = run(arm, seed, [0.1, won], start=start)
        for point, within in zip(one["evaluations"], (0.1, won), strict=True):
            point |= {"within": {"8": within / 2, "12": within, "20": within}, "turns_won": 9.0, "blind": 0.25}
        for of in one["updates"]:
            of |= {"scored": 10, "read": 500}
        one["evaluations"] = one["evaluations"][start:]
        return json.loads(json.dumps(one))

    runs = [noted("another-demo", seed, won, 1) for seed, won in ((1, 0.2), (2, 0.3))]
    results = Results([*runs, *(noted("demo", seed, 0.6, 0) for seed in (1, 2))], study_report.NOTE_ARMS)
    end, pairs = (text for _, text in study_report.note_tables(results))
    assert "| before | 0.05 (0.05 to 0.05) | 0.10 (0.10 to 0.10) |" in end
    assert "| demo | 0.30 (0.30 to 0.30) | 0.60 (0.60 to 0.60) | 0.60 (0.60 to 0.60) | 0.60, 0.60 | 9.0 |" in end
    assert "| 9.0 | 0.25 | 220 | 1,000 |" in end
    assert (
        "| demo - another-demo | +0.17 (+0.15 to +0.20) | +0.35 (+0.30 to +0.40) | +0.35 (+0.30 to +0.40) |" in pairs
    )
    study_figures.draw_fourth(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("results, jobs, part, draw", PARTS.values(), ids=PARTS)
def test_the_results_in_the_repository_are_of_the_studys_settings_and_on_its_page(results, jobs, part, draw, tmp_path):
    by_name = {(job.arm_name, job.seed): job for job in jobs}
    assert all(by_name[key].done() for key in results.jobs)
    assert results is not FIRST or results.jobs.keys() == by_name.keys()
    assert {name for pair in (part.pairs if part else study_report.BASE_PAIRS) for name in pair} <= set(results.arms)
    page = (study_arms.RESULTS.parents[1] / "STUDY.md").read_text()
    tables = study_report.tables(results, part) if part else study_report.baseline_tables(results)
    for title, text in tables:
        assert f"**{title}**\n\n{text}" in page
    draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_finished_job_is_not_repeated_and_one_of_other_settings_is_refused(tmp_path, monkeypatch):
    about = {"name": "opd-1", "arm_name": "opd", "arm": study_arms.MAIN["opd"], "seed": 1, "games": "report"}
    job = study_arms.Job(rate=1e-4, folder=tmp_path, **about)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another study runs in"):
            study.run_jobs([job], tmp_path, parallel=1)
    report.save(job.path, {"settings": job.settings, "rows": [{"n": 0, "kl": [1.5, 2]}, {"n": 1}]})
    assert len(job.path.read_text().splitlines()) == 7 and json.loads(job.path.read_text())["rows"][1] == {"n": 1}
    assert job.done()
    study.run_jobs([job], tmp_path, parallel=1)  # starts nothing
    with pytest.raises(SystemExit, match="made with other settings"):
        study_arms.Job(rate=2e-4, folder=tmp_path, **about).done()
    monkeypatch.setattr("sys.argv", ["study", "--only", "opd-1", "opd-9"])
    with pytest.raises(SystemExit, match="no such job: opd-9; jobs are opd-1, "):
        study.main()


def test_shuffling_keeps_the_teachers_numbers_and_the_untrained_tokens():
    rng = random.Random(0)
    masks = [[1, 0, 1, 1, 0, 1], [1, 1, 0, 1]]
    batch = {"loss_masks": masks, "teacher_log_probs": [[rng.random() for _ in mask] for mask in masks]}
    trainer = object.__new__(study_arm.ShuffledTrainer)
    trainer._rng = random.Random(1)
    flat = np.concatenate(masks) == 1
    before, after = (np.concatenate(rows) for rows in (batch["teacher_log_probs"], trainer.shuffled(batch)))
    assert list(after[~flat]) == list(before[~flat]) and list(after[flat]) != list(before[flat])
    assert sorted(after) == sorted(before)


def test_a_random_order_has_the_depths_of_the_schedule():
    schedule, asked = Curriculum("f2b", 20, eta=2), set()
    depth = study_arm.in_random_order(Curriculum.depth, 30, 1, asked)
    depths = [depth(schedule, n) for n in range(31)]
    planned = [schedule.depth(n) for n in range(31)]
    assert depths[:30] != planned[:30] and sorted(depths[:30]) == planned[:30] and depths[30] == planned[30]
    assert asked == set(range(31))
