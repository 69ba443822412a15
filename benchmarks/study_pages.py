"""The pages of the study: what `study --report` writes into STUDY.md and the README, between marks.

Tables come from study_report.py and study_losses.py. The findings in words are here, and every figure in them is taken
from the results: a test compares the pages with what this gives.
"""

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

from benchmarks import study_losses, study_report
from benchmarks.study_report import (
    CHECKS,
    EQUAL_RATE,
    MAIN,
    STEPS,
    Arms,
    Result,
    bootstrap,
    final,
    kl_by_turn,
    lead_at_equal_steps,
    paired,
    spent,
)

STUDY = Path(__file__).resolve().parent / "STUDY.md"
README = STUDY.parents[1] / "README.md"

Runs = dict[int, Result]  # of one arm, by seed
FEW = (1, 2, 3)  # the seeds of the arms that have three
WIDTH = 120


def write_all(results: Path) -> None:
    """Write all sections into their pages and draw the figures, from the results below a folder."""
    first, second = study_report.load(results), study_report.load(results / "losses")
    for (page, name), text in sections(results).items():
        head, _, tail = split(page, name)
        page.write_text(head + text + tail)
    study_report.draw(first, study_report.FIGURE)
    study_losses.draw(second, study_losses.FIGURE)


def sections(results: Path) -> dict[tuple[Path, str], str]:
    """{(page, name of the section): its Markdown}, from the results below a folder."""
    first, second, pilot = (study_report.load(results / name) for name in (".", "losses", "pilot"))
    seed_1 = {name: of(runs, [1]) for name, runs in second.items() if 1 in runs}  # what the words are about
    return {
        (STUDY, "findings"): curricula(first),
        (STUDY, "results"): study_report.text(first),
        (STUDY, "tuning"): study_report.tuning_table(results / "tuning"),
        (STUDY, "findings of the losses"): losses(seed_1, pilot),
        (STUDY, "results of the losses"): study_losses.text(second),
        (STUDY, "pilot"): study_losses.end_table(pilot),
        (README, "study"): readme_curricula(first) + "\n" + readme_losses(seed_1),
    }


def split(page: Path, name: str) -> tuple[str, str, str]:
    """A page: up to the section and its first mark, the section, the rest. Raises ValueError without the marks."""
    begin, end = f"<!-- {name}: written by `study --report` -->\n", f"<!-- end of {name} -->"
    head, mark, rest = page.read_text().partition(begin)
    section, closing, tail = rest.partition(end)
    if not (mark and closing):
        raise ValueError(f"{page} has no section between {begin.strip()} and {end}")
    return head + begin, section, end + tail


def filled(text: str) -> str:
    """Paragraphs and bullets, one after an empty line or a dash, in lines of one length."""
    blocks = [block.strip() for block in text.strip().replace("\n- ", "\n\n- ").split("\n\n")]
    lines = [
        textwrap.fill(
            " ".join(block.split()),
            WIDTH,
            subsequent_indent="  " if block.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for block in blocks
        if block
    ]
    return "".join(
        f"{'' if i == 0 or line.startswith('- ') and lines[i - 1].startswith('- ') else chr(10)}{line}\n"
        for i, line in enumerate(lines)
    )


# ---------------------------------------------------------------------------------------------- figures as text


def mean(runs: Runs, metric: str, updates: int | None = None) -> float:
    """Over seeds, in held-out games: at the end, or after so many updates."""
    if updates is None:
        return fmean(final(metric)(one) for one in runs.values())
    return fmean(point[metric] for one in runs.values() for point in one["evaluations"] if point["n"] == updates)


def deviation(runs: Runs) -> str:
    """Of the final success over seeds."""
    return f"{stdev(final('success')(one) for one in runs.values()):.3f}"


def total(runs: Runs, *names: str) -> float:
    """What a whole run took, a mean over seeds; the names as in study_report.spent."""
    return fmean(list(spent(one, *names).values())[-1] for one in runs.values())


def saved(runs: Runs, base: Runs, *names: str) -> str:
    return f"{1 - total(runs, *names) / total(base, *names):.0%}"


def turn_kl(runs: Runs, turn: int) -> str:
    """At the end, in nats."""
    return f"{kl_by_turn([one['evaluations'][-1] for one in runs.values()])[turn][0]:.1f}"


def spread(values: Sequence[float], form: str = "+.2f") -> str:
    """The interval of five seeds, the range of fewer."""
    low, high = bootstrap(values) if len(values) >= 5 else (min(values), max(values))
    return f"[{low:{form}}, {high:{form}}]"


def difference(runs: Runs, base: Runs, metric: str = "success", form: str = "+.2f") -> str:
    values = paired(runs, base, final(metric))
    return f"{fmean(values):{form}} {spread(values, form)}"


def lead(runs: Runs, base: Runs) -> str:
    values = lead_at_equal_steps(runs, base)
    return f"{fmean(values):+.2f} {spread(values)}"


def behind(runs: Runs, base: Runs) -> str:
    """In how many seeds success ends below the base's."""
    values = paired(runs, base, final("success"))
    return f"{sum(value < 0 for value in values)} of {len(values)}"


def largest_rise(runs: Runs) -> tuple[float, float, float]:
    """Of the KL between two evaluations of one seed: from, to, and where that seed ended."""
    return max(
        (
            (before["kl"], after["kl"], final("kl")(one))
            for one in runs.values()
            for before, after in pairwise(one["evaluations"])
        ),
        key=lambda rise: rise[1] - rise[0],
    )


def each(arms: Sequence[Runs], metric: str, form: str) -> str:
    texts = [f"{mean(runs, metric):{form}}" for runs in arms]
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def of(runs: Runs, seeds: Sequence[int]) -> Runs:
    return {seed: runs[seed] for seed in seeds}


def start_success(arms: Arms, seeds: Sequence[int]) -> float:
    """Before the first update: a seed's runs start from one checkpoint."""
    runs = [arms[name] for name in arms if name not in CHECKS]
    return fmean(fmean(one[seed]["evaluations"][0]["success"] for one in runs if seed in one) for seed in seeds)


# ------------------------------------------------------------------------------------------------ the first part


def curricula(arms: Arms) -> str:
    opd, f2b, b2f = (arms[name] for name in MAIN)
    opd_rate, b2f_rate = (arms[name] for name in EQUAL_RATE)
    batch_11, fixed, shuffled = (arms[name] for name in ("opd-batch-11", "fixed-horizon-10", "random-horizon"))
    few_f2b, few_b2f, to_the_horizon = of(f2b, FEW), of(b2f, FEW), arms["b2f-to-the-horizon"]
    first = kl_by_turn([one["evaluations"][0] for name in (*MAIN, *EQUAL_RATE) for one in arms[name].values()])
    rise = largest_rise(opd)
    etas, b2f_etas = (
        [few if eta == 2 else arms[f"{name}-eta-{eta}"] for eta in (1, 2, 4, 6)]
        for name, few in (("f2b", few_f2b), ("b2f", few_b2f))
    )
    eta_leads = [abs(fmean(lead_at_equal_steps(runs, few_f2b))) for runs in etas if runs is not few_f2b]
    eta_steps = ", ".join(f"{total(runs, *STEPS) / 1000:.1f}" for runs in etas)
    budget = paired(to_the_horizon, few_b2f, final("success"))
    [k] = {one["updates"][11]["k"] for one in f2b.values()}
    return filled(
        f"""
Five seeds per arm, each arm at its own tuned learning rate, and all three at F2B's; the tables below have every
number.

- **The premise holds.** Before training, the KL of a turn grows from {first[1][0]:.1f} nats at the first turn to
  {first[20][0]:.1f} at the twentieth: errors compound.
- **What the paper reports of plain OPD did not happen.** Its KL does not escalate and its success does not
  collapse: the trajectory's KL falls from {mean(opd, "kl", 0):.0f} to {mean(opd, "kl"):.0f} nats and success rises
  from {start_success(arms, list(opd)):.2f} to {mean(opd, "success"):.2f}, both in every seed, and the KL fell at
  every rate that was tried. The largest rise between two evaluations was one seed's, from {rise[0]:.0f} to
  {rise[1]:.0f} nats; it ended at {rise[2]:.0f}.
- **After equal updates OPD is ahead**, against the paper: F2B's success differs from OPD's by
  {difference(f2b, opd)}, B2F's by {difference(b2f, opd)}. At one learning rate for all, F2B's, it is
  {difference(f2b, opd_rate)} and {difference(b2f_rate, opd_rate)}.
- **After equal environment steps they tie**: F2B {lead(f2b, opd)} and B2F {lead(b2f, opd)} to OPD, at one learning
  rate {lead(f2b, opd_rate)} and {lead(b2f_rate, opd_rate)}. F2B takes {saved(f2b, opd, *STEPS)} fewer environment
  steps than OPD and trains on {saved(f2b, opd, "trained")} fewer tokens in {saved(f2b, opd, "s")} less time; B2F
  takes {saved(b2f, opd, *STEPS)} fewer steps, replayed ones included, and trains on {saved(b2f, opd, "trained")}
  fewer tokens. So a curriculum makes an update cheaper, and buys no more than that here.
- **F2B begins in vain.** After 12 updates, at k = {k:.0f}, its success is {mean(f2b, "success", 12):.2f}, below the
  start's, and its trajectory's KL {mean(f2b, "kl", 12):.0f} nats, after {mean(f2b, "kl", 0):.0f} at the start; OPD
  has {mean(opd, "success", 12):.2f} and B2F {mean(b2f, "success", 12):.2f} by then. This student knows the first
  turns, so the KL there is next to nothing.
- **By turn, the rate matters more than the curriculum.** At turn 12 the KL falls from {first[12][0]:.1f} nats to
  {turn_kl(opd, 12)} for OPD, {turn_kl(f2b, 12)} for F2B and {turn_kl(b2f, 12)} for B2F, whose rate is the lowest;
  at one learning rate to {turn_kl(opd_rate, 12)}, {turn_kl(f2b, 12)} and {turn_kl(b2f_rate, 12)}.
- **The order of the depths earned nothing.** At F2B's cost in environment steps and with three seeds, OPD with
  batches of 11 (and its higher rate) ends at {mean(batch_11, "success"):.2f}, a horizon that stays at 10 at
  {mean(fixed, "success"):.2f}, F2B's own depths in a random order at {mean(shuffled, "success"):.2f}, and F2B at
  {mean(few_f2b, "success"):.2f}. F2B is behind in {behind(f2b, batch_11)} seeds, {behind(f2b, fixed)}, and
  {behind(f2b, shuffled)}; no range excludes 0. What a curriculum saves, shorter episodes or fewer of them save too.
- **eta sets the cost first of all.** F2B with eta 1, 2, 4 and 6 ends at {each(etas, "success", ".2f")}, for
  {eta_steps} thousand environment steps, with a KL of {each(etas, "kl", ".0f")} nats: slower is cheaper and leaves
  more to learn. At equal environment steps the three are within {max(eta_leads):.2f} of eta 2. B2F's success shows
  no trend ({each(b2f_etas, "success", ".2f")}), its KL the same one ({each(b2f_etas, "kl", ".0f")}). Three seeds
  each.
- **B2F's budget rule makes no difference that shows**: a student that plays to the horizon ends at
  {mean(to_the_horizon, "success"):.2f}, one that stops after k + 2 turns at {mean(few_b2f, "success"):.2f}, over
  the same three seeds ({fmean(budget):+.2f}, from {min(budget):+.2f} to {max(budget):+.2f}), and takes
  {total(to_the_horizon, "student_steps") / total(few_b2f, "student_steps") - 1:.0%} more steps of its own.
- **Lower variance over seeds**, which a replication at 3B found for F2B, is not to be seen: the standard deviation
  of the final success is {deviation(opd)} for OPD, {deviation(f2b)} for F2B, {deviation(b2f)} for B2F; at one
  learning rate {deviation(opd_rate)}, {deviation(f2b)} and {deviation(b2f_rate)}.
"""
    )


def readme_curricula(arms: Arms) -> str:
    opd, f2b, b2f = (arms[name] for name in MAIN)
    settings = next(iter(opd.values()))["settings"]
    games = next(iter(opd.values()))["evaluations"][-1]["episodes"]
    return filled(
        f"""
`bash benchmarks/run.sh study` compares OPD, F2B and B2F in the same way with {len(opd)} seeds each: students that
know how an episode begins and not how it goes on, {settings["updates"]} updates of {settings["batch"]} episodes of
up to {settings["tcod_horizon"]} turns, {games} held-out games, every arm's learning rate tuned alike. Success rose
from {start_success(arms, list(opd)):.2f} to {mean(opd, "success"):.2f} with OPD, to {mean(f2b, "success"):.2f} with
F2B and to {mean(b2f, "success"):.2f} with B2F. After as many environment steps instead of updates, F2B equals OPD
({lead(f2b, opd)}, 95% interval) and B2F nearly ({lead(b2f, opd)}). Plain OPD did not fail, as the paper reports of
it: in this setting the curriculum makes updates cheaper, by {saved(f2b, opd, *STEPS)} of the environment steps for
F2B, and no better; smaller batches or a fixed shorter horizon save as much.
"""
    )


# ----------------------------------------------------------------------------------------------- the second part


def losses(arms: Arms, pilot: Arms) -> str:
    """STUDY.md, what the second part found. About one seed; with more it has to be written anew."""
    opd, f2b, b2f, turn = (arms[name] for name in ("opd-token", "f2b-token", "b2f-token", "opd-turn"))
    calm, calm_f2b, reopd = (arms[f"{name}-token-calm"] for name in ("opd", "f2b", "reopd"))
    [one], [calm_one] = opd.values(), calm.values()
    kl = [update["kl"] for update in one["updates"]]
    burst = kl.index(max(kl))
    stressed = [opd, f2b, b2f, turn]
    swing, calm_swing = (
        fmean(abs(after - before) for runs in some for before, after in swings(runs)) for some in (stressed, [calm])
    )
    answers = [total(runs, "trained") / total(runs, "student_steps") for runs in (*stressed, calm)]
    return filled(
        f"""
**At the stressed rate nothing separates**: every loss and every curriculum that was run is unstable there, so the
comparison was not carried to five seeds. There is one run per arm, on seed 1, and two pilot runs of OPD. One run
shows that something happens; of differences it shows large ones only. One is large: that of the learning rate.

- **Does OPD's KL escalate, or its success fall, under token weights?** In bursts, and at the stressed rate only:
  there the KL per token of the training episodes more than doubled from one update to the next {doubled(opd)} times
  in {len(kl)} updates ({doubled(pilot["opd-token"])} times in the pilot), at worst from {kl[burst - 1]:.0f} to
  {kl[burst]:.0f} nats per trajectory, and was {kl[burst + 1]:.0f} an update later; success swings by {swing:.2f}
  from one batch of {one["settings"]["batch"]} training episodes to the next, and the last {study_losses.LATE}
  batches have {late_success(opd)} ({late_success(pilot["opd-token"])}). At a quarter of the rate it never doubled:
  the KL fell from {calm_one["updates"][0]["kl"]:.0f} to {study_losses.late("kl")(calm_one):.0f} nats, success
  swings by {calm_swing:.2f}, and the last batches have {late_success(calm)}.
- **Does the curriculum repair that, or the turn loss alone?** Neither does. The KL doubled {doubled(f2b)} times
  with F2B, {doubled(b2f)} with B2F and {doubled(turn)} with OPD and the turn loss, and held-out success, halfway
  and at the end, was {course(f2b)}, {course(b2f)} and {course(turn)}; OPD under token weights had {course(opd)},
  under trajectory weights (in the pilot) {course(pilot["opd-trajectory"])} with {doubled(pilot["opd-trajectory"])}
  doubling. The lower rate does, in one run each: {course(calm)} with OPD, and {course(calm_f2b)} with F2B, whose KL
  doubled {doubled(calm_f2b)} time.
- **What is the variance over seeds?** Not measured: there is one seed. At the stressed rate OPD under token weights
  ended at {mean(opd, "success"):.2f}, in the pilot at {mean(pilot["opd-token"], "success"):.2f}, and one run's
  success changed between its two evaluations by up to {largest_change(stressed):.2f}, so one evaluation at the end
  says little about an arm.
- **What is the cheapest way to a given success?** A rate that is not too high. At the lower rate,
  {calm_arms(arms)}. After as many environment steps as F2B took, its success is
  {fmean(lead_at_equal_steps(calm_f2b, calm)):+.2f} to OPD's: again a tie.
- **ReOPD is starved here**: its 30 updates have {total(reopd, "trained"):,.0f} trained tokens, OPD's
  {total(calm, "trained"):,.0f}. The KL of whole trajectories still falls from {mean(opd, "kl", 0):.0f} to
  {mean(reopd, "kl"):.0f} nats, and success does not rise.
- **A mean over turns is nearly one over tokens here.** An answer is an action alone, {min(answers):.1f} to
  {max(answers):.1f} tokens in the mean; only in a burst do answers get longer. Whether the turn loss helps a
  student that reasons at length, this study cannot say.
"""
    )


def late_success(runs: Runs) -> str:
    return f"{fmean(study_losses.late('success')(one) for one in runs.values()):.2f}"


def largest_change(arms: Sequence[Runs]) -> float:
    """Of one run's held-out success between the evaluation halfway and the last."""
    every = [one["evaluations"] for runs in arms for one in runs.values()]
    return max(abs(points[-1]["success"] - points[-2]["success"]) for points in every)


def calm_arms(arms: Arms) -> str:
    """Success and cost, halfway and at the end, of each arm that was run at the lower rate."""
    texts = []
    for suffixed, runs in arms.items():
        name, dash, _ = suffixed.partition("-token-calm")
        if dash:
            [one] = runs.values()
            n, costs = one["evaluations"][-2]["n"], study_report.steps(one)
            label = {"reopd": "ReOPD"}.get(name, name.upper())
            halfway = (
                f"{one['evaluations'][-2]['success']:.2f} after {n} updates and {costs[n]:,.0f} environment steps"
            )
            n = one["settings"]["updates"]
            texts.append(f"{label} has {halfway}, and {mean(runs, 'success'):.2f} after {n} and {costs[n]:,.0f}")
    return "; ".join(texts)


def course(runs: Runs) -> str:
    """Held-out success halfway and at the end."""
    return f"{fmean(one['evaluations'][-2]['success'] for one in runs.values()):.2f} → {mean(runs, 'success'):.2f}"


def doubled(runs: Runs) -> str:
    return " and ".join(f"{study_losses.doublings(one)}" for one in runs.values())


def swings(runs: Runs) -> list[tuple[float, float]]:
    """Success in the training episodes of an update and of the next, over the last ones."""
    late = [[update["success"] for update in one["updates"][-study_losses.LATE :]] for one in runs.values()]
    return [pair for successes in late for pair in pairwise(successes)]


def readme_losses(arms: Arms) -> str:
    opd, calm = arms["opd-token"], arms["opd-token-calm"]
    [settings] = [one["settings"] for one in opd.values()]
    [calm_settings] = [one["settings"] for one in calm.values()]
    return filled(
        f"""
A second part asks whether the loss matters (a mean over trajectories, tokens or turns), with a student that is weak
everywhere, {settings["tcod_horizon"]} turns, and a learning rate that is too high for plain OPD. There the KL jumps
and comes back, and success falls and rises, with every loss and curriculum that was run, one seed each. At a
quarter of the rate ({calm_settings["lr"]:g} instead of {settings["lr"]:g}) OPD's KL falls steadily, and OPD ends at
{mean(calm, "success"):.2f} instead of {mean(opd, "success"):.2f}. No difference between losses was seen, and none
can be excluded.
"""
    )
