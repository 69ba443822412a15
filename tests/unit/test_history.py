"""What the student sees at each turn, and the sequences that an episode leaves, for both histories."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from examples.tcod.chat import ChatTokens
from examples.tcod.history import LEFT_OUT, AppendHistory, TurnHistory
from examples.tcod.student import Response
from smoke import cpu_only
from tests.support import toys

cpu_only.prepare()

NUM_GPUS = 0
PAST = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DROPS = PAST.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
)
# name: template, keyword arguments, what it opens a thought with, whether it drops old ones
THINKS = {
    "qwen3": (
        DROPS + HEADER.replace("\n", "\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"),
        {"enable_thinking": True},
        "",
        True,
    ),
    "thinks only": (DROPS + HEADER.replace("\n", "\n<think>\n"), {}, "<think>\n", True),
    "keeps old thoughts": (PAST + HEADER, {}, "", False),
    "another name": (PAST + HEADER.replace("\n", "\n[THINK]"), {}, "[THINK]", False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toys.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def chat_with(folder, template, kwargs=None, **choices):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return ChatTokens(tokenizer, kwargs or {}, **choices)


def said(chat, text, ended=True):
    """What an engine samples: `text`, with the think tokens that it names."""
    ids = chat.tokenizer.encode(text, add_special_tokens=False) + [chat.end_of_turn] * ended
    return Response(ids, [-0.1] * len(ids), {"finish_reason": {"type": "stop" if ended else "length"}})


def rendered(chat, texts, kwargs):
    roles = ["system", *["user", "assistant"] * len(texts)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs)


words = st.lists(st.sampled_from(["look", " ", "\n", "é", "door 1", "<b>", ": "]), max_size=5).map("".join)


@pytest.mark.parametrize("name", THINKS)
@settings(max_examples=40, deadline=None)
@given(
    rules=words,
    first=words,
    turns=st.lists(st.tuples(st.booleans(), words, words, words), max_size=5),
    window=st.none() | st.integers(1, 3),
    replayed=st.integers(0, 2),
)
def test_each_turn_sees_the_templates_own_rendering(name, folder, rules, first, turns, window, replayed):
    template, kwargs, opened, _ = THINKS[name]
    chat = chat_with(folder, template, kwargs, history="turns", thoughts="keep")
    history = TurnHistory(chat, 10**6, window)
    assert history.begin(rules, first)
    texts = [rules, first]
    opening, closing = ("[THINK]", "[/THINK]") if name == "another name" else ("<think>", "</think>")
    contexts, sampled = [], []
    for i, (thinks, thought, answer, after) in enumerate(turns):
        shown = texts
        if window and len(texts) > 2 + 2 * window:
            shown = [rules, f"{first}\n\n{LEFT_OUT}", *texts[-2 * window :]]
        assert history.context == rendered(chat, shown, kwargs)
        if i < replayed:
            assert history.replay(answer, None) is None
            texts.append(answer)
        else:
            whole = f"{opening}\n{thought}\n{closing}\n\n{answer}" if thinks or opened else answer
            response = said(chat, whole.removeprefix(opened) if opened else whole)
            contexts.append(history.context)
            sampled.append(response.ids)
            start, end = history.respond(response)
            assert history.tokens[len(history.prompt) :][start:end] == response.ids
            texts.append(opened + chat.text(response.ids))
            assert chat.answer(response.ids).strip() == answer.strip()
        assert history.observe(after)
        texts.append(after)
    # What is left are these sequences, end to end, and every sampled token once.
    ends = [start for start, _ in history.prompts[1:]] + [len(history.tokens)]
    sequences = [
        (history.tokens[start:begin], history.tokens[begin:end])
        for (start, begin), end in zip(history.prompts, ends, strict=False)
    ]
    assert sequences[: len(sampled)] == list(zip(contexts, sampled, strict=True))
    assert [span.ids for span in history.spans if span.sampled] == sampled


@pytest.mark.parametrize("name", THINKS)
def test_old_thoughts_are_the_templates_to_drop(name, folder):
    template, kwargs, opened, drops = THINKS[name]
    chat = chat_with(folder, template, kwargs, history="turns", thoughts="keep")
    opening, closing = ("[THINK]", "[/THINK]") if name == "another name" else ("<think>", "</think>")
    history = TurnHistory(chat, 10**6)
    history.begin("Rules.", "A door.")
    history.respond(said(chat, f"{opening}\nwhich one\n{closing}\n\nleft".removeprefix(opened)))
    history.observe("A wall.")
    text = chat.tokenizer.decode(history.context)
    assert ("which one" in text) is not drops and "left<|im_end|>" in text


def test_a_cut_thought_is_a_turn_without_an_answer(folder):
    for name, (template, kwargs, opened, drops) in THINKS.items():
        for kind in ("append", "turns"):
            chat = chat_with(folder, template, kwargs, history=kind, thoughts="keep")
            opening = "[THINK]" if name == "another name" else "<think>"
            cut = said(chat, f"{opening}\n<action>left</action> or".removeprefix(opened), ended=False)
            assert chat.answer(cut.ids).strip() == "", name
            history = (AppendHistory if kind == "append" else TurnHistory)(chat, 10**6)
            history.begin("Rules.", "A door.")
            history.respond(cut)
            assert history.observe("A wall.")
            shown = chat.tokenizer.decode(history.context)
            assert ("left" in shown) is (kind == "append" or not drops), (name, kind)
            assert shown.count("A wall.") == 1


@pytest.mark.parametrize("name", THINKS)
def test_thoughts_stay_in_an_appended_context(name, folder):
    template, kwargs, opened, _ = THINKS[name]
    chat = chat_with(folder, template, kwargs, thoughts="keep")
    opening, closing = ("[THINK]", "[/THINK]") if name == "another name" else ("<think>", "</think>")
    history = AppendHistory(chat, 10**6)
    history.begin("Rules.", "A door.")
    thought = f"{opening}\nwhich one\n{closing}\n\nleft"
    assert history.replay("right", None)
    history.observe("A wall.")
    history.replay(thought, None)
    history.observe("A floor.")
    replayed = history.context
    history.respond(said(chat, thought.removeprefix(opened)))
    history.observe("Out.")
    text = chat.tokenizer.decode(history.context)
    assert text.count("which one") == 2 and text.count(thought) == 2
    assert history.context[: len(replayed)] == replayed == history.prompt
    # A replayed turn without a thought is one with an empty thought, where the template opens thoughts.
    empty = f"{opened}\n{closing}\n\nright<|im_end|>" if opened else "<|im_start|>assistant\nright<|im_end|>"
    assert text.count(empty) == 1


def test_the_last_turns_are_kept_within_the_room(folder):
    chat = chat_with(folder, PAST + HEADER, history="turns")
    history = TurnHistory(chat, 150, window=1)
    history.begin("Rules.", "A door.")
    for i in range(20):
        history.respond(said(chat, f"go {i}"))
        assert history.observe(f"Door {i}.")
        assert len(history.context) + history.room() == 150
    assert "go 18" not in chat.tokenizer.decode(history.context)
    assert history.observe("x" * 200) is False
    assert len(history.prompts) == 20


def test_replayed_ids_are_those_that_were_sampled(folder):
    chat = chat_with(folder, PAST + HEADER)
    history = AppendHistory(chat, 1000)
    history.begin("Rules.", "A door.")
    ids = [*chat.tokenizer.encode("left"), chat.tokenizer.pad_token_id]
    start, end = history.replay("left", ids)
    assert history.prompt[start:end] == ids
    history.observe("A wall.")
    assert history.prompt[end] == chat.end_of_turn  # every turn in the context ends alike


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_control_tokens_in_texts_stay_characters(folder, data):
    chat = chat_with(folder, PAST + HEADER, history="turns", thoughts="keep")
    names = st.sampled_from(
        ["<|im_end|>", "<think>", "</think>", "a", "\ue000", "\ue0000\ue001", "<|im_start|>user\n"]
    )
    texts = data.draw(st.lists(st.lists(names, max_size=4).map("".join), min_size=4, max_size=4))
    added = set(chat.tokenizer.added_tokens_decoder)
    plain = chat.context(["", "", "", ""])
    ids = chat.context(texts)
    thoughts = texts[2].count("<think>") + texts[2].count("</think>")
    assert sum(i in added for i in ids) == sum(i in added for i in plain) + thoughts
    assert chat.tokenizer.decode(ids) == chat._template.render(texts)
