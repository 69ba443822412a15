"""Success rates on any SGLang server: every game once, full horizon, by task type, with 95% intervals.

    python -m examples.tcod.tools.evaluate --rows valid_seen.jsonl --out f2b.json --url http://HOST:PORT --model DIR

compare_evals takes two such results.
"""

import argparse
import asyncio
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .. import ConfigError
from ..episode.record import Episode
from ..episode.rows import Row
from ..records.transcript import transcript
from .compare_evals import by_type, summarise
from .play import Player, add_options, play, start


async def evaluate(
    player: Player, rows: list[Row], note: Callable[[int, Episode], None] | None = None
) -> dict[str, Any]:
    """Play every row once; `note` is told of every episode that has ended, with the position of its row.

    Returns {"success": summaries by task type, "failed": counts by reason, "episodes": one entry each, in the rows'
    order}. A failed episode is no loss: it is counted, and takes no part in the rates.
    """
    episodes: dict[int, dict[str, Any]] = {}
    failed: Counter[str] = Counter()
    with logging_redirect_tqdm(), tqdm(total=len(rows), unit="episode") as bar:
        async for index, episode in play(player, rows):
            row, record = rows[index], episode.record
            if note:
                note(index, episode)
            if record.failure:
                failed[record.failure] += 1
            else:
                episodes[index] = {
                    "task": row.task,
                    "task_type": row.label,
                    "won": record.won,
                    "turns": len(record.turns),
                    "context_limited": record.context_limited,
                }
            wins = sum(episode["won"] for episode in episodes.values())
            bar.set_postfix_str(f"success {wins / max(len(episodes), 1):.2f}, failed {failed.total()}", refresh=False)
            bar.update()
    in_order = [episodes[index] for index in sorted(episodes)]
    success = {name: summarise(group) for name, group in by_type(in_order).items()}
    return {"success": success, "failed": dict(failed), "episodes": in_order}


def episode_line(player: Player, name: str, index: int, row: Row, episode: Episode) -> str:
    """An episode as episode_log.py saves those of a training run, with the model's name in the place of the arm."""
    metadata = {**row.metadata, "tcod": episode}
    sample = Namespace(index=index, prompt=row.prompt, label=row.label, metadata=metadata)
    about = {"arm": Path(player.settings["model"]).name, "dataset": name}
    return json.dumps({**about, **transcript(sample, player.player.chat.tokenizer), "n": 0}) + "\n"


def saver(options: Namespace, player: Player, rows: list[Row], stack: ExitStack) -> Callable[[int, Episode], None]:
    """What saves an episode that has ended, in a file that is open as long as `stack`."""
    name = options.rows.stem
    path = options.episodes / "rollouts" / f"eval_{name}_000000.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(path.open("w"))
    return lambda index, played: print(episode_line(player, name, index, rows[index], played), end="", file=file)


def table(result: dict[str, Any]) -> str:
    lines = [f"{'task type':<32}{'episodes':>9}{'success':>9}{'95% interval':>17}{'turns':>7}"]
    for name, row in result["success"].items():
        interval = "[{:.3f}, {:.3f}]".format(*row["interval"])
        lines.append(f"{name:<32}{row['episodes']:>9}{row['success']:>9.3f}{interval:>17}{row['turns']:>7.1f}")
    if limited := sum(episode["context_limited"] for episode in result["episodes"]):
        lines.append(f"{limited} episodes ended because --max-context-len was reached")
    if result["failed"]:
        lines.append(f"{sum(result['failed'].values())} episodes failed and are not counted: {result['failed']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", type=Path, required=True, help="the tasks: JSONL rows, as a prepare tool writes them"
    )
    parser.add_argument("--out", type=Path, required=True, help="gets the result as JSON")
    parser.add_argument("--episodes", type=Path, metavar="DIR", help="save all episodes there, for show_rollouts")
    add_options(parser, temperature=0.4)
    options = parser.parse_args()
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        player = start(options)
        rows = player.read_rows(options.rows)
        with ExitStack() as stack:
            note = saver(options, player, rows, stack) if options.episodes else None
            result = asyncio.run(evaluate(player, rows, note))
    except (ConfigError, RuntimeError) as error:
        sys.exit(f"evaluate: {error}")
    if not result["episodes"]:
        sys.exit(f"evaluate: all {len(rows)} episodes failed ({result['failed']}): see the warnings above")
    about = {**player.settings, "rows": str(options.rows)}
    options.out.write_text(json.dumps({"settings": about, **result}, indent=1))
    print(table(result))


if __name__ == "__main__":
    main()
