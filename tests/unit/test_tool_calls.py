"""Tool calls as tokens: an answer says the markers that its template writes for a call; other text never does."""

import functools
import json
from dataclasses import replace

import pytest

from examples.tcod.episode.demonstration import Demonstration
from examples.tcod.episode.history import AppendHistory, TurnHistory
from examples.tcod.model.chat_template import Rules
from examples.tcod.model.student import Response
from examples.tcod.model.tool_calls import find_calls
from smoke import cpu_only
from tests.support.real_tokenizers import chat_with

cpu_only.prepare()

NUM_GPUS = 0
LLAMA_3_1 = (  # the shape of Llama 3.1's own template
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    "<|end_header_id|>{{ '\\n\\n' }}{% if m.tool_calls %}{{ raise_exception('single') if m.tool_calls|length > 1 }}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments|tojson }}}'
    "{% else %}{% for t in (tools or []) if m.role == 'system' %}{{ t|tojson }}{{ '\\n\\n' }}{% endfor %}"
    "{{ m.content|tojson if m.role == 'tool' else m.content|trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
)
DEEPSEEK = (  # the shape of SGLang's template for DeepSeek-V3 with tools
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% for t in tools or [] %}"
    "{{ '\\n' }}{{ t|tojson }}{% endfor %}{% elif m.role == 'user' %}<｜User｜>{{ m.content }}<｜Assistant｜>"
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<｜tool▁outputs▁begin｜>{% endif %}"
    "<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<｜tool▁outputs▁end｜>{% endif %}"
    "{% else %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{% if loop.first %}<｜tool▁calls▁begin｜>{% endif %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    "{{ c.function.name }}{{ '\\n```json\\n' }}{{ c.function.arguments|tojson }}{{ '\\n```' }}<｜tool▁call▁end｜>"
    "{% if loop.last %}<｜tool▁calls▁end｜>{% endif %}{% endfor %}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
)
# name: its template, keyword arguments, content and arguments as it wants them, calls at once, the markers
FAMILIES = {
    "qwen3": (None, {"enable_thinking": False}, "", dict, 2, {"<tool_call>", "</tool_call>"}),
    "llama3_1": (LLAMA_3_1, {}, None, dict, 1, set()),
    "deepseek_v3": (
        *(None, {}, None, json.dumps, 2),
        {
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        },
    ),
}
MAY_SAY = {
    name: family[-1] | ({"<think>", "</think>"} if name == "qwen3" else set()) for name, family in FAMILIES.items()
}
each = pytest.mark.parametrize("name", FAMILIES)


def conversation(name, chat):
    """(the answer of an agent that calls tools, the ids of a conversation with it), both by the template itself."""
    _, kwargs, content, arguments, count, _ = FAMILIES[name]
    function = {"name": "query", "arguments": arguments({"sql": "SELECT 'é'"})}
    calls = [{"type": "function", "id": "call00000", "function": function}] * count
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")]
    render = functools.partial(chat.tokenizer.apply_chat_template, add_generation_prompt=True, **kwargs)
    before, after = render(turns, tokenize=False).split("ASSISTANT")
    turns[2] = {"role": "assistant", "content": content, "tool_calls": calls}
    answer = render(turns, tokenize=False).removeprefix(before).removesuffix(after)
    assert "query" in answer and chat.tokenizer.decode([chat.end_of_turn]) not in answer
    return answer, render(turns, return_dict=False)


def names_in(chat, ids):
    """The added tokens among ids."""
    added = chat.tokenizer.added_tokens_decoder
    return {added[i].content for i in ids if i in added} - {chat.tokenizer.decode([chat.end_of_turn])}


@each
def test_a_replayed_call_has_the_templates_own_tokens(name):
    chat = chat_with(name, *FAMILIES[name][:2])
    answer, ids = conversation(name, chat)
    said = chat.assistant(answer)
    assert said in [ids[i : i + len(said)] for i in range(len(ids))]
    assert names_in(chat, said) == FAMILIES[name][-1]


@each
def test_a_past_call_is_shown_as_the_template_shows_it(name):
    chat = chat_with(name, *FAMILIES[name][:2], history="turns")
    answer, ids = conversation(name, chat)
    history = TurnHistory(chat, 10**6)
    history.begin("SYSTEM", "USER")
    sampled = chat.assistant(answer)
    history.add_response(Response(sampled, [-0.1] * len(sampled), False, {}))
    history.add_turn("USER")
    assert history.context == ids


@each
def test_a_recorded_call_replays_with_the_ids_that_were_sampled(name):
    """Characters one by one, as no tokenizer encodes them; the markers are what they are."""
    chat = chat_with(name, *FAMILIES[name][:2])
    answer, _ = conversation(name, chat)
    added = chat.tokenizer.added_tokens_decoder
    ids = [i for token in chat.assistant(answer) for i in ([token] if token in added else spelled(chat, token))]
    demo = Demonstration((answer,), (answer,), (ids,), chat.vocabulary)
    assert len(ids) > len(chat.assistant(answer)) and demo.sampled_ids(0, chat) == ids
    (foreign, *_) = sorted(added.keys() - {*chat.assistant(answer)} - chat.stop_ids)
    ids = [foreign, *ids]
    assert replace(demo, ids=(ids,), responses=(chat.decode(ids),)).sampled_ids(0, chat) is None


def spelled(chat, token):
    text = chat.tokenizer.decode([token])
    return [i for c in text for i in chat.assistant(c)[:-1]] if "\ufffd" not in text else [token]


@each
def test_markers_in_other_text_and_other_names_in_an_answer_are_text(name):
    for history in ("append", "turns"):
        chat = chat_with(name, *FAMILIES[name][:2], history=history)
        everything = " ".join(token.content for token in chat.tokenizer.added_tokens_decoder.values())
        assert names_in(chat, chat.user(everything)) == names_in(chat, chat.user(""))
        shown = names_in(chat, chat.context([everything, everything, everything, everything]))
        assert shown <= names_in(chat, chat.context(["", "", "", ""])) | MAY_SAY[name]
        assert names_in(chat, chat.assistant(everything)) == MAY_SAY[name]


# name: a template that writes tools, and SGLang's parser of its calls
TOOLS = {"qwen3": (None, "qwen"), "llama3_1": (LLAMA_3_1, "llama3"), "deepseek_v3": (DEEPSEEK, "deepseekv3")}
TOOL = {"type": "function", "function": {"name": "query", "parameters": {"type": "object", "properties": {}}}}


@each
def test_tools_calls_and_results_are_the_templates_own_rendering(name):
    """Token for token, in both histories; and what a template writes for calls, its parser reads as the same calls."""
    (template, parser), (_, kwargs, _, _, count, _) = TOOLS[name], FAMILIES[name]
    calls = [{"name": "query", "arguments": {"sql": f"SELECT {i}, 'é'"}} for i in range(count)]
    made = [{"type": "function", "id": "call00000", "function": call} for call in calls]
    results = [f"row {i}\n- x" for i in range(count)]
    for history in ("append", "turns"):
        chat = chat_with(name, template, kwargs, history=history, tools=True)
        player = {"append": AppendHistory, "turns": TurnHistory}[history](chat, 10**6)
        player.begin(Rules("Rules.", [TOOL]), "How many?")
        answer = chat.call(calls)
        player.add_replayed(answer, None)
        player.add_turn(tuple(results))
        player.add_replayed("I see.", None)
        player.add_turn("Go on.")
        messages = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "How many?"}]
        messages += [{"role": "assistant", "content": "", "tool_calls": made}]
        messages += [{"role": "tool", "tool_call_id": "call00000", "content": text} for text in results]
        messages += [{"role": "assistant", "content": "I see."}, {"role": "user", "content": "Go on."}]
        render = functools.partial(chat.tokenizer.apply_chat_template, add_generation_prompt=True, **kwargs)
        theirs = render(messages, tools=[TOOL], tokenize=False)
        block = "<think>\n\n</think>\n\n"  # before every answer in one growing context
        assert chat.tokenizer.decode(player.context).replace(block, "") == theirs.replace(block, "")
        if history == "turns":
            assert player.context == render(messages, tools=[TOOL], return_dict=False)
    assert find_calls(parser, f"Hm.\n{answer}" if count > 1 else answer, [TOOL]) == calls
    for malformed in (answer.rpartition('"}')[0], answer[::-1], "no call", answer.replace("query", "drop")):
        assert find_calls(parser, malformed, [TOOL]) in ([], calls[:-1])
