"""What is secret in settings and commands: one rule for all that is printed or written down.

A value is secret by its name (api_key, WANDB_API_KEY, --wandb-key, password, HF_TOKEN), a URL's user and password by
their place. slime's names of columns (--input-key, --label-key, ..) are no secrets, and neither are counts of tokens.
"""

import contextlib
import json
import re
from collections.abc import Callable
from typing import Any

_COLUMNS = "".join(f"(?<!{name}[-_])" for name in ("input", "label", "tool", "metadata", "reward", "routing"))
_NAME = re.compile(
    rf"secret|passw|credential|authorization|api[-_]?keys$|(?:^|[-_]|api|access|auth){_COLUMNS}(?:key|token)$", re.I
)
_LOGIN = re.compile(r"(?<=://)[^/\s\"']+(?=@)")


def is_secret(name: str) -> bool:
    """Whether a variable, setting or option of this name holds one."""
    return bool(_NAME.search(name))


def without_secrets(value: Any, hide: Callable[[str], str] = lambda secret: "SECRET") -> Any:
    """The value with `hide(secret)` for each secret, in mappings, lists and JSON texts, however deep.

    A list may be a command, where an option's value is the next word or stands after a "=".
    """
    match value:
        case dict():
            return {str(name): _named(str(name), one, hide) for name, one in value.items()}
        case list() | tuple():
            options = ["", *(one if str(one).startswith("--") else "" for one in value)]
            return [_named(name, one, hide) for name, one in zip(options, value, strict=False)]
        case str() if value.startswith("{"):
            with contextlib.suppress(ValueError):
                return json.dumps(without_secrets(json.loads(value), hide), ensure_ascii=False)
        case str() if value.startswith("--") and "=" in value:
            name, _, rest = value.partition("=")
            return f"{name}={_named(name, rest, hide)}"
    return _LOGIN.sub(lambda login: hide(login[0]), value) if isinstance(value, str) else value


def text_without(text: str, *sources: Any) -> str:
    """A text without the secrets that are in `sources`, except those of a few letters, which stand in any text."""
    found: list[str] = []
    without_secrets(sources, lambda secret: found.append(secret) or "SECRET")
    for secret in sorted(found, key=len, reverse=True):
        text = text.replace(secret, "SECRET") if len(secret) > 3 else text
    return text


def _named(name: str, value: Any, hide: Callable[[str], str]) -> Any:
    """What the name holds."""
    return hide(str(value)) if value and value is not True and is_secret(name) else without_secrets(value, hide)
