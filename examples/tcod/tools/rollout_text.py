"""A saved episode as text for a terminal: who said what, which tokens are trained, what each turn costs in KL."""

import unicodedata
from collections.abc import Sequence
from typing import Any


def shortest_won(episodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one to show first: a short one of the last rollout that was won, if there is any."""
    trained = [one for one in episodes if one["dataset"] == "train" and not one["failure"]] or episodes
    last = [one for one in trained if one["n"] == max(other["n"] for other in trained)]
    return min(last, key=lambda one: (not one["won"], sum(span["count"] for span in one["spans"])))


def rollout_text(episode: dict[str, Any]) -> str:
    """Every span of the sequence in order.

    "student" spans are sampled and trained, with their number of tokens and KL in nats (log student - log teacher,
    summed). The others are not trained. An episode without spans failed before it was complete: its turns are listed.
    """
    played = [turn for turn in episode["turns"] if turn["role"] == "student"]
    lines = [_head(episode, len(played))]
    by_index = {turn["turn"]: turn for turn in played}
    for span in episode["spans"]:
        if span["role"] == "sampled":
            lines.append(_student(span, by_index[span["turn"]]))
            lines.append(span.get("text") or "".join(span["tokens"]))
        elif span["count"]:
            turn = f" turn {span['turn'] + 1}," if span["role"] == "replayed" else ""
            lines += [f"--- {span['role']},{turn} {span['count']} tokens, not trained", span["text"]]
    if not episode["spans"]:
        for turn in episode["turns"]:
            lines += [f"--- turn {turn['turn'] + 1}, {turn['role']}", turn["observation"], f"> {turn['action']}"]
    if episode["outcome"]:
        lines += ["--- the environment's last answer", episode["outcome"]]
    sampled = sum(span["count"] for span in episode["spans"] if span["role"] == "sampled")
    total = sum(span["count"] for span in episode["spans"])
    lines.append(f"--- {sampled} of {total} tokens sampled{_kl(episode['kl'], ', trajectory KL')}")
    return "\n".join(lines) + "\n"


def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters and broken surrogates as escapes."""
    return "".join(
        (
            character
            if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
            else character.encode("unicode_escape", "surrogatepass").decode()
        )
        for character in text
    )


def _head(episode: dict[str, Any], played: int) -> str:
    ending = episode["failure"] or ("won" if episode["won"] else "not won")
    if episode["failure"] and episode["detail"]:
        ending = f"failed, {ending}: {episode['detail']}"
    depth = "" if episode["k"] is None else f", depth k = {episode['k']}"
    return (
        f"{episode['arm']}, {episode['dataset']}, step {episode['n']}{depth}: {episode['goal']}\n"
        f"{episode['replayed']} turns replayed, {played} of at most {episode['budget']} played, {ending}"
    )


def _student(span: dict[str, Any], turn: dict[str, Any]) -> str:
    notes = [
        "" if turn["valid"] else ", no valid format",
        "" if turn["admissible"] else ", not an admissible action",
        ", cut by the length limit" if turn["cut"] else "",
    ]
    what = f"{span['count']} tokens sampled{_kl(turn['kl'], ', KL')}"
    return f"--- student, turn {turn['turn'] + 1}, {what}{''.join(notes)}"


def _kl(value: float | None, name: str) -> str:
    return "" if value is None else f"{name} {value:+.2f} nats"
