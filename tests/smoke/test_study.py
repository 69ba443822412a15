"""The study: its statistics, its jobs, its controls, and its page against the results in the repository."""

import fcntl
import itertools
import json
import math
import random
from statistics import fmean

import pytest

from benchmarks import report, study, study_arm, study_losses, study_pages, study_report
from examples.tcod.curriculum import Curriculum

NUM_GPUS = 0
RESULTS = study_report.load(study.RESULTS)
LOSSES = study_report.load(study.RESULTS / "losses")
SECTIONS = study_pages.sections(study.RESULTS)


def run(seed, finals, per_update=100, arm="opd"):
    """A result with an evaluation every 2 updates, whose successes are `finals`."""
    updates = [
        {"n": n, "student_steps": per_update, "replayed_steps": 10, "scored": 50, "trained": 20, "failed": 0, "s": 3.0}
        for n in range(2 * len(finals) - 2)
    ]
    evaluations = [
        {
            "n": 2 * i,
            "success": s,
            "success_t1": s,
            "kl": 10.0 - i,
            "kl_by_turn": [i, 2.0],
            "kl_by_turn_episodes": [4, 2],
        }
        for i, s in enumerate(finals)
    ]
    about = {"arm": arm, "settings": {"seed": seed, "lr": 1e-3}, "commit": "c", "machine": "m", "slime": "slime"}
    return {**about, "updates": updates, "evaluations": evaluations}


def test_the_interval_counts_every_draw():
    rng = random.Random(1)
    for n in (1, 2, 3, 5):
        values = [rng.gauss(3.0, 2.0) for _ in range(n)]
        means = sorted(fmean(draw) for draw in itertools.product(values, repeat=n))
        cut = math.ceil(0.025 * len(means)) - 1
        assert study_report.bootstrap(values) == pytest.approx((means[cut], means[-1 - cut]))
    assert study_report.bootstrap([0.5, 0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="11 values have too many draws"):
        study_report.bootstrap([0.0] * 11)


def test_an_evaluation_before_the_first_update_is_that_of_all_runs_of_a_seed():
    whole, later = run(1, [0.1, 0.2]), run(1, [0.3, 0.4])
    later["evaluations"] = later["evaluations"][1:]
    arms = study_report.with_starts({"opd-token": {1: whole}, "opd-turn": {1: later}})
    assert [point["success"] for point in arms["opd-turn"][1]["evaluations"]] == [0.1, 0.4]
    assert [point["success"] for point in arms["opd-token"][1]["evaluations"]] == [0.1, 0.2]


def test_differences_are_taken_within_a_seed():
    opd = {1: run(1, [0.1, 0.2]), 2: run(2, [0.1, 0.8]), 3: run(3, [0.1, 0.5])}
    f2b = {1: run(1, [0.1, 0.3]), 2: run(2, [0.1, 0.9])}
    assert study_report.paired(f2b, opd, study_report.final("success")) == pytest.approx([0.1, 0.1])


def test_success_at_equal_steps_is_interpolated():
    opd = run(1, [0.0, 0.4, 0.2])
    assert study_report.steps(opd) == {0: 0, 2: 220, 4: 440}
    assert [study_report.success_at_steps(opd, x) for x in (0, 110, 220, 330, 440, 999)] == pytest.approx(
        [0.0, 0.2, 0.4, 0.3, 0.2, 0.2]
    )
    cheap = run(1, [0.0, 0.1, 0.5], per_update=45)
    assert study_report.lead_at_equal_steps({1: cheap}, {1: opd}) == pytest.approx([0.1])
    assert study_report.lead_at_equal_steps({1: opd}, {1: cheap}) == pytest.approx([-0.1])


def test_a_target_is_reached_by_the_mean_over_seeds():
    runs = {1: run(1, [0.1, 0.9, 0.5]), 2: run(2, [0.1, 0.1, 0.7])}
    assert study_report.reached(runs, 0.5) == 2
    assert study_report.reached(runs, 0.55) == 4
    assert study_report.reached(runs, 0.65) is None


def test_kl_by_turn_weighs_episodes():
    evaluations = [{"kl_by_turn": [1.0, 4.0], "kl_by_turn_episodes": [9, 1]}]
    evaluations.append({"kl_by_turn": [2.0], "kl_by_turn_episodes": [1]})
    assert study_report.kl_by_turn(evaluations) == {1: (pytest.approx(1.1), 10), 2: (4.0, 1)}


def test_the_result_of_a_job_is_what_its_metrics_say():
    point = {f"{study_report.AT_1}kl_by_turn/{i:02d}": i / 3 for i in range(11)}
    point |= {f"{study_report.AT_1}kl_by_turn_count/{i:02d}": 20 - i for i in range(11)}
    point |= {"eval/tcod/heldout/success": 0.25, "eval/tcod/heldout_t1/success": 0.123456}
    point |= {"eval/tcod/heldout/turns/student": 9.5, "eval/tcod/heldout/episodes": 100}
    point |= {"eval/tcod/heldout_t1/kl/trajectory": 31.23456}
    update = {"k": 3, "success": 0.5, "kl/trajectory": 2.0, "turns/student": 2.5, "turns/replayed": 4.25}
    update |= {"tokens/scored": 900, "tokens/trained": 300, "failed": 0, "rollout_s": 1.5}
    lines = [
        {"kind": "eval", "n": 0, **point},
        {
            "kind": "rollout",
            "n": 0,
            **{f"rollout/tcod/{key}": value for key, value in update.items()},
            "train/s": 0.25,
        },
    ]
    one = study_report.result(lines, batch=16)
    [evaluation], [made] = one["evaluations"], one["updates"]
    assert evaluation["kl_by_turn"][10] == pytest.approx(10 / 3, rel=1e-3)
    assert evaluation["kl_by_turn_episodes"] == list(range(20, 9, -1))
    assert evaluation["success_t1"] == 0.1235 and evaluation["kl"] == 31.23
    assert (made["student_steps"], made["replayed_steps"], made["s"]) == (40, 68, 1.75)


def test_the_arms_differ_in_the_curriculum_only():
    jobs = {job.name: job.settings for job in study.study_jobs()}
    own = {"tcod_variant", "tcod_k_start", "tcod_eta", "lr"}
    for seed in study.SEEDS:
        kept = [{key: value for key, value in jobs[f"{arm}-{seed}"].items() if key not in own} for arm in study.MAIN]
        assert kept[0] == kept[1] == kept[2]
    assert {job.seed for job in study.tuning_jobs()}.isdisjoint(study.SEEDS)
    names = [job.name for job in study.study_jobs() + study.tuning_jobs()]
    assert len(set(names)) == len(names)


def test_the_report_knows_the_studys_arms():
    arms = {job.arm_name for job in study.study_jobs()}
    assert set(study_report.CHECKS) == study.CHECKS.keys() and set(study_report.MAIN) == study.MAIN.keys()
    assert set(study_report.EQUAL_RATE) == study.EQUAL_RATE.keys()
    assert {name for pair in study_report.PAIRS for name in pair} == arms - study.CHECKS.keys()


def test_a_finished_job_is_not_repeated_and_one_of_other_settings_is_refused(tmp_path):
    about = {"name": "opd-1", "arm_name": "opd", "arm": study.MAIN["opd"], "seed": 1, "games": "report"}
    job = study.Job(rate=1e-4, folder=tmp_path, **about)
    assert not job.done()
    report.save(job.path, {"settings": job.settings})
    assert job.done()
    study.run_jobs([job], tmp_path, parallel=1)  # starts nothing
    with pytest.raises(SystemExit, match="made with other settings"):
        study.Job(rate=2e-4, folder=tmp_path, **about).done()


def test_two_studies_at_once_and_unknown_jobs_are_refused(tmp_path, monkeypatch):
    job = study.Job("opd-1", "opd", study.MAIN["opd"], seed=1, rate=1e-4, games="report", folder=tmp_path / "results")
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another study runs in"):
            study.run_jobs([job], tmp_path, parallel=1)
    monkeypatch.setattr("sys.argv", ["study", "--only", "opd-1", "opd-9"])
    with pytest.raises(SystemExit, match="no such job: opd-9; jobs are opd-1, "):
        study.main()


def test_a_result_is_written_with_a_line_per_item(tmp_path):
    value = {"a": 1, "rows": [{"n": 0, "kl": [1.5, 2]}, {"n": 1}], "none": []}
    report.save(tmp_path / "new" / "x.json", value)
    text = (tmp_path / "new" / "x.json").read_text()
    assert json.loads(text) == value and len(text.splitlines()) == 8


def test_shuffling_keeps_the_teachers_numbers_and_the_untrained_tokens():
    rng = random.Random(0)
    masks = [[1, 0, 1, 1, 0, 1], [1, 1, 0, 1]]
    batch = {"loss_masks": masks, "teacher_log_probs": [[rng.random() for _ in mask] for mask in masks]}
    trainer = object.__new__(study_arm.ShuffledTrainer)
    trainer._rng = random.Random(1)
    before, after = batch["teacher_log_probs"], trainer.shuffled(batch)

    def values(rows, wanted):
        return [
            v for row, mask in zip(rows, masks, strict=True) for v, m in zip(row, mask, strict=True) if m == wanted
        ]

    assert values(after, 0) == values(before, 0)
    assert values(after, 1) != values(before, 1) and sorted(values(after, 1)) == sorted(values(before, 1))


def test_the_random_horizon_is_the_schedule_in_another_order():
    curriculum = Curriculum("f2b", horizon=20, eta=2)
    schedule = [curriculum.depth(n) for n in range(49)]
    orders = {}
    for seed in (1, 2):
        depth = study_arm.in_random_order(Curriculum.depth, 48, seed)
        orders[seed] = [depth(curriculum, n) for n in range(49)]
        assert sorted(orders[seed]) == schedule and orders[seed][48] == 20
    assert schedule != orders[1] != orders[2] != schedule


def test_the_tables_and_the_figure_are_made_of_the_results(tmp_path):
    arms = {
        name: {seed: run(seed, [0.1, 0.2 + seed / 10], arm=name) for seed in (1, 2)}
        for name in (*study_report.MAIN, "opd-batch-11", *study_report.CHECKS)
    }
    results = study_report.text(arms)
    assert "| f2b - opd | 0 of 2 | +0.00 (+0.00 to +0.00) |" in results
    assert "| opd | 0.001 | 2 | 0.10 | 0.35 (0.30 to 0.40) | 0.071 |" in results
    assert "| all | 0 | 0.00 (24) |" in results
    assert "| f2b | 2 | 220 | 0.35 | 9.0 |" in results
    assert "**Not run yet**: opd-f2b-rate, b2f-f2b-rate, fixed-horizon-10, " in results
    study_report.draw(arms, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_section_is_what_lies_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- x: written by `study --report` -->\nold\n<!-- end of x -->\nAfter.\n")
    head, section, tail = study_pages.split(page, "x")
    assert section == "old\n" and head + section + tail == page.read_text()
    with pytest.raises(ValueError, match="has no section between <!-- y: written"):
        study_pages.split(page, "y")


def test_paragraphs_and_bullets_are_filled():
    words = " ".join(["word"] * 30)
    text = study_pages.filled(f"One\ntwo.\n\n- {words}\n- three\n  four\n\nLast.")
    assert text.startswith("One two.\n\n- word") and text.endswith(
        "\n  word word word word word word word\n- three four\n\nLast.\n"
    )


def test_the_results_in_the_repository_are_of_the_studys_settings():
    jobs = study.study_jobs() + study.tuning_jobs()
    for folder in (study.RESULTS, study.RESULTS / "tuning"):
        here = sorted(path.stem for path in folder.glob("*.json"))
        assert here == sorted(job.name for job in jobs if job.folder == folder)
    assert all(job.done() for job in jobs)
    results = [result for runs in RESULTS.values() for result in runs.values()]
    assert all(one["episodes"] == study.HELDOUT_GAMES for result in results for one in result["evaluations"])
    for result in results:
        points = [one["n"] for one in result["evaluations"]]
        assert points[0] == 0 and points[-1] == len(result["updates"]) == result["settings"]["updates"]


@pytest.mark.parametrize(("page", "name"), SECTIONS)
def test_the_pages_show_what_the_results_in_the_repository_give(page, name):
    assert study_pages.split(page, name)[1] == SECTIONS[page, name]


def test_what_the_findings_of_the_first_part_say_without_a_figure_holds():
    def first_and_last(arm, metric):
        return [(one["evaluations"][0][metric], one["evaluations"][-1][metric]) for one in RESULTS[arm].values()]

    assert all(after > before for before, after in first_and_last("opd", "success"))
    assert all(after < before for before, after in first_and_last("opd", "kl"))
    tuning = [json.loads(path.read_text())["evaluations"] for path in (study.RESULTS / "tuning").glob("opd-*.json")]
    assert len(tuning) == len(study.TUNING_RATES) and all(points[-1]["kl"] < points[0]["kl"] for points in tuning)
    assert study_pages.mean(RESULTS["f2b"], "success", 12) < study_pages.mean(RESULTS["f2b"], "success", 0)
    for base in ("opd-batch-11", "fixed-horizon-10", "random-horizon"):
        values = study_report.paired(RESULTS["f2b"], RESULTS[base], study_report.final("success"))
        assert len(values) == 3 and min(values) < 0 < max(values)
    assert all(len(RESULTS[arm]) == 5 for arm in (*study_report.MAIN, *study_report.EQUAL_RATE))


def test_the_page_shows_the_tuning_and_the_pilot():
    page = study_pages.STUDY.read_text()
    assert study_report.tuning_table(study.RESULTS / "tuning") in page


def test_the_second_parts_results_are_of_its_settings():
    jobs = {job.path: job for job in study.loss_jobs() + study.pilot_jobs()}
    there = [path for name in ("losses", "pilot") for path in (study.RESULTS / name).glob("*.json")]
    assert there and all(jobs[path].done() for path in there)
    assert all(job.done() for job in study.pilot_jobs())


def test_the_second_parts_arms_differ_in_loss_and_curriculum_only():
    own = {"tcod_variant", "tcod_k_start", "tcod_eta", "loss"}
    kept = [
        {key: value for key, value in job.settings.items() if key not in own}
        for job in study.loss_jobs()
        if job.arm_name in study.LOSS_GRID and job.seed == 1
    ]
    assert len(kept) == 9 and all(settings == kept[0] for settings in kept)
    assert study.PILOT_SEED not in study.SEEDS and kept[0]["games"] != study.pilot_jobs()[0].games


def test_what_the_findings_of_the_second_part_say_without_a_figure_holds():
    def end(arm, metric):
        return [one["evaluations"][-1][metric] for one in LOSSES[arm].values()]

    for one in LOSSES["opd-token-calm"].values():
        first, *_, last = one["evaluations"]
        assert first["n"] > 0 or (last["kl"] < first["kl"] and last["success"] > first["success"])
    for one in LOSSES["opd-token"].values():
        assert one["evaluations"][-1]["kl"] < one["evaluations"][0]["kl"] / 2

    def ahead(arm, base):
        return study_report.paired(LOSSES[arm], LOSSES[base], study_report.final("success"))

    curricula = [
        abs(fmean(ahead(f"{arm}-token{rate}", f"opd-token{rate}"))) for arm in ("f2b", "b2f") for rate in ("", "-calm")
    ]
    for arm in study_report.MAIN:
        gains = ahead(f"{arm}-token-calm", f"{arm}-token")
        assert min(gains) > 0 and fmean(gains) > max(curricula)
    assert max(one["updates"][-1]["k"] for one in LOSSES["f2b-kl-token"].values()) < study.LONG_HORIZON
    assert max(end("reopd-token-calm", "success")) < min(end("opd-token-calm", "success"))


def test_the_kl_doubles_where_it_more_than_doubles():
    updates = [{"kl": kl, "trained": 32} for kl in (2.0, 4.0, 9.0, 1.0, 3.0)]
    one = {"settings": {"batch": 16}, "updates": updates}
    assert study_losses.token_kl(one) == [1.0, 2.0, 4.5, 0.5, 1.5]
    assert study_losses.doublings(one) == 2


def test_the_teacher_as_its_own_student_has_no_kl():
    for one in RESULTS["teacher"].values():
        assert abs(one["evaluations"][0]["kl"]) < 0.01


def test_nothing_is_learned_from_shuffled_scores():
    for one in RESULTS["shuffled"].values():
        assert one["evaluations"][-1]["success"] <= one["evaluations"][0]["success"] + 0.05
