"""Command lines without the keys and passwords in them, for all that is printed or written."""

import re

_SECRET_NAME = re.compile(r"(wandb|api|access|auth|hf|hub).*(key|token)|secret|password", re.IGNORECASE)
_OPTION = re.compile(r"""(--\S+?[ =])(?!--)('[^']*'|\S+)""")  # --name VALUE, --name='VALUE'
_LOGIN = re.compile(r"(?<=://)[^/@\s\"]+(?=@)")  # me:word of https://me:word@host


def without_secrets(command: str) -> str:
    """A command line in which options with a secret name, and logins in addresses, have no value."""
    return _LOGIN.sub("SECRET", _OPTION.sub(_without_secret, command))


def _without_secret(option: re.Match[str]) -> str:
    """An option of a secret name; a JSON object is hidden whole if it holds one."""
    named = option[0] if option[2].startswith("'{") else option[1]
    return f"{option[1]}SECRET" if _SECRET_NAME.search(named) else option[0]
