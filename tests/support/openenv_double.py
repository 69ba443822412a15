"""A double of OpenEnv's server (0.10): its WebSocket, its errors and its sessions, with a game behind it."""

import contextlib
import json
import random
import threading
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve


class Guessing:
    """A number is guessed, within five tries. Its answers are fields of an observation, with reward and done."""

    def reset(self, seed: int | None = None, largest: int = 8, **ignored: Any) -> dict[str, Any]:
        if largest < 1:
            raise ValueError("largest is below 1")
        self.number, self.largest, self.tries = random.Random(seed).randint(1, largest), largest, 0
        return self._said(f"Which number from 1 to {largest}?", None, False)

    def guess(self, guess: int) -> dict[str, Any]:
        self.tries += 1
        if guess == self.number:
            return self._said("Right.", 1.0, True)
        return self._said("Larger." if guess < self.number else "Smaller.", -0.1, self.tries == 5)

    def _said(self, message: str, reward: float | None, done: bool) -> dict[str, Any]:
        return {"message": message, "tries": self.tries, "reward": reward, "done": done}


class _Message(BaseModel, extra="forbid"):
    type: Literal["reset", "step"]
    data: dict[str, Any]


class _Guess(BaseModel, extra="forbid"):
    guess: int


class _Tool(BaseModel, extra="forbid"):
    type: Literal["list_tools", "call_tool"]
    tool_name: str = ""
    arguments: dict[str, Any] = {}


_SCHEMAS = {
    "guess": {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]},
    "bounds": {"type": "object", "properties": {}},
}


class OpenEnvDouble:
    """Serves while its block is open. Each connection is a session with a game of its own, `sessions` at most."""

    def __init__(self, tools: bool, sessions: int) -> None:
        self._tools, self._sessions, self._open, self._lock = tools, sessions, 0, threading.Lock()
        self._server = serve(self._play, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}/ws"

    def __enter__(self) -> "OpenEnvDouble":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()

    def _play(self, connection: ServerConnection) -> None:
        with self._lock:
            self._open += 1
            full = self._open > self._sessions
        try:
            if full:
                most = f"{self._sessions}/{self._sessions} sessions active"
                connection.send(
                    _error("CAPACITY_REACHED", f"Server at capacity: {most}. Cannot accept new connections.")
                )
                return
            game = Guessing()
            with contextlib.suppress(ConnectionClosed):
                for text in connection:
                    connection.send(self._answer(game, text))
        finally:
            with self._lock:
                self._open -= 1

    def _answer(self, game: Guessing, text: str) -> str:
        try:
            message = _Message.model_validate_json(text)
            if message.type == "reset":
                said = game.reset(**message.data)
                fields = {"metadata": {"question": said["message"]}} if self._tools else _fields(said)
            elif self._tools:
                said, fields = _use(game, _Tool.model_validate(message.data))
            else:
                said = game.guess(_Guess.model_validate(message.data).guess)
                fields = _fields(said)
        except ValidationError as error:
            return _error("VALIDATION_ERROR", "Invalid message", errors=error.errors())
        except Exception as error:
            return _error("EXECUTION_ERROR", str(error))
        data = {"observation": fields, "reward": said["reward"], "done": said["done"]}
        return json.dumps({"type": "observation", "data": data})


def _error(code: str, message: str, **more: Any) -> str:
    return json.dumps({"type": "error", "data": {"message": message, "code": code, **more}})


def _fields(said: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {}, "message": said["message"], "tries": said["tries"]}


def _use(game: Guessing, tool: _Tool) -> tuple[dict[str, Any], dict[str, Any]]:
    said, result, error = {"reward": None, "done": False}, None, None
    if tool.type == "list_tools":
        listed = [{"name": name, "description": "", "input_schema": schema} for name, schema in _SCHEMAS.items()]
        return said, {"metadata": {}, "tools": listed}
    if tool.tool_name not in _SCHEMAS:
        error = {"error_type": "tool_not_found", "message": f"Unknown tool: {tool.tool_name!r}"}
    elif set(tool.arguments) != set(_SCHEMAS[tool.tool_name]["properties"]):
        error = {"error_type": "invalid_args", "message": f"validation error for call[{tool.tool_name}]"}
    elif tool.tool_name == "bounds":
        result = json.dumps({"smallest": 1, "largest": game.largest}, separators=(",", ":"))
    else:
        said = game.guess(int(tool.arguments["number"]))
        result = said["message"]
    content = {"content": [{"type": "text", "text": result}], "is_error": False}
    answer = {"metadata": {}, "tool_name": tool.tool_name, "result": content if result else None, "error": error}
    return said, answer
