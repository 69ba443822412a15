"""The chat spans on the byte tokenizer: which templates and tokens are usable, and what text becomes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples.tcod.model.chat_tokens import ChatTokens, engine_eos_ids, load_chat
from smoke import cpu_only
from tests.support import toys

cpu_only.prepare()

NUM_GPUS = 0
NON_THINKING = {"enable_thinking": False}
BLOCK = "<think>\n\n</think>\n\n"


def chatml(content="{{ m.content }}", header="", messages="messages"):
    return (
        f"{{% for m in {messages} %}}<|im_start|>{{{{ m.role }}}}\n{content}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{header}{{% endif %}}"
    )


def before_answers(text):
    return f"{{% if m.role == 'assistant' %}}{text}{{% endif %}}{{{{ m.content }}}}"


PLAIN = chatml()
STRIPS = chatml("{{ m.content|trim }}")  # Llama's and Gemma's way
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
LAST_USER = (  # Mistral's shape
    "{% set rules = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last %}{{ rules }}\n\n{% endif %}{{ m.content }}[/INST]{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)


@pytest.fixture
def tokenizer(checkpoint):
    """One of its own for every test, which may change it."""
    return AutoTokenizer.from_pretrained(checkpoint)


def chat_with(tokenizer, template, kwargs=None, **more):
    tokenizer.chat_template = template
    return ChatTokens(tokenizer, kwargs, **more)


def rendered(tokenizer, texts, kwargs, system_role):
    if not system_role:
        texts = ["\n\n".join(texts[:2]), *texts[2:]]
    roles = ["system", *["user", "assistant"] * len(texts)][not system_role :]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)


texts = st.lists(st.text(max_size=8) | st.sampled_from(["<|im_end|>", "<think>", "\n", " "]), max_size=4).map("".join)

# name: template, keyword arguments, whether it has a system role, what stands before new answers only
USABLE = {
    "qwen3": (toys.CHAT_TEMPLATE, NON_THINKING, True, BLOCK),
    "strips": (STRIPS, {}, True, ""),
    "strips newlines of answers": (  # QwQ's way
        chatml("{{ m.content.lstrip('\n') if m.role == 'assistant' else m.content }}"),
        {},
        True,
        "",
    ),
    "raises at a system turn": (NO_SYSTEM + STRIPS, {}, False, ""),
    "drops the system turn": (chatml(messages="messages if m.role != 'system'"), {}, False, ""),
    "keeps the empty block": (chatml(before_answers("<think></think>"), "<think></think>"), {}, True, ""),
    "another name for thoughts": (chatml(header="[THINK][/THINK]"), {}, True, "[THINK][/THINK]"),
}


@pytest.mark.parametrize("name", USABLE)
@settings(max_examples=60, deadline=None)
@given(system=texts, user=texts, later=st.lists(st.tuples(texts.map(str.strip), texts), max_size=3))
def test_the_spans_are_the_templates_own_rendering(name, checkpoint, system, user, later):
    template, kwargs, system_role, block = USABLE[name]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chat = chat_with(tokenizer, template, kwargs)
    ids = chat.context([system, user])
    for answer, after in later:
        ids += chat.assistant(answer) + chat.user(after)
    ours = tokenizer.decode(ids)
    theirs = rendered(tokenizer, [system, user, *(text for turn in later for text in turn)], kwargs, system_role)
    assert ours.count(block) == len(later) + 1 or not block
    assert ours.replace(block, "") == theirs.replace(block, "")


def test_an_answer_stays_as_it_was(tokenizer):
    chat = chat_with(tokenizer, STRIPS)
    assert tokenizer.decode(chat.assistant("\n look ")) == "\n look <|im_end|>"


ANY_TURN = "or tcod_history: turns"
SAME = "use a model or a chat template that writes the same"
NEEDS_THOUGHTS = "opens a thought .* tcod_thoughts is none: .* that answers without a thought"
# name: template, keyword arguments, the reason and the remedy
REFUSED = {
    "system text in the last user turn": (LAST_USER, {}, f"changes a text or a past turn.*{ANY_TURN}"),
    "thinks unless told": (toys.CHAT_TEMPLATE, {}, "thinking mode.*'{\"enable_thinking\": false}'"),
    "a switch of another name": (
        chatml(header="{% if not (thinking is defined and not thinking) %}<think>\n{% endif %}"),
        {"style": "short"},
        'thinking mode.*\'{"style": "short", "thinking": false}\'',
    ),
    "thinks whatever it is told": (chatml(header="<think>\n"), NON_THINKING, NEEDS_THOUGHTS),
    "opens a thought in past answers, too": (chatml(before_answers("<think>\n"), "<think>\n"), {}, NEEDS_THOUGHTS),
    "a word before the next answer only": (chatml(header="Answer: "), {}, f"'.*Answer: ' before the next.*{SAME}$"),
    "white space before the next answer only": (chatml(header="\n"), {}, f"before the next.*{SAME}, {ANY_TURN}"),
    "an empty thought before past answers only": (
        chatml(before_answers("<think></think>")),
        {},
        f"before the next.*{SAME}, {ANY_TURN}",
    ),
    "keeps the last message": (chatml(messages="messages[:1] + messages[1:][-1:]"), {}, "every turn in its order"),
    "escapes": (chatml("{{ m.content|e }}"), {}, f"&lt;b&gt;.*{ANY_TURN}"),
    "no chat": ("{{ raise_exception('tools only') }}", {}, "tools only.*use a model or a chat template that"),
    "nothing": (None, {}, "no chat template: use a checkpoint that has one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_templates_are_refused_with_a_reason_and_a_remedy(name, tokenizer):
    template, kwargs, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){words}") as failure:
        chat_with(tokenizer, template, kwargs)
    assert "\n" not in str(failure.value)


def test_appending_is_tried_with_as_many_turns_as_the_horizon_has(tokenizer):
    template = chatml(messages="messages[:1] + messages[1:][-11:]")
    chat_with(tokenizer, template, horizon=6)  # 11 messages behind the system's, before the sixth answer
    with pytest.raises(ValueError, match=f"with 7 user turns it writes.*{ANY_TURN}"):
        chat_with(tokenizer, template, horizon=7)
    chat_with(tokenizer, template, horizon=7, history="turns")
    with pytest.raises(ValueError, match="with 3 user turns it writes.*that writes every turn as it was"):
        chat_with(tokenizer, chatml(messages="messages[:1] + messages[1:][-4:]"), horizon=1)


def metaspace_tokenizer(prefix):
    """Llama 2's kind: spaces are ▁, and one stands before a text, or before every piece of it."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*back, *[decoders.Strip(" ", 1, 0)] * prefix])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("history", ["append", "turns"])
def test_a_name_in_a_text_keeps_its_neighbours(history):
    template = (  # TinyLlama's
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    chat = chat_with(metaspace_tokenizer(prefix=False), template, history=history)
    ids = chat.context(["Go.", "see</s>x"])
    assert chat.tokenizer.decode(ids) == "<|system|>\nGo.</s>\n<|user|>\nsee</s>x</s>\n<|assistant|>\n"
    assert ids.count(chat.end_of_turn) == 2
    with pytest.raises(ValueError, match="gives back '.* </s> x.*use a model whose tokenizer keeps text"):
        chat_with(metaspace_tokenizer(prefix=True), template, history=history)


def test_an_end_of_turn_is_special_by_its_flag(tokenizer):
    tokenizer.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<|stop|>", special=False)])
    assert "<|end|>" not in tokenizer.all_special_tokens
    chat = chat_with(tokenizer, PLAIN.replace("<|im_end|>", "<|end|>"))
    assert chat.end_of_turn == tokenizer.convert_tokens_to_ids("<|end|>")
    with pytest.raises(ValueError, match="not a special token.*that ends turns with one"):
        chat_with(tokenizer, PLAIN.replace("<|im_end|>", "<|stop|>"))


def test_a_tokenizer_that_changes_text_is_refused(tokenizer):
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, lstrip=True)])
    with pytest.raises(ValueError, match="use a model whose tokenizer keeps text"):
        chat_with(tokenizer, PLAIN.replace("<|im_end|>", "<|end|>"), history="turns")  # no white space before it
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="use a model whose tokenizer keeps text"):
        chat_with(tokenizer, PLAIN, history="turns")


def test_every_end_of_the_engine_ends_a_turn(tokenizer):
    end, pad, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|im_start|>"])
    assert chat_with(tokenizer, PLAIN).stop_ids == {end, pad}
    chat = chat_with(tokenizer, PLAIN, eos_ids=[start, 7])
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
    chat = chat_with(tokenizer, PLAIN)
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
@given(
    parts=st.lists(
        st.sampled_from([*map(str, ADDED), "<|im_end|>", "<|endoftext|>", " ", "\n", "a", "é", "\ue0002\ue001"])
    )
)
def test_text_never_becomes_an_added_token(checkpoint, parts):
    tokenizer, text = AutoTokenizer.from_pretrained(checkpoint), "".join(parts)
    tokenizer.add_tokens(list(ADDED))
    chat = chat_with(tokenizer, PLAIN)
    ids = list(text.encode())
    assert len(chat.user(text)) == len(chat.user("")) + len(ids)
    assert len(chat.context([text, text])) == len(chat.context(["", ""])) + 2 * len(ids)
    thoughts = text.count("<think>") + text.count("</think>")
    answer = chat.assistant(text)
    assert [i in tokenizer.added_tokens_decoder for i in answer].count(True) == thoughts + 1
    assert chat.decode(answer) == text


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
