"""A few episodes as a table in slime's trackers: a wandb.Table with --use-wandb, a text with --use-tensorboard."""

import logging
from argparse import Namespace
from typing import Any

logger = logging.getLogger(__name__)

ROWS = 4
COLUMNS = ["task", "outcome", "k", "replayed", "turns", "KL, nats", "what happened"]
_MAX_CELL = 2000  # characters
_HARMLESS = {ord(mark): f"&#{ord(mark)};" for mark in "&<>|[]()*_`!\\#:"} | {ord("\n"): "<br>", ord("\r"): " "}


def tracks(args: Namespace) -> bool:
    return bool(getattr(args, "use_wandb", False) or getattr(args, "use_tensorboard", False))


def show_table(args: Namespace, stem: str, rollout_id: int, transcripts: list[dict[str, Any]]) -> None:
    """Log the first transcripts of a rollout ("train") or an evaluation ("eval_NAME"). Never raises."""
    if not tracks(args) or not transcripts:
        return
    try:
        from slime.observability.metric_utils import compute_rollout_step

        section = "rollout" if stem == "train" else "eval"
        name = f"{section}/tcod/episodes" if stem == "train" else f"eval/tcod/{stem.removeprefix('eval_')}/episodes"
        step = compute_rollout_step(args, rollout_id)
        table = [_row(one) for one in transcripts[:ROWS]]
        if getattr(args, "use_wandb", False):
            import wandb

            wandb.log({name: wandb.Table(columns=COLUMNS, data=table), f"{section}/step": step})
        if getattr(args, "use_tensorboard", False):
            from slime.observability.tensorboard_utils import _TensorboardAdapter

            _TensorboardAdapter(args)._writer.add_text(name, _markdown(table), step)
    except Exception as error:
        logger.warning("the tracker gets no table of episodes: %r", error)


def _row(one: dict[str, Any]) -> list[Any]:
    steps = [f"{'[replayed] ' if turn['role'] == 'replayed' else ''}{turn['action']}" for turn in one["turns"]]
    outcome = one["failure"] or ("won" if one["won"] else "lost")
    played = sum(turn["role"] == "student" for turn in one["turns"])
    texts = [_printable(text) for text in (one["goal"], outcome, "\n".join([*steps, one["outcome"]]))]
    return [texts[0], texts[1], one["k"], one["replayed"], played, one["kl"], texts[2]]


def _printable(text: str) -> str:
    """Without broken surrogates, which no tracker can send."""
    return text[:_MAX_CELL].encode("utf-8", "replace").decode()


def _markdown(table: list[list[Any]]) -> str:
    """Text is data: nothing in a cell is a link, an image or markup."""
    rows = [["" if cell is None else str(cell).translate(_HARMLESS) for cell in row] for row in [COLUMNS, *table]]
    rows.insert(1, ["---"] * len(COLUMNS))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
