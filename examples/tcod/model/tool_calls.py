"""Calls of tools in a model's answers, as SGLang's own parsers find them: tcod_tool_parser."""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import ConfigError, words


@dataclass(frozen=True)
class ToolParser:
    """One of SGLang's function-call parsers, by its name there (qwen, llama3, ..)."""

    name: str | None

    def calls(self, answer: str, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """[{"name": .., "arguments": ..}, ..]: an answer's calls of these tools, as far as they are well-formed.

        Raises:
            ConfigError: see load.
        """
        of_tools = self.load()
        try:
            _, found = of_tools(tools).parse_non_stream(answer)
            calls = [{"name": call.name, "arguments": json.loads(call.parameters)} for call in found]
            json.dumps(calls, ensure_ascii=False).encode()  # JSON can name half of a surrogate pair
        except Exception:  # whatever a parser makes of a malformed call
            return []
        return calls

    def load(self) -> Callable[[Sequence[dict[str, Any]]], Any]:
        """SGLang's parser of calls of some tools. Raises ConfigError: there is none of this name, or no SGLang."""
        return _load(self.name)


@functools.cache
def _load(name: str | None) -> Callable[[Sequence[dict[str, Any]]], Any]:
    try:  # here: it takes seconds, and an environment without tools needs none
        from sglang.srt.entrypoints.openai.protocol import Tool
        from sglang.srt.function_call.function_call_parser import FunctionCallParser
    except Exception as error:
        raise ConfigError(
            f"tcod_tool_parser needs SGLang, which does not load ({words(error)}): install it"
        ) from error
    if name not in (known := FunctionCallParser.ToolCallParserEnum):
        raise ConfigError(f"tcod_tool_parser {name} is none of SGLang's parsers: take one of {', '.join(known)}")
    logging.getLogger("sglang.srt.function_call").setLevel(logging.ERROR)  # it warns of every malformed call
    return lambda tools: FunctionCallParser([Tool(**tool) for tool in tools], name)
