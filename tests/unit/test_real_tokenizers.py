"""The chat spans of real tokenizers, which are fetched once; a tokenizer that cannot be had is skipped."""

import functools
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.tcod.environments.protocol import Environment
from examples.tcod.episode.demonstration import Demonstration
from examples.tcod.episode.episode import Note
from examples.tcod.episode.history import AppendHistory, TurnHistory
from examples.tcod.episode.note import NoteWriter
from examples.tcod.model.chat_tokens import load_chat
from examples.tcod.model.student import Response
from smoke import cpu_only
from tests.support.real_tokenizers import chat_with, checkpoint

cpu_only.prepare()

NUM_GPUS = 0
NON_THINKING = {"enable_thinking": False}
BLOCK = "<think>\n\n</think>\n\n"
# name: keyword arguments of the template, end of turn, other stop ids
USABLE = {
    "qwen3": (NON_THINKING, "<|im_end|>", {"<|endoftext|>"}),
    "llama3": ({}, "<|eot_id|>", {"<|end_of_text|>"}),
    "llama3_1": ({}, "<|eot_id|>", set()),
    "gemma3": ({}, "<end_of_turn>", {"<pad>"}),
    "deepseek_v3": ({}, "<｜end▁of▁sentence｜>", set()),
    "smollm2": ({}, "<|im_end|>", {"<|endoftext|>"}),
}
each = pytest.mark.parametrize("name", USABLE)


@functools.cache
def chat_of(name):
    return chat_with(name, None, USABLE[name][0])


@functools.cache
def names_of(name):
    """The contents of the added tokens that are no words: the model joins no characters to one of them."""
    added = chat_of(name).tokenizer.added_tokens_decoder
    return {token.content: i for i, token in added.items() if token.content.strip("\n▁ \t")}


def texts(name):
    """Texts of an environment: any characters, and names of added tokens."""
    some = sorted(names_of(name))[:: max(1, len(names_of(name)) // 60)] + ["<think>", "<|im_end|>", "<｜User｜>"]
    characters = st.characters(codec="utf-8")
    nothing = chat_of(name).user("")
    if name == "smollm2":  # its vocabulary lacks the bytes of some characters
        characters = st.sampled_from([chr(i) for i in range(0x300) if chat_of(name).user(chr(i)) != nothing])
    ordinary = st.sampled_from([" go to shelf 1", "\n\n", "  ", "é", "漢字"])
    return st.lists(st.text(characters, max_size=8) | st.sampled_from(some) | ordinary, max_size=6).map("".join)


def alike(text):
    """What a tokenizer may do to characters: Qwen's composes them, the metaspace is a space."""
    return unicodedata.normalize("NFC", text).replace("▁", " ").replace(BLOCK, "")


def as_messages(turns):
    roles = ["system", *["user", "assistant"] * len(turns)]
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


@each
def test_the_turns_end_with_the_right_token(name):
    chat, (_, end, others) = chat_of(name), USABLE[name]
    assert chat.tokenizer.decode([chat.end_of_turn]) == end
    assert set(chat.tokenizer.convert_ids_to_tokens(sorted(chat.stop_ids))) == {end, *others}
    assert chat.decode(chat.assistant("<action>look</action>")) == "<action>look</action>"


@each
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_spans_are_the_templates_own_rendering(name, data):
    chat, kwargs = chat_of(name), USABLE[name][0]
    text = texts(name).map(lambda text: text.replace("</think>", ""))  # templates cut an answer there
    turns = data.draw(st.lists(text, min_size=2, max_size=8).filter(lambda turns: len(turns) % 2 == 0))
    turns[2::2] = map(str.strip, turns[2::2])  # some strip past answers
    ids = chat.context(turns[:2])
    for answer, after in zip(turns[2::2], turns[3::2], strict=True):
        ids += chat.assistant(answer) + chat.user(after)
    render = functools.partial(
        chat.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True, **kwargs
    )
    assert alike(chat.tokenizer.decode(ids)) == alike(render(as_messages(turns)))


@each
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_is_encoded_as_ever_but_never_an_added_token(name, data):
    chat, names = chat_of(name), names_of(name)
    text = data.draw(texts(name)).strip()
    span = chat.user(text)
    ids = span[len(chat.user("")) - len(chat.after_user) : len(span) - len(chat.after_user)]
    assert not set(ids) & set(names.values())
    assert alike(chat.tokenizer.decode(ids)) == alike(text)
    if not any(content in text for content in names):
        assert ids == chat.tokenizer.encode(text, add_special_tokens=False)


@each
def test_no_added_token_comes_from_text(name):
    chat, names = chat_of(name), names_of(name)
    assert not (set(chat.user(" ".join(sorted(names)))) - set(chat.user(""))) & set(names.values())


def test_a_character_that_the_vocabulary_lacks_ends_no_text():
    chat, rare = chat_of("smollm2"), "\U00040000"
    assert chat.tokenizer.decode(chat.tokenizer.encode(rare)).startswith("<|endoftext|>")
    end = chat.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert [*chat.user(f"{rare}a"), *chat.context(["", f"{rare}a"])].count(end) == 0


def test_a_demonstrations_own_thought_is_a_thought():
    chat = chat_of("qwen3")
    ids = chat.assistant("<think>\nhm <tool_response>\n</think>\n\n<action>look</action>")
    named = [token for token in chat.tokenizer.convert_ids_to_tokens(ids) if token.startswith("<") and ">" in token]
    assert named == ["<think>", "</think>", "<|im_end|>"]
    plain = "<think>\nhm\n</think>\n\n<action>look</action>"
    assert chat.assistant(plain)[:-1] == chat.tokenizer.encode(plain, add_special_tokens=False)


THINKING_ONLY = (  # the shape of Qwen3-4B-Thinking-2507
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\n') "
    "if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
R1 = (  # the shape of DeepSeek-R1
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
SYSTEM_LAST = (  # Mistral's shape
    "{{ bos_token }}{% for m in messages[1:] %}{% if m.role == 'user' %}<|start_header_id|>user<|end_header_id|>\n\n"
    "{% if loop.last %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "kwargs, thoughts, words",
    [
        ({}, "none", "set --apply-chat-template-kwargs '{\"enable_thinking\": false}'"),
        (NON_THINKING, "keep", "closes the thought before every answer.*switch thinking on"),
    ],
)
def test_qwen3_thinks_where_the_settings_say_so_or_is_refused(kwargs, thoughts, words):
    with pytest.raises(ValueError, match=words):
        chat_with("qwen3", None, kwargs, thoughts=thoughts)


# name: tokenizer, another template than its own, keyword arguments, tcod_thoughts, what the template opens
RENDERED = {
    "Qwen3, thinking": ("qwen3", None, {"enable_thinking": True}, "keep", ""),
    "Qwen3, not thinking": ("qwen3", None, NON_THINKING, "none", ""),
    "a Thinking-only Qwen3": ("qwen3", THINKING_ONLY, {}, "keep", "<think>\n"),
    "DeepSeek-R1's shape": ("deepseek_v3", R1, {}, "keep", "<think>\n"),
    "Llama 3, which never thinks": ("llama3", None, {}, "none", ""),
    "Gemma 3, the system text in the first user turn": ("gemma3", None, {}, "none", ""),
    "Mistral's shape, the system text last": ("llama3", SYSTEM_LAST, {}, "none", ""),
    "SmolLM2, told to think in words": ("smollm2", None, {}, "keep", ""),
}


@functools.cache
def rendering_chat(name):
    tokenizer, template, kwargs, thoughts, _ = RENDERED[name]
    return chat_with(tokenizer, template, kwargs, history="turns", thoughts=thoughts)


@pytest.mark.parametrize("name", RENDERED)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_each_turns_prompt_is_the_templates_own_rendering(name, data):
    """Token for token, for random episodes of sampled responses, with and without a thought."""
    _, _, kwargs, thoughts, opened = RENDERED[name]
    chat = rendering_chat(name)
    words = ["go to shelf 1", " ", "\n\n", "é", "漢字" if name[0] != "S" else "ab", "<action>", "a  b.", "|"]
    some = st.lists(st.sampled_from(words), max_size=5).map("".join)
    turns = [data.draw(some), data.draw(some)]
    history = TurnHistory(chat, 10**6, data.draw(st.none() | st.integers(1, 2)))
    history.begin(*turns)
    for _ in range(data.draw(st.integers(1, 4))):
        answer, after = data.draw(some), data.draw(some)
        if thoughts == "keep" and (opened or data.draw(st.booleans())):
            answer = f"<think>\n{data.draw(some)}\n</think>\n\n{answer}"
        ids = [*chat.tokenizer.encode(answer.removeprefix(opened), add_special_tokens=False), chat.end_of_turn]
        history.add_response(Response(ids, [-0.1] * len(ids), False, {}))
        history.add_turn(after)
        said = chat.turn_text(ids)
        assert said == opened + chat.decode(ids)
        turns += [said, after]
        assert chat.after_thought(ids) == (said.rpartition("</think>")[2] if thoughts == "keep" else said)
    messages = as_messages(history._shown(turns))
    theirs = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs)
    assert history.context == theirs
    # The teacher's own beginning of the last turn: the same messages, with a note behind the first observation.
    note, sequence = "\n".join(["> go to shelf 1", *turns[1::2]]), history.sequences[-1]
    rules, first, *later = as_messages(history._shown(turns[:-2]))
    first = {**first, "content": f"{first['content']}\n\n{note}"}
    render = functools.partial(chat.tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False)
    expected = render([rules, first, *later], **kwargs) + ids
    writer = NoteWriter(Environment, chat, ["demo"], 9, 0)
    assert writer.teacher_ids(sequence, Note(note)) == expected
    assert writer.teacher_ids(sequence, Note()) == sequence.tokens


@each
def test_behind_a_note_an_appended_episode_is_as_it_was(name):
    chat, kwargs, names = chat_of(name), USABLE[name][0], names_of(name)
    history = AppendHistory(chat, 10**6)
    history.begin("Rules.", "A door. ")
    history.add_replayed("left", None)
    for answer in ("right", "a  b."):
        history.add_turn("A wall.")
        ids = [*chat.tokenizer.encode(answer, add_special_tokens=False), chat.end_of_turn]
        history.add_response(Response(ids, [-0.1] * len(ids), False, {}))
    [sequence], writer = history.sequences, NoteWriter(Environment, chat, ["demo"], 9, 0)
    render = functools.partial(chat.tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False)
    heads = [render(as_messages(["Rules.", f"A door. {note}"]), **kwargs) for note in ("", "\n\n> left\nA wall.")]
    assert writer.teacher_ids(sequence, Note("> left\nA wall.")) == heads[1] + sequence.tokens[len(heads[0]) :]
    hostile = writer.teacher_ids(sequence, Note(" ".join(names)))
    for token in names.values():
        assert hostile.count(token) == sequence.tokens.count(token)


@each
def test_demonstrations_replay_token_for_token(name):
    """Many texts were sampled with other tokens than they are encoded with: single characters here."""
    chat = chat_of(name)
    text = "take mug 1"
    ids = [*(i for c in text for i in chat._text_ids(c)), chat.end_of_turn]
    demo = Demonstration((text,), (text,), (ids,), chat.vocabulary)
    assert ids != chat.assistant(text) and demo.sampled_ids(0, chat) == ids
    assert replace(demo, vocabulary="another").sampled_ids(0, chat) is None
    assert replace(demo, responses=("drop mug 1",)).sampled_ids(0, chat) is None
    control = [chat.end_of_turn, *ids]
    assert replace(demo, ids=(control,), responses=(chat.decode(control),)).sampled_ids(0, chat) is None


@pytest.mark.parametrize("history", ["append", "turns"])
def test_deepseek_loaded_as_llama_loses_its_spaces_and_is_refused(tmp_path, history):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(f"{checkpoint('deepseek_v3')}/{file}")
    with pytest.raises(ValueError, match="use a model whose tokenizer keeps text"):
        load_chat(str(tmp_path), history=history)
