"""Agents that call tools: whole episodes on a template in Qwen3's shape, with SGLang's own parser."""

import json

import pytest
from transformers import AutoTokenizer

from examples.tcod import ConfigError
from smoke import cpu_only
from tests.support.corridor import ToolCorridor
from tests.support.toys import TOOL_TEMPLATE, TOOL_TOKENS

cpu_only.prepare()

TOOLS = {"tcod_environment": "tests.support.corridor.ToolCorridor", "tcod_tool_parser": "qwen"}
TOOLS |= {"rollout_max_response_len": 250}
END = "<|im_end|>"


def call(*ways):
    calls = [f'<tool_call>\n{{"name": "move", "arguments": {{"way": "{way}"}}}}\n</tool_call>' for way in ways]
    return "\n".join(calls)


def action(*ways):
    return json.dumps([{"name": "move", "arguments": {"way": way}} for way in ways])


def told(text):
    return f"\n<|im_start|>user\n{text}{END}\n<|im_start|>assistant\n"


def results(*texts):
    return told("\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts))


@pytest.fixture
def tools(rig, tmp_path):
    return with_tools(rig, tmp_path / "tools")


def with_tools(rig, folder):
    """A rig with a checkpoint that writes tools."""
    tokenizer = AutoTokenizer.from_pretrained(rig.checkpoint)
    tokenizer.add_tokens(TOOL_TOKENS)
    tokenizer.chat_template = TOOL_TEMPLATE
    rig.checkpoint, rig.tokenizer = folder, tokenizer
    tokenizer.save_pretrained(rig.checkpoint)
    return rig


def opening(goal):
    tool = json.dumps(ToolCorridor.tools({})[0])
    return f"<|im_start|>system\nWalk.\n{tool}{END}{told(f'Goal: door {goal}. You are at door 0.')}"


def as_in_the_prompt(tokenizer, goal, *more):
    """Ids of an episode's beginning, in which the tool's description names a marker and is text."""
    head, tail = opening(goal).split("<tool_call>")
    texts = [head, *"<tool_call>", tail + "".join(more)]
    return [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]


def test_calls_and_results_are_turns_and_a_malformed_call_is_answered(tools):
    said = [call("right", "right"), f"Hm. {call('right')[:-20]}", call("left", "right", "right")]
    tools.script = said
    (sample,), metrics = tools.rollout([{"goal": 3}], **TOOLS)
    context = [results("You are at door 1.", "You are at door 2."), told("Call move.")]
    ids = tools.tokenizer.encode
    parts = [said[0] + END, context[0], said[1] + END, context[1], said[2] + END]
    expected = [ids(part, add_special_tokens=False) for part in parts]
    assert sample.tokens[-sample.response_length :] == [i for part in expected for i in part]
    assert sample.loss_mask == [1 - i % 2 for i, part in enumerate(expected) for _ in part]
    assert sample.tokens[: -sample.response_length] == as_in_the_prompt(tools.tokenizer, 3)
    turns = sample.metadata["tcod"]["turns"]
    assert [turn["action"] for turn in turns] == [action("right", "right"), said[1], action("left", "right", "right")]
    assert [turn["valid"] for turn in turns] == [True, False, True]
    assert [turn["refused"] for turn in turns] == [False, True, False]
    assert turns[1]["observation"] == "You are at door 1.\nYou are at door 2."
    assert sample.metadata["tcod"]["outcome"] == "You are at door 1.\nYou are at door 2.\nYou are at door 3."
    assert metrics["rollout/tcod/success"] == 1.0


@pytest.mark.parametrize("history", ["append", "turns"])
@pytest.mark.parametrize("variant", ["b2f", "reopd"])
def test_a_demonstration_replays_calls_as_the_template_writes_them(tools, history, variant):
    demo = {"actions": [action("right"), action("right", "right"), action("right")]}
    tools.script = [call("right")] * 9
    samples = []
    for n in range(3):
        samples += tools.rollout([{"goal": 4, "demo": demo}], n, **TOOLS, tcod_variant=variant, tcod_history=history)[
            0
        ]
    between = [results("You are at door 1."), results("You are at door 2.", "You are at door 3.")]
    prompt = [call("right") + END + between[0], call("right", "right") + END + between[1]]
    for sample in samples:
        replayed = sample.metadata["tcod"]["replayed_turns"]
        expected = as_in_the_prompt(tools.tokenizer, 4, *prompt[: len(replayed)])
        assert sample.tokens[: -sample.response_length] == expected
        assert [turn["response"] for turn in replayed] == [call("right"), call("right", "right")][: len(replayed)]
    assert max(len(sample.metadata["tcod"]["replayed_turns"]) for sample in samples) == 2


def test_under_turns_a_prompt_is_what_the_template_renders_of_calls_and_results(tools):
    lost = call("\\ud800")  # half a character: no call
    tools.script = [call("right"), call("right", "right"), lost, call("right")]
    samples, _ = tools.rollout([{"goal": 4}], **TOOLS, tcod_history="turns", tcod_window=2)
    function = {"name": "move", "arguments": {"way": "right"}}
    made = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    messages = [
        *[{"role": "system", "content": "Walk."}, {"role": "user", "content": "Goal: door 4. You are at door 0."}],
        *[made, {"role": "tool", "content": "You are at door 1."}],
        *[{**made, "tool_calls": made["tool_calls"] * 2}, {"role": "tool", "content": "You are at door 2."}],
        *[{"role": "tool", "content": "You are at door 3."}, {"role": "assistant", "content": lost}],
        {"role": "user", "content": "Call move."},
    ]
    last = samples[-1].tokens[: -samples[-1].response_length]
    shown = [messages[0], {**messages[1], "content": messages[1]["content"] + "\n\n[Earlier turns are left out.]"}]
    tools_listed = [{**ToolCorridor.tools({})[0]}]
    for count, kept in ((2, messages[:2]), (4, messages[:4]), (7, messages[:7]), (9, [*shown, *messages[4:]])):
        rendered = tools.tokenizer.apply_chat_template(
            kept, tools=tools_listed, tokenize=False, add_generation_prompt=True
        )
        sample = samples[(2, 4, 7, 9).index(count)]
        assert tools.tokenizer.decode(sample.tokens[: -sample.response_length]) == rendered
    assert last.count(tools.tokenizer.convert_tokens_to_ids("<tool_call>")) == 3


def test_a_parser_of_other_calls_is_refused(tools):
    with pytest.raises(
        ConfigError, match="--hf-checkpoint .*: tcod_tool_parser llama3 does not read a call as .*<tool"
    ):
        tools.rollout([{"goal": 3}], **{**TOOLS, "tcod_tool_parser": "llama3"})


@pytest.mark.parametrize("history", ["append", "turns"])
def test_the_teachers_note_tells_calls_and_results(tools, history):
    tools.script = [call("right", "right"), call("right")]
    changes = {"tcod_history": history, "tcod_teacher_sees": "hindsight", "tcod_note_len": 2000}
    samples, _ = tools.rollout([{"goal": 3}], **TOOLS, **changes)
    told_of = f"> {action('right', 'right')}\nYou are at door 1.\nYou are at door 2.\n> {action('right')}\n"
    for request, sample in zip(tools.scoring_requests(), samples, strict=True):
        head, first, tail = tools.tokenizer.decode(sample.tokens).partition("You are at door 0.")
        scored = tools.tokenizer.decode(request["input_ids"])
        assert scored.startswith(f"{head}{first}\n\nA note") and scored.endswith(f" alone.{tail}")
        assert f"{told_of}You are at door 3.\nThe task was solved." in scored
        behind = len(tools.tokenizer.encode(tail, add_special_tokens=False))
        assert request["input_ids"][-behind:] == sample.tokens[-behind:]
