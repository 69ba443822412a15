"""The chat spans on the byte tokenizer: which templates and tokens are usable, and what text becomes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from examples.tcod.model.chat_tokens import ChatTokens, engine_eos_ids, load_chat
from smoke import cpu_only
from tests.support import toys

cpu_only.prepare()

NUM_GPUS = 0
NON_THINKING = {"enable_thinking": False}
BLOCK = "<think>\n\n</think>\n\n"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PAST = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
DROPS_SYSTEM = PAST.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
LAST_USER = (  # Mistral's shape
    "{% set rules = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last %}{{ rules }}\n\n{% endif %}{{ m.content }}[/INST]{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toys.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def chat_with(tokenizer, template, kwargs=None, **more):
    tokenizer.chat_template = template
    return ChatTokens(tokenizer, kwargs, **more)


def spans(chat, system, user, *later):
    """The tokens of a conversation that is appended turn by turn."""
    ids = chat.prompt(system, user)
    for answer, after in zip(later[::2], later[1::2], strict=True):
        ids += chat.assistant(answer) + chat.user(after)
    return ids


def rendered(tokenizer, texts, kwargs, system_role=True):
    if not system_role:
        texts = ["\n\n".join(texts[:2]), *texts[2:]]
    roles = ["system", *["user", "assistant"] * len(texts)][not system_role :]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)


conversations = st.lists(
    st.lists(st.text(max_size=8) | st.sampled_from(["<|im_end|>", "<think>", "\n", " "]), max_size=4).map("".join),
    min_size=2,
    max_size=8,
).filter(lambda texts: len(texts) % 2 == 0)

# name: template, keyword arguments, whether it has a system role
USABLE = {
    "qwen3": (toys.CHAT_TEMPLATE, NON_THINKING, True),
    "no thinking": (PAST + HEADER, {}, True),
    "strips": (PAST.replace("m.content", "m.content|trim") + HEADER, {}, True),
    "strips newlines of answers": (
        PAST.replace("m.content", "(m.content.lstrip('\n') if m.role == 'assistant' else m.content)") + HEADER,
        {},
        True,
    ),
    "raises at a system turn": (NO_SYSTEM + PAST + HEADER, {}, False),
    "drops the system turn": (DROPS_SYSTEM + HEADER, {}, False),
    "strips and has no system turn": (NO_SYSTEM + PAST.replace("m.content", "m.content|trim") + HEADER, {}, False),
    "keeps the empty block": (
        PAST.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}")
        + HEADER.replace("\n", "\n<think></think>"),
        {},
        True,
    ),
    "another name for thoughts": (PAST + HEADER.replace("\n", "\n[THINK][/THINK]"), {}, True),
}


@pytest.mark.parametrize("name", USABLE)
@settings(max_examples=60, deadline=None)
@given(texts=conversations)
def test_the_spans_are_the_templates_own_rendering(name, folder, texts):
    template, kwargs, system_role = USABLE[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = chat_with(tokenizer, template, kwargs)
    block = BLOCK if name == "qwen3" else "[THINK][/THINK]" if name == "another name for thoughts" else ""
    ours, theirs = tokenizer.decode(spans(chat, *texts)), rendered(tokenizer, texts, kwargs, system_role)
    assert ours.count(block) == len(texts) // 2 or not block
    assert ours.replace(block, "") == theirs.replace(block, "")


# name: template, keyword arguments, the reason, the remedy
REFUSED = {
    "system text in the last user turn": (LAST_USER, {}, "system text first", "use a model or a chat template that"),
    "thinks unless told": (toys.CHAT_TEMPLATE, {}, "thinking mode", "'{\"enable_thinking\": false}'"),
    "a switch of another name": (
        PAST + "{% if not (thinking is defined and not thinking) %}<|im_start|>assistant\n<think>\n"
        "{% else %}<|im_start|>assistant\n{% endif %}",
        {"style": "short"},
        "thinking mode",
        '\'{"style": "short", "thinking": false}\'',
    ),
    "thinks whatever it is told": (
        PAST + HEADER.replace("\n", "\n<think>\n"),
        NON_THINKING,
        "opens a thought",
        "that answers without a thought",
    ),
    "opens a thought before past answers, too": (
        PAST.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content }}")
        + HEADER.replace("\n", "\n<think>\n"),
        {},
        "opens a thought",
        "that answers without a thought",
    ),
    "a word before the next answer only": (
        PAST + HEADER.replace("\n", "\nAnswer: "),
        {},
        "'.*Answer: ' before the next answer but",
        "that writes the same",
    ),
    "white space before the next answer only": (
        PAST + HEADER.replace("\n", "\n\n"),
        {},
        "before the next answer but",
        "or tcod_history: turns",
    ),
    "an empty thought before past answers only": (
        PAST.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}")
        + HEADER,
        {},
        "before the next answer but",
        "or tcod_history: turns",
    ),
    "a channel before past answers only": (
        PAST.replace("{{ m.content }}", "{% if m.role == 'assistant' %}final: {% endif %}{{ m.content }}") + HEADER,
        {},
        "but '.*final: ' before past ones",
        "that writes the same",
    ),
    "keeps the last four turns": (
        PAST.replace("in messages", "in messages[:1] + messages[1:][-4:]") + HEADER,
        {},
        "with 3 user turns it writes",
        "that writes every turn as it was",
    ),
    "keeps the last turn": (
        PAST.replace("in messages", "in messages[:1] + messages[1:][-1:]") + HEADER,
        {},
        "every turn in its order",
        "use a model or a chat template that",
    ),
    "numbers turns": (
        PAST.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ loop.index }}. {% endif %}{{ m.content }}")
        + HEADER,
        {},
        "with . user turns it writes",
        "that writes every turn as it was",
    ),
    "escapes": (
        PAST.replace("m.content", "m.content|e") + HEADER,
        {},
        "&lt;b&gt;",
        "that writes every turn as it was",
    ),
    "joins lines": (
        PAST.replace("m.content", "m.content.split()|join(' ')") + HEADER,
        {},
        "changes a text",
        "that writes every turn as it was",
    ),
    "tells the last turn apart": (
        PAST.replace("{{ m.content }}", "{{ m.content }}{% if loop.last %} (now){% endif %}") + HEADER,
        {},
        "before the next answer but",
        "that writes the same",
    ),
    "turns without an end": (
        PAST.replace("<|im_end|>", "") + HEADER,
        {},
        "not a special token",
        "that ends turns with one",
    ),
    "no chat": ("{{ raise_exception('tools only') }}", {}, "tools only", "use a model or a chat template that"),
    "nothing": (None, {}, "no chat template", "use a checkpoint that has one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_templates_are_refused_with_a_reason_and_a_remedy(name, tokenizer):
    template, kwargs, reason, remedy = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){reason}.*{remedy}") as failure:
        chat_with(tokenizer, template, kwargs)
    assert "\n" not in str(failure.value)


def test_an_end_of_turn_is_special_by_its_flag(tokenizer):
    tokenizer.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<|stop|>", special=False)])
    assert "<|end|>" not in tokenizer.all_special_tokens
    chat = chat_with(tokenizer, (PAST + HEADER).replace("<|im_end|>", "<|end|>"))
    assert chat.end_of_turn == tokenizer.convert_tokens_to_ids("<|end|>")
    with pytest.raises(ValueError, match="not a special token"):
        chat_with(tokenizer, (PAST + HEADER).replace("<|im_end|>", "<|stop|>"))


def test_every_end_of_the_engine_ends_a_turn(tokenizer):
    end, pad, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|im_start|>"])
    assert chat_with(tokenizer, PAST + HEADER).stop_ids == {end, pad}
    chat = chat_with(tokenizer, PAST + HEADER, eos_ids=[start, 7])
    assert chat.stop_ids == {end, pad, start, 7}
    said = chat.assistant("look")[:-1]
    for stop in chat.stop_ids:
        assert chat.decode([*said, stop]) == "look"
    assert chat.decode([*said, start, end]) == "look<|im_start|>"  # only the last one ended it
    assert chat.decode(said) == "look" and chat.decode([end]) == chat.decode([]) == ""


@pytest.mark.parametrize("flagged", [False, True])
def test_a_word_as_pad_token_ends_no_turn(tokenizer, flagged):
    if flagged:
        tokenizer.add_tokens([AddedToken("!", special=True)])
    tokenizer.pad_token = "!"
    chat = chat_with(tokenizer, PAST + HEADER)
    assert chat.stop_ids == {chat.end_of_turn}
    assert tokenizer.decode(chat.user("Stop!")).count("Stop!") == 1


ADDED = (
    AddedToken("<tool>", special=False, normalized=True),
    AddedToken("<|user|>", special=True, lstrip=True, rstrip=True),
    AddedToken("word", special=False, single_word=True),
    AddedToken("<think>", special=False),
    AddedToken("</think>", special=False),
)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from([*map(str, ADDED), "<|im_end|>", "<|endoftext|>", " ", "\n", "a", "é"])))
def test_text_never_becomes_an_added_token(folder, parts):
    tokenizer, text = AutoTokenizer.from_pretrained(folder), "".join(parts)
    tokenizer.add_tokens(list(ADDED))
    chat = chat_with(tokenizer, PAST + HEADER)
    ids = list(text.encode())
    assert len(chat.user(text)) == len(chat.user("")) + len(ids)
    assert len(chat.prompt(text, text)) == len(chat.prompt("", "")) + 2 * len(ids)
    thoughts = text.count("<think>") + text.count("</think>")
    answer = chat.assistant(text)
    assert [i in tokenizer.added_tokens_decoder for i in answer].count(True) == thoughts + 1
    assert chat.decode(answer) == text


def test_todays_date_in_the_context_is_a_warning(tokenizer):
    today = "{% set day = day or strftime_now('%Y') %}{{ day }}"
    (warning,) = chat_with(tokenizer, today + PAST + HEADER, {"style": "short"}).warnings
    assert "today's date" in warning
    assert warning.endswith('set --apply-chat-template-kwargs \'{"style": "short", "day": "26 Jul 2024"}\'')
    assert chat_with(tokenizer, today + PAST + HEADER, {"day": "1 May 2025"}).warnings == []
    (warning,) = chat_with(tokenizer, "{{ strftime_now('%Y') }}" + PAST + HEADER).warnings
    assert warning.endswith("use a chat template that takes the date as an argument")
    assert chat_with(tokenizer, PAST + HEADER).warnings == []


@pytest.mark.parametrize("eos, ids", [(3, {3}), ([3, 5], {3, 5}), (None, set())])
def test_a_checkpoint_says_which_ids_end_a_text(tmp_path, eos, ids):
    toys.save_tokenizer(tmp_path)
    assert engine_eos_ids(str(tmp_path)) == set()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert engine_eos_ids(str(tmp_path)) == ids
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 9}))
    assert engine_eos_ids(str(tmp_path)) == ids | {9}
    chat = load_chat(str(tmp_path), NON_THINKING)
    assert chat.stop_ids >= {*ids, 9, chat.end_of_turn}
