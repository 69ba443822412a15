"""Sample a teacher's demonstrations: every game N times, of each the shortest replayable solution is kept.

    python -m examples.tcod.tools.collect_demos --rows train.jsonl --out demos.jsonl --url http://HOST:PORT --model DIR

Every finished episode is a line of the journal (demos.journal.jsonl) at once; after a crash the same command goes on
where it was. A solved game is sampled on, since a later solution may be shorter; lower --samples to pay less. In the
end OUT holds a row for each game that was solved, with its demonstration, and for each that never was, with an empty
one. A demonstration keeps the sampled ids beside the text: a student of the same vocabulary replays exactly these. A
prepare tool makes train.jsonl of the former and hard.jsonl of the latter (prepare_alfworld --demos OUT).
"""

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from ..episode.demonstration import recorded
from ..episode.episode import Episode
from ..episode.rows import task_key
from ..model.chat_tokens import ChatTokens
from .common.command import at_least, new_parser, one_sentence, result_file, table
from .common.journal import Entry
from .common.play import RowRunner, add_options


def solution(episode: Episode, chat: ChatTokens) -> dict[str, Any]:
    """What the journal keeps of a won episode: actions, the answers to them, the responses they are parsed from, and
    their ids.

    usable: every response gives one admissible action, so that it can be replayed.
    exact: replayed, it also has the same tokens, where the vocabulary is the same.
    """
    record, ids = episode.record, [span.ids for span, _ in episode.sampled()]
    if not record.won:
        return {}
    texts = [chat.turn_text(turn) for turn in ids]
    return {
        "usable": all(turn.valid and turn.admissible for turn in record.turns),
        "exact": all(map(chat.spells, ids, texts)),
        "actions": [turn.action for turn in record.turns],
        **recorded(episode.seen),
        "responses": texts,
        "ids": ids,
    }


def best(entries: Sequence[Entry]) -> Entry | None:
    """The shortest solution that replays token for token; if there is none, the shortest that replays in words."""
    usable = [entry for entry in entries if entry["won"] and entry["usable"]]
    return min(usable, key=lambda entry: (not entry["exact"], entry["turns"]), default=None)


def demonstration(entry: Entry, chat: ChatTokens, drop_thoughts: bool) -> dict[str, Any]:
    """An entry as a row's `demo`. Without thoughts a response is text alone: its tokens were sampled after them."""
    kept = {name: entry[name] for name in ("actions", "observations", "seen") if name in entry}
    if drop_thoughts:
        return kept | {"responses": [chat.after_thought(ids).strip() for ids in entry["ids"]]}
    return kept | {"responses": entry["responses"], "ids": entry["ids"], "vocabulary": chat.vocabulary}


def make_rows(runner: RowRunner, samples: int, drop_thoughts: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each solved game and, with an empty demonstration, for each that was never solved.

    The second list names the games that are neither, each with the reason.
    """
    rows, left_out = [], []
    for row in runner.rows:
        entries = runner.journal.of(row)
        demo = {"actions": []}
        if found := best(entries):
            demo = demonstration(found, runner.chat, drop_thoughts)
        elif any(entry["won"] for entry in entries):
            left_out.append(f"{task_key(row.task)}: every solution contains invalid or inadmissible actions")
            continue
        elif len(entries) < samples:
            left_out.append(f"{task_key(row.task)}: only {len(entries)} of {samples} episodes were played, none won")
            continue
        rows.append({"prompt": row.prompt, "label": row.label, "metadata": {**row.task, "demo": demo}})
    return rows, left_out


def summary(runner: RowRunner) -> str:
    """A table by task type. Length: the median of the kept demonstrations; inexact: those with other tokens."""
    by_label = defaultdict(list)
    for row in runner.rows:
        by_label[row.label].append(runner.journal.of(row))
    lines = [("task type", "games", "solved", "success", "length", "inexact")]
    for name, games in [*sorted(by_label.items()), ("all", list(map(runner.journal.of, runner.rows)))]:
        won = [entry["won"] for entries in games for entry in entries]
        kept = list(filter(None, map(best, games)))
        solved = sum(any(entry["won"] for entry in entries) for entries in games)
        success = f"{sum(won) / len(won):.2f}" if won else "-"
        length = f"{median(entry['turns'] for entry in kept):.0f}" if kept else "-"
        lines.append((name, len(games), solved, success, length, sum(not entry["exact"] for entry in kept)))
    return table(lines)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=at_least(1), default=10, help="N, episodes per game, default: %(default)s")
    parser.add_argument("--drop-thoughts", action="store_true", help="write what was said after the thoughts only")
    add_options(parser, temperature=1.0)
    options = parser.parse_args()
    with one_sentence("collect_demos", options.out), result_file(options.out) as file:
        runner = RowRunner(options, "collect_demos")
        chat = runner.chat
        asyncio.run(runner.play(options.samples, lambda row, episode: solution(episode, chat)))
        rows, left_out = make_rows(runner, options.samples, options.drop_thoughts)
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(summary(runner))
    for game in left_out:
        print(f"left out of {options.out}: {game}")
    if failed := dict(runner.failed):
        sys.exit(f"collect_demos: {sum(failed.values())} episodes failed ({failed}): run it again to play them")


if __name__ == "__main__":
    main()
