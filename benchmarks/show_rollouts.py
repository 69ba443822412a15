"""How long the page of saved episodes takes to make and to open, and how large it and the saved files are.

Made-up episodes in the shape of ALFWorld's: 12 turns of about 45 sampled tokens, observations with admissible actions.
Opened in headless Chromium from the disk, each time in a new window: until the list and the first episode are painted.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from examples.tcod.tools import show_rollouts
from tests.support.browser import Browser, find_browser
from tests.support.episodes import made_up, save

TURNS, WORDS, TASKS = 12, 40, 64
OPENINGS = 5
PAINTED = "new Promise((then) => requestAnimationFrame(() => setTimeout(() => then(performance.now()))))"


def acted(browser: Browser, action: str) -> float:
    """Milliseconds from a JavaScript statement until what it changed is painted."""
    begun = browser.run(f"{{ const begun = performance.now(); {action}; begun; }}")
    return browser.run(PAINTED) - begun


def measure(episodes: int, folder: Path) -> dict[str, Any]:
    """One row."""
    made = [made_up(i, n=i // 8, task=i % TASKS, turns=TURNS, words=WORDS, replayed=i % 4) for i in range(episodes)]
    save(folder, made)
    page = folder / "rollouts.html"
    started = time.perf_counter()
    page.write_text(show_rollouts.make_page(show_rollouts.read_runs([folder])))
    made_s = time.perf_counter() - started
    opened, stepped, filtered, sorted_ = [], [], [], []
    for _ in range(OPENINGS):
        with Browser() as browser:
            browser.open(page)
            opened.append(browser.run(PAINTED))
            stepped.append(acted(browser, "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'j'}))"))
            filtered.append(acted(browser, "document.querySelector('select[name=outcome]').value = 'won'; update()"))
            sorted_.append(acted(browser, "document.querySelector('#rows th[data-key=kl] button').click()"))
    return {
        "episodes": episodes,
        "saved MB": (folder / "rollouts" / "train_000000.jsonl").stat().st_size / 1e6,
        "page MB": page.stat().st_size / 1e6,
        "made in s": made_s,
        "opens in s": median(opened) / 1000,
        "slowest s": max(opened) / 1000,
        "next ms": median(stepped),
        "filter ms": median(filtered),
        "sort ms": median(sorted_),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to make and open the page of saved episodes.")
    parser.add_argument("--episodes", type=int, nargs="+", default=[100, 1000, 5000])
    options = parser.parse_args()
    if not find_browser():
        sys.exit("no Chromium: on Debian, apt-get install chromium")
    rows = []
    for episodes in options.episodes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(episodes, Path(folder)))
    load = os.getloadavg()[0]
    print(report.table(rows))
    print(f"written to {report.write('show_rollouts', rows, turns=TURNS, words=WORDS, load=round(load, 1))}")


if __name__ == "__main__":
    main()
