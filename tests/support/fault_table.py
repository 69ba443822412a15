"""Write the faults that tests/episode/test_faults.py plays, and what they come to, as examples/tcod/FAULTS.md.

    python -m tests.support.fault_table
"""

from smoke import hooks

DOCUMENT = hooks.ROOT / "examples" / "tcod" / "FAULTS.md"

OPENING = """# Faults: what happens, what you see, what is counted

This file is written by `python -m tests.support.fault_table` from the cases of `tests/episode`: `test_faults.py`,
`test_resume.py` and `test_configuration.py` play every one of them through slime's rollout loop.

In every case the batch has its configured size, its masks and log-probs are aligned and finite, and each sample that
was drawn is trained on or counted. A dropped sample takes its group with it, and another group takes its place. The
quoted words are in the log, or in the one sentence with which the run stops. The metrics stand below `rollout/tcod/`.

`python -m tests.soak` mixes them: 2,007 episodes with 1% of each of 23 faults took 219 s (2 cores of an AMD EPYC,
commit 719f7db, 2026-11-23). Every episode was trained on or counted under its reason, exactly once. After a third of
them, memory changed by -1.1 MB per 1,000 episodes; file descriptors, threads and worker processes stayed the same.
"""

OUTCOMES = {"trained": "trained on", "dropped": "dropped and replaced", "stops": "the run stops"}


def document() -> str:
    from tests.episode.test_configuration import WRONG
    from tests.episode.test_resume import KILLS
    from tests.support.fault_cases import CASES

    parts = [OPENING]
    for part, cases in CASES.items():
        rows = [(case.fault, quoted(case.says), OUTCOMES[case.outcome], code(case.counted)) for case in cases]
        parts.append(table(part, ("fault", "what you see", "the sample", "counted"), rows))
    rows = [(kill.fault, kill.then) for kill in KILLS]
    parts.append(table("Driver", ("fault", "after a restart from the last checkpoint"), rows))
    rows = [
        (code(" ".join(f"{key}: {value!r}" for key, value in change.items())), quoted(says)) for change, says in WRONG
    ]
    parts.append(table("Settings", ("setting", "the run stops before its first rollout with"), rows))
    return "\n".join(parts)


def table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [" | ".join(row) for row in (head, ("---",) * len(head), *rows)]
    return f"## {title}\n\n" + "".join(f"| {line} |\n" for line in lines)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def quoted(text: str) -> str:
    return code(text.strip(" ;"))


if __name__ == "__main__":
    hooks.find_slime()
    DOCUMENT.write_text(document())
