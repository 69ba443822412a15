"""Success rates on any SGLang server: every game --repeats times, full horizon, by task type, with 95% intervals.

    python -m examples.tcod.tools.evaluate --rows valid_seen.jsonl --out f2b.json --url http://HOST:PORT --model DIR

Every finished episode is a line of the journal (f2b.journal.jsonl) at once; after a crash the same command goes on
where it was. The journal goes when all episodes are in the result. compare_evals takes two results.
"""

import asyncio
import json
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .. import ConfigError
from ..episode.episode import Episode
from ..episode.rows import Row
from ..records.saved_episodes import transcript
from .common.command import at_least, new_parser, one_sentence, result_file, table
from .common.play import RowRunner, add_options
from .compare_evals import summarise

COLUMNS = {  # of the table: the number's name in a summary, and how it is written
    **{"episodes": ("episodes", "{}"), "success": ("success", "{:.3f}"), "95% interval": ("interval", "{}")},
    **{"+- SD": ("success_sd", "{:.3f}"), "pass@k": ("pass_at_k", "{:.3f}"), "score": ("score", "{:.3f}")},
    **{"turns": ("turns", "{:.1f}"), "won": ("turns_won", "{:.1f}"), "lost": ("turns_lost", "{:.1f}")},
}


def result_of(runner: RowRunner) -> dict[str, Any]:
    """{"settings": .., "success": see `summarise`, "failed": counts by reason, "episodes": one each, in rows' order}.

    A failed episode is no loss: it is counted, and takes no part in the rates.

    Raises:
        ConfigError: all failed.
    """
    failed, settings = dict(runner.failed), {**runner.settings, "rows": str(runner.options.rows)}
    played = [(entry, row.label) for row in runner.rows for entry in runner.journal.of(row)]
    episodes = [{**one, "task_type": label} for one, label in played if one["attempt"] < runner.options.repeats]
    if not episodes:
        raise ConfigError(f"all {sum(failed.values())} episodes failed ({failed}): see the warnings above")
    return {"settings": settings, "success": summarise(episodes), "failed": failed, "episodes": episodes}


def saver(options: Namespace, runner: RowRunner, stack: ExitStack) -> Callable[[Row, Episode], dict[str, Any]]:
    """What is told of an episode that has ended; it says what the journal keeps of it.

    It saves the episode as those of a training run are, with the model's name in the place of the arm, in a file that
    is open as long as `stack`. Raises OSError.
    """
    file, name, arm = None, options.rows.stem, Path(options.model).name
    if options.save_episodes:
        path = options.save_episodes / "rollouts" / f"eval_{name}_000000.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = "a" if runner.entries else "w"
        file = stack.enter_context(path.open(mode, encoding="utf-8", buffering=1))
        file.write("\n" if runner.entries else "")  # after a torn line

    def save(row: Row, episode: Episode) -> dict[str, Any]:
        if file:
            about = {"arm": arm, "dataset": name, "n": 0, "index": row.line}
            file.write(json.dumps(transcript(episode, row, runner.chat.tokenizer, **about)) + "\n")
        return {"context_limited": episode.record.context_limited, "score": episode.record.best_grade}

    return save


def report(result: dict[str, Any]) -> str:
    """The summaries as a table, and what is not in it."""
    rows = [("all", result["success"]["all"]), *result["success"]["by_label"].items()]
    columns = {name: key for name, key in COLUMNS.items() if any(key[0] in row for _, row in rows)}
    lines = [("task type", *columns)]
    for name, row in rows:
        row = {**row, "interval": "[{:.3f}, {:.3f}]".format(*row["interval"])}
        lines.append((name, *(form.format(row[key]) if key in row else "-" for key, form in columns.values())))
    text = table(lines)
    if limited := sum(episode["context_limited"] for episode in result["episodes"]):
        text += f"\n{limited} episodes ended because --max-context-len was reached"
    if failed := result["failed"]:
        text += f"\n{sum(failed.values())} episodes failed and are not counted: {failed}; run it again to play them"
    return text


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--save-episodes", type=Path, metavar="DIR", help="save all episodes there, for show_rollouts")
    parser.add_argument("--repeats", type=at_least(1), default=1, help="plays of each game, default: %(default)s")
    add_options(parser, temperature=0.4)
    options = parser.parse_args()
    with one_sentence("evaluate", options.out), ExitStack() as stack:
        file = stack.enter_context(result_file(options.out))
        runner = RowRunner(options, "evaluate")
        asyncio.run(runner.play(options.repeats, saver(options, runner, stack)))
        result = result_of(runner)
        json.dump(result, file, indent=1)
    if not runner.failed:
        runner.journal.remove()
    print(report(result))


if __name__ == "__main__":
    main()
