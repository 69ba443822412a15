"""A game on OpenEnv's own server: `python -m tests.support.openenv_games PORT text|tools SESSIONS`. Needs openenv."""

import sys

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State

from .openenv_double import Guessing


class GuessAction(Action):
    guess: int


class GuessObservation(Observation):
    message: str
    tries: int


class ByText(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.game, self._state = Guessing(), State()

    @property
    def state(self) -> State:
        return self._state

    def reset(self, seed: int | None = None, largest: int = 8, **more) -> GuessObservation:
        return GuessObservation(**self.game.reset(seed, largest))

    def step(self, action: GuessAction, **more) -> GuessObservation:
        return GuessObservation(**self.game.guess(action.guess))


class ByTools(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("guessing")
        self.game, self._state, self.last = Guessing(), State(), {}

        @server.tool
        def guess(number: int) -> str:
            """Guess the number."""
            self.last = self.game.guess(number)
            return self.last["message"]

        @server.tool
        def bounds() -> dict:
            """Between what the number is."""
            return {"smallest": 1, "largest": self.game.largest}

        super().__init__(server)

    @property
    def state(self) -> State:
        return self._state

    def reset(self, seed: int | None = None, largest: int = 8, **more) -> Observation:
        self.last = self.game.reset(seed, largest)
        return Observation(metadata={"question": self.last["message"]})

    def _step_impl(self, action: Action, **more) -> Observation:
        return Observation(metadata={"error": "call a tool"})

    async def step_async(self, action: Action, **more) -> Observation:
        said = await super().step_async(action, **more)
        if isinstance(said, CallToolObservation):
            said.done, said.reward = self.last["done"], self.last["reward"]
        return said


if __name__ == "__main__":
    port, kind, sessions = sys.argv[1:]
    environment, action = {"text": (ByText, GuessAction), "tools": (ByTools, CallToolAction)}[kind]
    app = create_fastapi_app(environment, action, Observation, max_concurrent_envs=int(sessions))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")
