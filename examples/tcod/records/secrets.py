"""Commands, settings and addresses without the keys and passwords in them, for all that is printed or written."""

import contextlib
import json
import re
from typing import Any

_SECRET_NAME = re.compile(r"(wandb|api|access|auth|hf|hub).*(key|token)|secret|password", re.IGNORECASE)
_OPTION = re.compile(r"""(--\S+?[ =])(?!--)('[^']*'|\S+)""")  # --name VALUE, --name='VALUE'
_LOGIN = re.compile(r"(?<=://)[^/@\s\"]+(?=@)")  # me:word of https://me:word@host


def without_secrets(command: str) -> str:
    """A command line in which options with a secret name, and logins in addresses, have no value."""
    return _LOGIN.sub("SECRET", _OPTION.sub(_without_secret, command))


def public(value: Any) -> Any:
    """Settings without the values of secret names, however deep, and without logins; also in a text that is JSON."""
    if isinstance(value, dict):
        return {str(k): "SECRET" if v and _SECRET_NAME.search(str(k)) else public(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [public(one) for one in value]
    if not isinstance(value, str):
        return value
    if value.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.dumps(public(json.loads(value)))
    return _LOGIN.sub("SECRET", value)


def _without_secret(option: re.Match[str]) -> str:
    """An option of a secret name; a JSON object is hidden whole if it holds one."""
    named = option[0] if option[2].startswith("'{") else option[1]
    return f"{option[1]}SECRET" if _SECRET_NAME.search(named) else option[0]
