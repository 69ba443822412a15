"""TCOD: multi-turn on-policy distillation with a temporal curriculum. README.md says how to run and adapt it.

Here: what can go wrong, with a run (ConfigError) or with one episode (Failure).
"""

PACKAGE = __name__  # examples.tcod, or whatever the folder is called


class ConfigError(ValueError):
    """A setting, a file or a server that cannot work. The message is one sentence that names it and the fix."""


class Failure(Exception):
    """An episode, or a demonstration, that cannot be used. `reason` is what is counted; FAULTS.md lists them."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


ABORTED = "aborted"  # the one reason that is nobody's fault: slime has all the episodes it needs


def words(error: BaseException) -> str:
    """An exception as one line: its type, and what it says."""
    if isinstance(error, ModuleNotFoundError):
        return f"ModuleNotFoundError: {error.name} is not installed"
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
