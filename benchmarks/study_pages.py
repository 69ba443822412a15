"""The pages of the study: what `study --report` writes into STUDY.md and the README, between marks.

Tables come from study_report.py and study_losses.py. The findings in words are here, and every figure in them is taken
from the results: a test compares the pages with what this gives.
"""

import math
import textwrap
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks import study_losses, study_report
from benchmarks.study_report import (
    CHECKS,
    EQUAL_RATE,
    MAIN,
    STEPS,
    Arms,
    Result,
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
    return {
        (STUDY, "findings"): curricula(first),
        (STUDY, "results"): study_report.text(first),
        (STUDY, "tuning"): study_report.tuning_table(results / "tuning"),
        (STUDY, "findings of the losses"): losses(second),
        (STUDY, "results of the losses"): study_losses.text(second),
        (STUDY, "pilot"): study_losses.end_table(pilot),
        (README, "study"): readme_curricula(first) + "\n" + readme_losses(second),
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


def difference(runs: Runs, base: Runs) -> str:
    """Of the final success."""
    return study_report.mean_text(paired(runs, base, final("success")), ".2f", "+")


def lead(runs: Runs, base: Runs) -> str:
    return study_report.mean_text(lead_at_equal_steps(runs, base), ".2f", "+")


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
    return listed([f"{mean(runs, metric):{form}}" for runs in arms])


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
    return filled(
        f"""
`bash benchmarks/run.sh study` compares OPD, F2B and B2F in the same way with {len(opd)} seeds each: students that
know how an episode begins and not how it goes on, {settings(opd)["updates"]} updates of {settings(opd)["batch"]}
episodes of up to {settings(opd)["tcod_horizon"]} turns, {games(opd)} held-out games, every arm's learning rate tuned
alike. Success rose from {start_success(arms, list(opd)):.2f} to {mean(opd, "success"):.2f} with OPD, to
{mean(f2b, "success"):.2f} with F2B and to {mean(b2f, "success"):.2f} with B2F. After as many environment steps
instead of updates, F2B equals OPD ({lead(f2b, opd)}, 95% interval) and B2F nearly ({lead(b2f, opd)}). Plain OPD did
not fail, as the paper reports of it: in this setting the curriculum makes updates cheaper, by
{saved(f2b, opd, *STEPS)} of the environment steps for F2B, and no better; smaller batches or a fixed shorter horizon
save as much.
"""
    )


# ----------------------------------------------------------------------------------------------- the second part


def losses(arms: Arms) -> str:
    """STUDY.md, what the second part found."""
    opd, f2b, b2f = stressed = common(*(arms[f"{name}-token"] for name in MAIN))
    calm_opd, calm_f2b, calm_b2f = calm = common(*(arms[f"{name}-token-calm"] for name in MAIN))
    turn, by_kl = arms["opd-turn"], arms["f2b-kl-token"]
    reopd, opd_of_reopd = common(arms["reopd-token-calm"], arms["opd-token-calm"])
    others = [runs for name, runs in arms.items() if name.endswith(("-turn", "-trajectory"))]
    seen = {seed: one for seed, one in calm_opd.items() if one["evaluations"][0]["n"] == 0}
    fast = arms["opd-token"]  # of more seeds than the others
    (before, burst, after), (calm_before, calm_burst, _) = worst_burst(fast), worst_burst(calm_opd)
    answers = [total(runs, "trained") / total(runs, "student_steps") for runs in (*stressed, *calm, turn)]
    gains = [gain for pair in zip(calm, stressed, strict=True) for gain in paired(*pair, final("success"))]
    ends = [final("kl")(one) for one in fast.values()]
    return filled(
        f"""
**Under token weights the learning rate decides more than F2B or B2F do.** The three have {len(opd)} seeds at the
stressed rate and {len(calm_opd)} at the lower one. The other losses have {min(map(len, others))} to
{max(map(len, others))}, which show little. In parentheses is a range over seeds, in brackets a 95% interval of five.

- **Does OPD's KL escalate, or its success fall, under token weights?** At the lower rate neither: in each of the
  {len(seen)} seeds whose start was evaluated the KL of held-out trajectories falls, from {mean(seen, "kl", 0):.0f}
  to {mean(seen, "kl"):.0f} nats in the mean, and success rises from {mean(seen, "success", 0):.2f} to
  {mean(seen, "success"):.2f}. At four times that rate both happen in bursts. The training episodes' KL rises from
  one update to the next by at worst {before:.0f} to {burst:.0f} nats, and is {after:.0f} an update later; at the
  lower rate by at worst {calm_before:.0f} to {calm_burst:.0f}. Their success, a mean of three batches, falls from
  its best so far by up to {falls(fast)}, by seed, against {falls(calm_opd)}. It does not stay so: the held-out KL
  ends at {min(ends):.0f} to {max(ends):.0f} nats, success at {by_seed(fast)}.
- **Does the curriculum repair that, or the turn loss alone?** These seeds show neither. At the stressed rate F2B
  ends at {by_seed(f2b)}, which differs from OPD by {difference(f2b, opd)}, and B2F at {by_seed(b2f)}, by
  {difference(b2f, opd)}; OPD with the turn loss ends at {by_seed(turn)}, by {difference(turn, arms["opd-token"])}.
  The lower rate repairs it: with the same seed and arm it ends ahead in {sum(gain > 0 for gain in gains)} of
  {len(gains)} pairs of runs, by {fmean(gains):.2f} in the mean.
- **What does the curriculum add at a rate that suits?** After equal updates F2B's success differs from OPD's by
  {difference(calm_f2b, calm_opd)}, B2F's by {difference(calm_b2f, calm_opd)}; after equal environment steps by
  {lead(calm_f2b, calm_opd)} and {lead(calm_b2f, calm_opd)}. F2B takes {saved(calm_f2b, calm_opd, *STEPS)} fewer
  environment steps and trains on {saved(calm_f2b, calm_opd, "trained")} fewer tokens.
- **What is the variance over seeds?** At the stressed rate the standard deviation of the final success is
  {deviation(opd)} for OPD, {deviation(f2b)} for F2B and {deviation(b2f)} for B2F, at the lower rate
  {deviation(calm_opd)}, {deviation(calm_f2b)} and {deviation(calm_b2f)}; {games(calm_opd)} games alone give about
  {chance(calm_opd):.3f} of it.
- **What is the cheapest way to a given success?** A rate that is not too high; at it these seeds do not tell the
  three apart. {"; ".join(way(name, runs) for name, runs in zip(MAIN, calm, strict=True))}.
- **ReOPD is starved here**: its {settings(reopd)["updates"]} updates have {total(reopd, "trained"):,.0f} trained
  tokens, OPD's {total(opd_of_reopd, "trained"):,.0f}; it ends at {by_seed(reopd)}.
- **Depth that follows the KL** was run once, at the stressed rate, under token weights: from 6 its k came to
  {last_depth(by_kl)} of {settings(by_kl)["tcod_horizon"]} in {settings(by_kl)["updates"]} updates, as a depth lasts
  2 to 8 of them. So it never saw the end of an episode; success ended at {by_seed(by_kl)}.
- **A mean over turns is nearly one over tokens here.** An answer is an action alone, {min(answers):.1f} to
  {max(answers):.1f} tokens in the mean; only in a burst do answers get longer. Whether the turn loss helps a
  student that reasons at length, this study cannot say.
"""
    )


def common(*arms: Runs) -> list[Runs]:
    """The arms' runs of those seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(runs) for runs in arms)))
    return [of(runs, seeds) for runs in arms]


def settings(runs: Runs) -> dict[str, Any]:
    return next(iter(runs.values()))["settings"]


def games(runs: Runs) -> int:
    """Held-out games of an evaluation."""
    return next(iter(runs.values()))["evaluations"][-1]["episodes"]


def chance(runs: Runs) -> float:
    """The standard deviation of success in so many games, if every seed had the mean's."""
    success = mean(runs, "success")
    return math.sqrt(success * (1 - success) / games(runs))


def by_seed(runs: Runs) -> str:
    """Success at the end."""
    return listed([f"{final('success')(runs[seed]):.2f}" for seed in sorted(runs)])


def listed(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def last_depth(runs: Runs) -> str:
    return listed([f"{runs[seed]['updates'][-1]['k']:.0f}" for seed in sorted(runs)])


def falls(runs: Runs) -> str:
    """Of each seed: how far success in three batches of training episodes was below its best before."""
    texts = []
    for seed in sorted(runs):
        success = [update["success"] for update in runs[seed]["updates"]]
        course = [fmean(success[i : i + 3]) for i in range(len(success) - 2)]
        texts.append(f"{max(best - now for best, now in zip(accumulate(course, max), course, strict=True)):.2f}")
    return listed(texts)


def worst_burst(runs: Runs) -> tuple[float, float, float]:
    """The largest rise of the training episodes' KL from one update to the next: before, after, an update later."""
    kls = [[update["kl"] for update in one["updates"]] for one in runs.values()]
    return max((tuple(kl[i : i + 3]) for kl in kls for i in range(len(kl) - 2)), key=lambda kl: kl[1] - kl[0])


def way(name: str, runs: Runs) -> str:
    """Success and cost, halfway and at the end."""
    costs = [study_report.steps(one) for one in runs.values()]
    updates = settings(runs)["updates"]
    points = [
        f"{mean(runs, 'success', n):.2f} after {n} updates and {fmean(cost[n] for cost in costs):,.0f} steps"
        for n in (updates // 2, updates)
    ]
    return f"{name.upper()} has {' and '.join(points)}"


def readme_losses(arms: Arms) -> str:
    opd, f2b, b2f = common(*(arms[f"{name}-token"] for name in MAIN))
    calm_opd, calm_f2b, calm_b2f = common(*(arms[f"{name}-token-calm"] for name in MAIN))
    return filled(
        f"""
A second part asks whether the loss matters (a mean over trajectories, tokens or turns), with students that are weak
everywhere and {settings(opd)["tcod_horizon"]} turns. At a learning rate that is too high for plain OPD
({settings(opd)["lr"]:g}) the KL jumps and comes back, and under token weights success ends at {by_seed(opd)}, by
seed, with OPD, {by_seed(f2b)} with F2B and {by_seed(b2f)} with B2F. At a quarter of the rate it ends at
{mean(calm_opd, "success"):.2f}, {mean(calm_f2b, "success"):.2f} and {mean(calm_b2f, "success"):.2f} in the mean of
{len(calm_opd)} seeds, and after equal environment steps F2B differs from OPD by {lead(calm_f2b, calm_opd)}, B2F by
{lead(calm_b2f, calm_opd)}: the rate mattered more than the curriculum. The other losses had too few runs to tell.
"""
    )
