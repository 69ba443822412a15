"""Calls of tools in a model's answers, as SGLang's own parsers find them: tcod_tool_parser."""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from .. import ConfigError, words


def find_calls(parser: str | None, answer: str, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """[{"name": .., "arguments": ..}, ..]: an answer's calls of these tools, as far as they are well-formed.

    Raises:
        ConfigError: see load_parser.
    """
    of_tools = load_parser(parser)
    try:
        _, found = of_tools(tools).parse_non_stream(answer)
        calls = [{"name": call.name, "arguments": json.loads(call.parameters)} for call in found]
        json.dumps(calls, ensure_ascii=False).encode()  # JSON can name half of a surrogate pair
    except Exception:  # whatever a parser makes of a malformed call
        return []
    return calls


@functools.cache
def load_parser(name: str | None) -> Callable[[Sequence[dict[str, Any]]], Any]:
    """What makes SGLang's parser of this name (qwen, llama3, ..) for some tools.

    Raises:
        ConfigError: there is none of this name, or no SGLang.
    """
    try:  # here: it takes seconds, and an environment without tools needs none
        from sglang.srt.entrypoints.openai.protocol import Tool
        from sglang.srt.function_call.function_call_parser import FunctionCallParser
    except Exception as error:
        raise ConfigError(f"tcod_tool_parser needs SGLang, which does not load, {words(error)}: install it") from error
    if name not in (known := FunctionCallParser.ToolCallParserEnum):
        raise ConfigError(f"tcod_tool_parser {name} is none of SGLang's parsers: take one of {', '.join(known)}")
    logging.getLogger("sglang.srt.function_call").setLevel(logging.ERROR)  # it warns of every malformed call
    return lambda tools: FunctionCallParser([Tool(**tool) for tool in tools], name)
