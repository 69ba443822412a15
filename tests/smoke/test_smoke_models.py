"""The smoke run's games, tokenizer and models."""

import json
import random

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.episode.history import TurnHistory
from examples.tcod.model.chat_tokens import ChatTokens
from examples.tcod.model.student import Response
from smoke import expert, make_games, make_models

NUM_GPUS = 0
PICK = make_models.TASK


def game_bytes(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    root = tmp_path_factory.mktemp("games")
    make_games.make_games(root, train=6, heldout=2, processes=2)
    return root


def rows(root, name):
    return [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(make_models.SHIPPED)


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatTokens(tokenizer, make_models.CHAT)


@pytest.fixture(scope="module")
def teacher():
    return Qwen3ForCausalLM.from_pretrained(make_models.SHIPPED, dtype=torch.float32)


@pytest.mark.parametrize("task_type", make_games.TASKS)
def test_a_game_is_reproducible_and_its_demonstration_wins(task_type, tmp_path):
    row = make_games.make_game(tmp_path / "a", "train", task_type, 5, 3)
    assert row == make_games.make_game(tmp_path / "b", "train", task_type, 5, 3)
    assert game_bytes(tmp_path / "a") == game_bytes(tmp_path / "b")
    assert row["label"] == row["metadata"]["task_type"] == task_type
    environment = AlfworldEnvironment(str(tmp_path / "a"))
    observation = environment.reset(row["metadata"])
    assert f"Your task is to: {row['prompt']}" in observation.text
    for action in row["metadata"]["demo"]["actions"]:
        assert not observation.won
        assert action == " ".join(action.split())
        observation = environment.step(action)
    assert observation.won


def test_games_are_made_once_and_heldout_games_are_others(games):
    before = {path: path.stat().st_mtime_ns for path in games.rglob("game.tw-pddl")}
    calls = []
    make_games.make_games(games, train=6, heldout=2, processes=1, progress=lambda: calls.append(1))
    assert len(calls) == 8
    assert before == {path: path.stat().st_mtime_ns for path in games.rglob("game.tw-pddl")}
    problems = [(path.parent / "initial_state.pddl").read_text() for path in before]
    assert len(set(problems)) == 8
    files = [{row["metadata"]["game_file"] for row in rows(games, name)} for name in ("train", "heldout")]
    assert [len(names) for names in files] == [6, 2] and not files[0] & files[1]
    assert all((games / name).exists() for names in files for name in names)


def test_the_expert_wins_and_recovers_from_noise(games):
    environment = AlfworldEnvironment(str(games))
    for row in rows(games, "train"):
        for noise in (0.0, 0.3):
            _, steps, won = expert.demonstrate(environment, row["metadata"], random.Random(1), noise, horizon=60)
            assert won
            assert noise or all(step.label for step in steps) and len(steps) <= make_models.HORIZON


def test_any_text_survives_the_tokenizer_and_things_are_single_tokens(tokenizer, games):
    for text in (
        "d\u00e9j\u00e0 vu \u6f22\u5b57\n\n\t x  y ",
        "go to cabinet 12",
        "<|im_end|> is data",
        "a cabinet 1, 2 apples",
    ):
        assert tokenizer.decode(tokenizer.encode(text, split_special_tokens=True)) == text
    assert len(tokenizer.encode("<action>take apple 1 from cabinet 2</action>")) == 6
    environment = AlfworldEnvironment(str(games))
    for row in rows(games, "heldout"):
        text = environment.reset(row["metadata"]).text
        assert len(tokenizer.encode(text)) <= len(text.split()) * 1.25


def test_the_chat_has_the_shape_of_qwen3(tokenizer, chat):
    header = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    prompt = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n" + header
    assert tokenizer.decode(chat.prompt("S", "U")) == prompt
    answer, after = chat.assistant("<action>look</action>"), chat.user("V")
    assert (
        tokenizer.decode(answer + after) == f"<action>look</action><|im_end|>\n<|im_start|>user\nV<|im_end|>\n{header}"
    )
    messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}]
    rendered = tokenizer.apply_chat_template(messages + messages[:1], tokenize=False, add_generation_prompt=True)
    turn = "<|im_start|>user\nU<|im_end|>\n"
    assert rendered == f"{turn}<|im_start|>assistant\nA<|im_end|>\n{turn}<|im_start|>assistant\n"
    stops = json.loads((make_models.SHIPPED / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) == chat.stop_ids == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


def test_only_the_experts_own_answers_are_labels(tokenizer, chat):
    steps = [
        expert.Step("look", True, "Nothing."),
        expert.Step("inventory", False, "x"),
        expert.Step("go to x", True, ""),
    ]
    ids, labels = make_models.encode(chat, "Here.", steps)
    labelled = [token for token, label in zip(ids, labels, strict=True) if label]
    assert tokenizer.decode(labelled) == "<action>look</action><|im_end|><action>go to x</action><|im_end|>"
    assert tokenizer.decode(ids).endswith("<action>go to x</action><|im_end|>")


def test_answers_that_think_branch_off_what_turns_shows(tokenizer, teacher):
    """Their loss in one sequence is that of the sequences that the recipe's history makes of the same turns."""
    steps = [
        expert.Step("go to drawer 1", True, "The drawer 1 is closed.", "look for apple"),
        expert.Step("look", False, "Nothing."),
        expert.Step("open drawer 1", True, "You open it.", "look for apple"),
    ]
    chat = make_models.thinking_chat(tokenizer)
    history = TurnHistory(chat, 1000)
    history.begin(AlfworldEnvironment.system_prompt({}), "Here.")
    examples = []
    for step in steps:
        think = f"<think>\n{step.thought}\n</think>\n\n"
        said = chat.assistant(f"{think}<action>{step.action}</action>")
        if step.label:
            examples.append((history.context + said, [0] * len(history.context) + [1] * len(said)))
        history.respond(Response(said, [0.0] * len(said), False, {}))
        history.observe(step.text)
    branched = make_models.encode_thoughts(chat, "Here.", steps)
    assert [branched.ids[:before] + branched.ids[start:end] for start, end, before in branched.answers] == [
        ids for ids, _ in examples
    ]
    assert "<think>" not in tokenizer.decode(branched.ids[: branched.answers[0][0]])
    with torch.no_grad():
        loss = make_models.thoughts_loss(teacher, [branched, branched]).item()
        assert loss == pytest.approx(make_models.label_loss(teacher, examples).item(), abs=1e-4)


def test_the_student_is_a_function_of_the_seed(tmp_path, teacher):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_models.make_student(make_models.SHIPPED, tmp_path / name, seed)
    a, b, c = (Qwen3ForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a if "norm" not in key)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (make_models.SHIPPED / "tokenizer.json").read_bytes()


@torch.no_grad()
def success(model, chat, root, temperature, seed=0):
    """Share of the held-out games won within the horizon."""
    torch.manual_seed(seed)
    environment, won = AlfworldEnvironment(str(root)), []
    for row in rows(root, "heldout"):
        observation, cache = environment.reset(row["metadata"]), None
        new = chat.prompt(environment.system_prompt({}), environment.render(observation, True, False))
        for _ in range(make_models.HORIZON):
            answer = []
            while len(answer) < 16 and not (answer and answer[-1] in chat.stop_ids):
                output = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                new = torch.multinomial((output.logits[0, -1] / temperature).softmax(-1), 1).tolist()
                answer += new
            observation = environment.step(environment.parse_action(chat.text(answer))[0])
            if observation.won:
                break
            # The last sampled token is not in the cache yet; a cut answer gets its end of turn.
            new = new + [chat.end_of_turn] * (new[0] != chat.end_of_turn)
            new += chat.user(environment.render(observation, False, False))
        won.append(observation.won)
    return sum(won) / len(won)


@pytest.mark.slow
def test_the_shipped_teacher_is_what_its_command_makes(tmp_path, tokenizer, chat, teacher):
    """The first steps of a fresh training repeat the shipped loss curve; the shipped file is where that curve ends."""
    make_models.make_tokenizer(make_models.tokenizer_texts()).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (make_models.SHIPPED / "tokenizer.json").read_text()

    curve = json.loads((make_models.SHIPPED / "losses.json").read_text())
    assert len(curve) == sum(steps for steps, _ in make_models.CYCLES)
    count = make_models.BLOCK // make_models.PLAYS
    games = [*range(count), *range(make_models.GAMES, make_models.GAMES + 8)]
    examples = [make_models.encode(chat, *one) for one in make_models.demonstrations(games, processes=2)]
    fresh, unseen = examples[: make_models.BLOCK], examples[make_models.BLOCK :]
    steps = 20
    torch.set_num_threads(2)
    rates = make_models.cosine(*make_models.CYCLES[0])[:steps]
    losses = make_models.train(make_models.new_teacher(tokenizer), make_models.batches(fresh, seed=0), rates)
    assert losses == pytest.approx(curve[:steps], rel=0.01)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    # Demonstrations of games beyond those of the training, and held-out play.
    with torch.no_grad():
        loss = make_models.label_loss(teacher, unseen).item()
    assert loss == pytest.approx(sum(curve[-100:]) / 100, rel=0.25)
    make_games.make_games(tmp_path, train=0, heldout=24, processes=2)
    make_models.make_student(make_models.SHIPPED, tmp_path / "student", seed=1)
    student = Qwen3ForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert success(teacher, chat, tmp_path, temperature=0.4) >= 0.85
    assert success(student, chat, tmp_path, temperature=0.4) <= 0.35
