"""Sample a teacher's demonstrations: every game N times, of each the shortest replayable solution is kept.

    python -m examples.tcod.tools.collect_demos --rows train.jsonl --out demos.jsonl --url http://HOST:PORT --model DIR

Every finished episode is a line of OUT.journal.jsonl at once, so after a crash the same command goes on where it was.
A solved game is sampled on, since a later solution may be shorter; lower --samples to pay less. In the end OUT holds a
row for each game that was solved, with its demonstration, and for each that never was, with an empty one. A
demonstration keeps the sampled ids beside the text: a student of the same vocabulary replays exactly these.
A prepare tool makes train.jsonl of the former and hard.jsonl of the latter (prepare_alfworld --demos OUT).
"""

import argparse
import asyncio
import fcntl
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .. import ConfigError
from ..episode.record import Episode
from ..episode.rows import Row, task_key
from ..model.chat_tokens import ChatTokens
from .play import Player, add_options, play, start

Entry = dict[str, Any]  # one episode, see `entry_of`


class Journal:
    """An append-only JSONL file: its settings, then a line per finished episode. One process writes it at a time.

    A process that is killed leaves at most a torn last line, which the next one cuts off.

    Args:
        path: created where it does not exist.
        settings: what the episodes depend on.

    Raises:
        ConfigError: another process writes it, it was begun with other settings, or it is damaged.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._by_task: defaultdict[str, list[Entry]] = defaultdict(list)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process writes {path}: wait for it, or choose another --out") from error
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()] or [{"settings": settings}]
            begun_with = lines[0]["settings"]
            for entry in lines[1:]:
                self._by_task[task_key(entry["task"])].append(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({error!r}): repair or remove it") from error
        if not whole:
            self._write({"settings": settings})
        if different := [name for name in settings if begun_with.get(name) != settings[name]]:
            raise ConfigError(f"{path} was begun with another {', '.join(different)}: choose another --out")

    def of(self, row: Row) -> list[Entry]:
        """The episodes of a row's task."""
        return self._by_task[task_key(row.task)]

    def add(self, entry: Entry) -> None:
        self._write(entry)
        self._by_task[task_key(entry["task"])].append(entry)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


def entry_of(row: Row, attempt: int, episode: Episode, chat: ChatTokens) -> Entry:
    """The journal's line about one episode; a won one with its actions, the responses they are parsed from, and ids.

    usable: every response gives one admissible action, so that a replay does the same.
    exact: it also says the same, token for token, where the vocabulary is the same.
    """
    record = episode.record
    entry = {"task": row.task, "attempt": attempt, "won": record.won, "turns": len(record.turns)}
    if not record.won:
        return entry
    ids = [span.ids for span, _ in episode.sampled()]
    texts = [chat.said(turn) for turn in ids]
    return {
        **entry,
        "usable": all(turn.valid and turn.admissible for turn in record.turns),
        "exact": all(map(chat.replays, ids, texts)),
        "actions": [turn.action for turn in record.turns],
        "responses": texts,
        "ids": ids,
    }


def best(entries: Sequence[Entry]) -> Entry | None:
    """The shortest solution that replays token for token; if there is none, the shortest that replays in words."""
    usable = [entry for entry in entries if entry["won"] and entry["usable"]]
    return min(usable, key=lambda entry: (not entry["exact"], entry["turns"]), default=None)


def demonstration(entry: Entry, chat: ChatTokens, drop_thoughts: bool) -> dict[str, Any]:
    """An entry as a row's `demo`. Without thoughts a response is text alone: its tokens were sampled after them."""
    if drop_thoughts:
        return {"actions": entry["actions"], "responses": [chat.answer(ids).strip() for ids in entry["ids"]]}
    return {**{name: entry[name] for name in ("actions", "responses", "ids")}, "vocabulary": chat.vocabulary}


async def sample_games(player: Player, rows: list[Row], samples: int, journal: Journal) -> Counter[str]:
    """Play what the journal lacks: every game once, then every game again. Returns the failed episodes by reason."""
    done = [entry for row in rows for entry in journal.of(row)]
    known = {(task_key(entry["task"]), entry["attempt"]) for entry in done}
    todo = [(row, n) for n in range(samples) for row in rows if (task_key(row.task), n) not in known]
    wins, total = sum(entry["won"] for entry in done), len(done)
    failed: Counter[str] = Counter()
    with logging_redirect_tqdm(), tqdm(total=total + len(todo), initial=total, unit="episode") as bar:
        async for index, episode in play(player, [row for row, _ in todo]):
            if reason := episode.record.failure:
                failed[reason] += 1
            else:
                row, attempt = todo[index]
                journal.add(entry_of(row, attempt, episode, player.player.chat))
                wins, total = wins + episode.record.won, total + 1
            bar.set_postfix_str(f"success {wins / max(total, 1):.2f}, failed {failed.total()}", refresh=False)
            bar.update()
    return failed


def write_demos(
    out: Path, rows: list[Row], samples: int, journal: Journal, chat: ChatTokens, drop_thoughts: bool = False
) -> list[str]:
    """Write a row for each solved game and, with an empty demonstration, for each that was never solved.

    Returns the games that are neither, each with the reason.
    """
    lines, left_out = [], []
    for row in rows:
        entries = journal.of(row)
        demo = {"actions": []}
        if found := best(entries):
            demo = demonstration(found, chat, drop_thoughts)
        elif any(entry["won"] for entry in entries):
            left_out.append(f"{task_key(row.task)}: every solution contains invalid or inadmissible actions")
            continue
        elif len(entries) < samples:
            left_out.append(f"{task_key(row.task)}: only {len(entries)} of {samples} episodes were played, none won")
            continue
        lines.append(
            json.dumps({"prompt": row.prompt, "label": row.label, "metadata": {**row.task, "demo": demo}}) + "\n"
        )
    partial = out.with_name(out.name + ".partial")
    partial.write_text("".join(lines))
    partial.replace(out)
    return left_out


def summary(rows: list[Row], journal: Journal) -> str:
    """A table by task type. Length: the median of the kept demonstrations; inexact: those with other tokens."""
    by_type = defaultdict(list)
    for row in rows:
        by_type[row.label].append(journal.of(row))
    lines = [f"{'task type':<32}{'games':>7}{'solved':>8}{'success':>9}{'length':>8}{'inexact':>9}"]
    for name, games in [*sorted(by_type.items()), ("all", list(map(journal.of, rows)))]:
        won = [entry["won"] for entries in games for entry in entries]
        kept = list(filter(None, map(best, games)))
        solved = sum(any(entry["won"] for entry in entries) for entries in games)
        success = f"{sum(won) / len(won):.2f}" if won else "-"
        length = f"{median(entry['turns'] for entry in kept):.0f}" if kept else "-"
        inexact = sum(not entry["exact"] for entry in kept)
        lines.append(f"{name:<32}{len(games):>7}{solved:>8}{success:>9}{length:>8}{inexact:>9}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", type=Path, required=True, help="the tasks: JSONL rows, as a prepare tool writes them"
    )
    parser.add_argument("--out", type=Path, required=True, help="gets the demonstrations; the journal lies beside it")
    parser.add_argument("--samples", type=int, default=10, help="N, episodes per game, default: %(default)s")
    parser.add_argument("--drop-thoughts", action="store_true", help="write what was said behind the thoughts only")
    add_options(parser, temperature=1.0)
    options = parser.parse_args()
    try:
        player = start(options)
        rows = player.read_rows(options.rows)
        journal = Journal(options.out.with_suffix(".journal.jsonl"), player.settings)
        failed = asyncio.run(sample_games(player, rows, options.samples, journal))
    except (ConfigError, RuntimeError) as error:
        sys.exit(f"collect_demos: {error}")
    left_out = write_demos(options.out, rows, options.samples, journal, player.player.chat, options.drop_thoughts)
    print(summary(rows, journal))
    for game in left_out:
        print(f"left out of {options.out}: {game}")
    if failed:
        sys.exit(f"collect_demos: {failed.total()} episodes failed ({dict(failed)}): run it again to play them")


if __name__ == "__main__":
    main()
