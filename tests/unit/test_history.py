"""What the student sees at each turn, and the sequences that an episode leaves, for both histories."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from examples.tcod.episode.history import LEFT_OUT, AppendHistory, TurnHistory
from examples.tcod.model.chat_tokens import ChatTokens
from examples.tcod.model.student import Response
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
    return Response(ids, [-0.1] * len(ids), not ended, {})


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
            assert not history.add_replayed(answer, None)
            texts.append(answer)
        else:
            whole = f"{opening}\n{thought}\n{closing}\n\n{answer}" if thinks or opened else answer
            response = said(chat, whole.removeprefix(opened) if opened else whole)
            contexts.append(history.context)
            sampled.append(response.ids)
            history.add_response(response)
            texts.append(opened + chat.decode(response.ids))
            assert chat.after_thought(response.ids).strip() == answer.strip()
        assert history.add_turn(after)
        texts.append(after)
    # What is left are these sequences, and every sampled token once.
    sequences = [(one.prompt, [token for span in one.after_prompt for token in span.ids]) for one in history.sequences]
    assert sequences == list(zip(contexts, sampled, strict=True))
    spans = [span for one in history.sequences for span, _ in one.sampled()]
    assert [(span.ids, span.turn) for span in spans] == list(zip(sampled, range(replayed, len(turns)), strict=False))


def test_a_cut_thought_is_a_turn_without_an_answer(folder):
    for name, (template, kwargs, opened, drops) in THINKS.items():
        for kind in ("append", "turns"):
            chat = chat_with(folder, template, kwargs, history=kind, thoughts="keep")
            opening = "[THINK]" if name == "another name" else "<think>"
            cut = said(chat, f"{opening}\n<action>left</action> or".removeprefix(opened), ended=False)
            assert chat.after_thought(cut.ids).strip() == "", name
            history = (AppendHistory if kind == "append" else TurnHistory)(chat, 10**6)
            history.begin("Rules.", "A door.")
            history.add_response(cut)
            assert history.add_turn("A wall.")
            shown = chat.tokenizer.decode(history.context)
            assert ("left" in shown) is (kind == "append" or not drops), (name, kind)
            assert shown.count("A wall.") == 1


@pytest.mark.parametrize("text", ["Sure. <think> <action>x</action>", "<think>a</think> b <think> <action>y</action>"])
def test_what_is_said_in_a_later_thought_is_no_answer(folder, text):
    chat = chat_with(folder, PAST + HEADER, thoughts="keep")
    assert "<action>" not in chat.after_thought(said(chat, text, ended=False).ids)


# Shapes of templates to which turns cannot be appended: what they write before the next answer, and before past ones.
TURNS_ONLY = {
    "Mistral": ("[/INST]", "[/INST] ", "none"),
    "DeepSeek-V3.1": ("<|im_start|><think>", "<|im_start|></think>", "keep"),
    "GLM-4.5": ("<|im_start|>assistant", "<|im_start|>assistant\n<think></think>\n", "keep"),
    "Kimi-K2-Thinking": ("<|im_start|>", "<|im_start|><think></think>", "keep"),
}


@pytest.mark.parametrize("name", TURNS_ONLY)
def test_templates_to_which_turns_cannot_be_appended_are_rendered(name, folder):
    following, past, thoughts = TURNS_ONLY[name]
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + past + "{{ m.content.split('</think>')[-1] }}"
        "<|im_end|>{% else %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}" + following
    )
    with pytest.raises(ValueError, match="or tcod_history: turns"):
        chat_with(folder, template, thoughts=thoughts)
    chat = chat_with(folder, template, history="turns", thoughts=thoughts)
    texts = ["Rules.", "A door.", "left", "A wall."]
    assert chat.context(texts) == rendered(chat, texts, {})


def test_channels_are_refused_in_turns_too(folder):
    template = PAST.replace("{{ m.content }}", "{{ 'final: ' if m.role == 'assistant' }}{{ m.content }}") + HEADER
    with pytest.raises(ValueError, match="an answer cannot stay what was sampled"):
        chat_with(folder, template, history="turns")


@pytest.mark.parametrize("history", ["append", "turns"])
def test_a_thought_that_only_ends_is_closed(folder, history):
    template = PAST.replace("{{ m.content }}", "{{ '</think>' if m.role == 'assistant' }}{{ m.content }}")
    template += HEADER.replace("\n", "\n</think>")  # DeepSeek-V3.1, not thinking
    assert chat_with(folder, template, history=history)
    with pytest.raises(ValueError, match="closes the thought before every answer"):
        chat_with(folder, template, history=history, thoughts="keep")


def test_ids_of_a_file_name_nothing_but_text(folder):
    chat = chat_with(folder, PAST + HEADER, thoughts="keep")
    ids = chat.tokenizer.encode("<think>hm</think>left")
    assert chat.spells(ids, "<think>hm</think>left") and chat.spells([*ids, chat.end_of_turn], "<think>hm</think>left")
    start = chat.tokenizer.convert_tokens_to_ids("<|im_start|>")
    for wrong in (
        [],
        [*ids, 10**7],
        [-1, *ids],
        [*ids, 2**40],
        [start, *ids],
        [*ids, start],
        [chat.end_of_turn, *ids],
    ):
        assert not chat.spells(wrong, chat.tokenizer.decode([i for i in wrong if 0 <= i < chat.vocab_size]))


def test_a_demonstrations_own_opening_of_a_thought_is_written_once(folder):
    template, kwargs, opened, _ = THINKS["thinks only"]
    chat = chat_with(folder, template, kwargs, thoughts="keep")
    for text in ("<think>\nhm</think>left", "<think>hm</think>left", "hm</think>left"):
        assert chat.tokenizer.decode(chat.assistant(text)) == "hm</think>left<|im_end|>"


def test_a_long_conversation_is_encoded_in_parts_that_are_kept(folder, monkeypatch):
    chat = chat_with(folder, PAST + HEADER, history="turns")
    lengths = []
    encode = type(chat.tokenizer).encode
    monkeypatch.setattr(
        type(chat.tokenizer),
        "encode",
        lambda self, text, **kwargs: lengths.append(len(text)) or encode(self, text, **kwargs),
    )
    history = TurnHistory(chat, 10**6)
    history.begin("Rules.", "A door.")
    for i in range(50):
        history.add_response(Response([i, chat.end_of_turn], [-0.1] * 2, False, {}))
        history.add_turn(f"Door {i}: " + "x" * 100)
    assert sum(lengths) < 2 * len(chat._template.render(history._texts))
    assert history.context == rendered(chat, history._texts, {})


@pytest.mark.parametrize("name", THINKS)
def test_thoughts_stay_in_an_appended_context(name, folder):
    template, kwargs, opened, _ = THINKS[name]
    chat = chat_with(folder, template, kwargs, thoughts="keep")
    opening, closing = ("[THINK]", "[/THINK]") if name == "another name" else ("<think>", "</think>")
    history = AppendHistory(chat, 10**6)
    history.begin("Rules.", "A door.")
    thought = f"{opening}\nwhich one\n{closing}\n\nleft"
    history.add_replayed("right", None)
    history.add_turn("A wall.")
    history.add_replayed(thought, None)
    history.add_turn("A floor.")
    replayed = list(history.context)
    history.add_response(said(chat, thought.removeprefix(opened)))
    history.add_turn("Out.")
    text = chat.tokenizer.decode(history.context)
    assert text.count("which one") == 2 and text.count(thought) == 2
    assert history.context[: len(replayed)] == replayed == history.sequences[0].prompt
    # A replayed turn without a thought is one with an empty thought, where the template opens thoughts.
    empty = f"{opened}\n{closing}\n\nright<|im_end|>" if opened else "<|im_start|>assistant\nright<|im_end|>"
    assert text.count(empty) == 1


def test_the_last_turns_are_kept_within_the_room(folder):
    chat = chat_with(folder, PAST + HEADER, history="turns")
    history = TurnHistory(chat, 150, window=1)
    history.begin("Rules.", "A door.")
    for i in range(20):
        history.add_response(said(chat, f"go {i}"))
        assert history.add_turn(f"Door {i}.")
        assert len(history.context) + history.room() == 150
    assert "go 18" not in chat.tokenizer.decode(history.context)
    assert history.add_turn("x" * 200) is False
    assert len(history.sequences) == 20


def test_replayed_ids_are_those_that_were_sampled(folder):
    chat = chat_with(folder, PAST + HEADER)
    history = AppendHistory(chat, 1000)
    history.begin("Rules.", "A door.")
    ids = [*chat.tokenizer.encode("left"), chat.tokenizer.pad_token_id]
    before = len(history.context)
    assert history.add_replayed("left", ids) and history.context[before:] == ids
    history.add_turn("A wall.")
    assert history.context[before + len(ids)] == chat.end_of_turn  # every turn in the context ends alike


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
