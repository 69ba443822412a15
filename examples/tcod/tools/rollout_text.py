"""A saved episode as text for a terminal: who said what, which tokens are trained, what each turn costs in KL."""

import unicodedata
from collections.abc import Sequence

from ..records.saved_episodes import Transcript, Turn


def shortest_won(episodes: Sequence[Transcript]) -> Transcript:
    """The one to show first: a short one of the last rollout that was won, if there is any."""
    trained = [one for one in episodes if one.dataset == "train" and not one.failure] or episodes
    last = [one for one in trained if one.n == max(other.n for other in trained)]
    return min(
        last, key=lambda one: (not one.won, sum(turn.context_tokens + turn.response_tokens for turn in one.turns))
    )


def rollout_text(episode: Transcript) -> str:
    """Every turn in order: the context that precedes the response, as the model saw it, and the response.

    The student's responses are sampled and trained, with their number of tokens and KL in nats (log student - log
    teacher, summed). Nothing else is trained. Where no tokens were kept, the observation and the action are shown.
    """
    lines = [_head(episode)]
    for turn in episode.turns:
        if turn.context_tokens:
            lines.append(f"--- context, {turn.context_tokens} tokens, not trained")
        lines += [turn.observation.join(turn.context) if turn.context else turn.observation, _said(turn)]
        lines.append("".join(turn.tokens or turn.response) or f"> {turn.action}")
    if episode.outcome:
        lines += ["--- the environment's last answer", episode.outcome]
    sampled = sum(turn.response_tokens for turn in episode.turns if turn.role == "student")
    total = sum(turn.context_tokens + turn.response_tokens for turn in episode.turns)
    lines.append(f"--- {sampled} of {total} tokens sampled{_kl(episode.kl, ', trajectory KL')}")
    return "\n".join(lines) + "\n"


def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters as escapes."""
    return "".join(
        (
            character
            if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
            else character.encode("unicode_escape", "surrogatepass").decode()
        )
        for character in text
    )


def _head(episode: Transcript) -> str:
    ending = episode.failure or ("won" if episode.won else "not won")
    if episode.failure and episode.detail:
        ending = f"failed, {ending}: {episode.detail}"
    depth = "" if episode.k is None else f", depth k = {episode.k}"
    reward = "" if episode.reward is None else f", reward {episode.reward:g}"
    played = sum(turn.role == "student" for turn in episode.turns)
    return (
        f"{episode.arm}, {episode.dataset}, step {episode.n}{depth}: {episode.goal}\n{episode.task}\n"
        f"{episode.replayed} turns replayed, {played} of at most {episode.budget} played, {ending}{reward}"
    )


def _said(turn: Turn) -> str:
    notes = {
        "no valid format": not turn.valid,
        "not an admissible action": not turn.admissible,
        "refused by the environment": turn.refused,
        "cut by the length limit": turn.cut,
    }
    trained = f" sampled{_kl(turn.kl, ', KL')}" if turn.role == "student" else ", not trained"
    tokens = f", {turn.response_tokens} tokens{trained}" if turn.response_tokens else ""
    return ", ".join([f"--- {turn.role}, turn {turn.turn + 1}{tokens}", *(note for note in notes if notes[note])])


def _kl(value: float | None, name: str) -> str:
    return "" if value is None else f"{name} {value:+.2f} nats"
