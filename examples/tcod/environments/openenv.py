"""An environment of OpenEnv, behind its server: pip install websockets. docs/HUBS.md has rows and settings for two.

Rows carry `metadata["reset"]` (its arguments), `metadata["rules"]` (the system turn), perhaps `metadata["tools"]`.
"""

import contextlib
import json
from dataclasses import replace
from typing import Any

from .protocol import Environment, Observation, calls_of


class OpenEnvEnvironment(Environment):
    """A session of the server, which must allow tcod_env_workers x tcod_envs_per_worker of them, and two at least.

    Args:
        url: of the server's sessions, as ws://127.0.0.1:8000/ws.
        text: what the student reads of an observation, whose fields are named in braces. Tools say their own results.
        action: the field of the environment's action that gets the student's text, where it calls no tools.
        won: an episode that ends with this reward, or with more, is a success.
    """

    def __init__(self, data_root: str, url: str, text: str, action: str = "message", won: float = 1.0) -> None:
        super().__init__(data_root)
        from websockets.sync.client import connect

        self.text, self.action, self.won = text, action, won
        try:
            self._session = connect(url, max_size=None).__enter__()
        except Exception as error:
            raise OSError(f"no OpenEnv server answers at {url} ({error}): see url in docs/HUBS.md") from error

    def reset(self, metadata: dict[str, Any]) -> Observation:
        """Begin an episode. Raises RuntimeError with what the server says."""
        self._has_tools = "tools" in metadata
        return self._ask("reset", metadata["reset"])

    def step(self, action: str) -> Observation:
        """Send an action, or the calls of an answer until one ends the episode. Raises RuntimeError."""
        if not self._has_tools:
            return self._ask("step", {self.action: action})
        results, last = [], Observation("Call a tool.", refused=True)
        for call in calls_of(action):
            last = self._ask("step", {"type": "call_tool", "tool_name": call["name"], "arguments": call["arguments"]})
            results.append(last.text)
            if last.done:
                break
        return replace(last, role="tool", results=tuple(results)) if results else last

    def _ask(self, kind: str, data: dict[str, Any]) -> Observation:
        with contextlib.suppress(Exception):  # a full server closes: what it said before is still to be read
            self._session.send(json.dumps({"type": kind, "data": data}))
        said = json.loads(self._session.recv(timeout=60))["data"]  # seconds, below tcod_env_timeout_s
        if (faults := said.get("errors")) and all(fault["loc"] == [self.action] for fault in faults):
            return Observation("; ".join(fault["msg"] for fault in faults), refused=True)
        if "code" in said:
            raise RuntimeError(f"OpenEnv's server says {said['code']}: {faults or said['message']} (see docs/HUBS.md)")
        reward, fields = float(said["reward"] or 0), said["observation"]
        text = _result(fields) if "tool_name" in data else self._shown(fields)
        return Observation(text, said["done"] and reward >= self.won, said["done"], reward=reward)

    def _shown(self, fields: dict[str, Any]) -> str:
        try:
            return self.text.format_map(fields)
        except (LookupError, ValueError) as error:
            raise ValueError(f"text in tcod_env_args has not the form of {fields} ({error!r})") from error

    @staticmethod
    def check_row(metadata: dict[str, Any], data_root: str) -> None:
        """Raise ValueError if the row lacks a key; what is wrong with its value, the server says."""
        if not (isinstance(metadata.get("reset"), dict) and isinstance(metadata.get("rules"), str)):
            raise ValueError("its metadata has not both reset, an object, and rules, a text")

    @staticmethod
    def system_prompt(metadata: dict[str, Any]) -> str:
        """The row's rules."""
        return metadata["rules"]

    @staticmethod
    def tools(metadata: dict[str, Any]) -> list[dict[str, Any]]:
        """The row's tools."""
        return metadata.get("tools", [])


def _result(fields: dict[str, Any]) -> str:
    if fields.get("error"):
        return f"error: {fields['error']['message']}"
    said = (fields.get("result") or {}).get("content", ())
    return "\n".join(part["text"] for part in said if part["type"] == "text") or "(no result)"
