"""The smoke run's games, tokenizer and models."""

import json
import random

import pytest
import torch

from examples.tcod.env_alfworld import AlfworldEnvironment
from examples.tcod.environments.protocol import Execution, Step
from examples.tcod.episode.history import AppendHistory, TurnHistory
from examples.tcod.model.chat_tokens import ChatTokens
from examples.tcod.model.student import Response
from smoke import expert, lessons, make_games, make_models, note_teacher
from smoke.noted_alfworld import NotedAlfworld, SeenAlfworld

teacher, tokenizer = make_models.load(make_models.SHIPPED)
chat = ChatTokens(tokenizer, make_models.CHAT)


def game_bytes(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    root = tmp_path_factory.mktemp("games")
    make_games.make_games(root, train=6, heldout=2, processes=2)
    return root


def rows(root, name):
    return [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]


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
    make_games.make_games(games, train=6, heldout=2, processes=1)
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
            assert noise or all(step.label for step in steps) and len(steps) <= lessons.HORIZON


def test_any_text_survives_the_tokenizer_and_things_are_single_tokens(games):
    for text in ("d\u00e9j\u00e0 vu \u6f22\u5b57\n\n\t x  y ", "go to cabinet 12", "<|im_end|> is data"):
        assert tokenizer.decode(tokenizer.encode(text, split_special_tokens=True)) == text
    assert len(tokenizer.encode("<action>take apple 1 from cabinet 2</action>")) == 6
    environment = AlfworldEnvironment(str(games))
    for row in rows(games, "heldout"):
        text = environment.reset(row["metadata"]).text
        assert len(tokenizer.encode(text)) <= len(text.split()) * 1.25


def test_the_chat_has_the_shape_of_qwen3():
    turn, header = "<|im_start|>user\nU<|im_end|>\n", "<|im_start|>assistant\n"
    no_thought = header + "<think>\n\n</think>\n\n"
    assert tokenizer.decode(chat.context(["S", "U"])) == f"<|im_start|>system\nS<|im_end|>\n{turn}{no_thought}"
    assert tokenizer.decode(chat.assistant("A") + chat.user("U")) == f"A<|im_end|>\n{turn}{no_thought}"
    messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}]
    rendered = tokenizer.apply_chat_template(messages + messages[:1], tokenize=False, add_generation_prompt=True)
    assert rendered == f"{turn}{header}A<|im_end|>\n{turn}{header}"
    stops = json.loads((make_models.SHIPPED / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) == chat.stop_ids == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


def test_only_the_experts_own_answers_are_labels():
    played = [("look", True, "Nothing."), ("inventory", False, "x"), ("go to x", True, "")]
    ids, labels = lessons.encode(chat, "Here.", [expert.Step(*step) for step in played])
    labelled = [token for token, label in zip(ids, labels, strict=True) if label]
    assert tokenizer.decode(labelled) == "<action>look</action><|im_end|><action>go to x</action><|im_end|>"
    assert tokenizer.decode(ids).endswith("<action>go to x</action><|im_end|>")


def test_answers_that_think_branch_off_what_turns_shows():
    """Their loss in one sequence is that of the sequences that the recipe's history makes of the same turns."""
    steps = [
        expert.Step("go to drawer 1", True, "The drawer 1 is closed.", "look for apple"),
        expert.Step("look", False, "Nothing."),
        expert.Step("open drawer 1", True, "You open it.", "look for apple"),
    ]
    thinking = make_models.thinking_chat(tokenizer)
    history = TurnHistory(thinking, 1000)
    history.begin(AlfworldEnvironment.system_prompt({}), "Here.")
    examples = []
    for step in steps:
        think = f"<think>\n{step.thought}\n</think>\n\n"
        said = thinking.assistant(f"{think}<action>{step.action}</action>")
        if step.label:
            examples.append((history.context + said, [0] * len(history.context) + [1] * len(said)))
        history.add_response(Response(said, [0.0] * len(said), False, {}))
        history.add_turn(step.text)
    branched = lessons.encode_thoughts(thinking, "Here.", steps)
    assert [branched.ids[:before] + branched.ids[start:end] for start, end, before in branched.answers] == [
        ids for ids, _ in examples
    ]
    assert "<think>" not in tokenizer.decode(branched.ids[: branched.answers[0][0]])
    with torch.no_grad():
        loss = lessons.thoughts_loss(teacher, [branched, branched]).item()
        assert loss == pytest.approx(lessons.label_loss(teacher, examples).item(), abs=1e-4)


def test_the_student_is_a_function_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(make_models, "DAMAGE_STEPS", 2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_models.make_student(make_models.SHIPPED, tmp_path / name, seed)
    a, b, c = (make_models.load(tmp_path / name)[0].state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a if "norm" not in key)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (make_models.SHIPPED / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_the_shipped_teacher_is_what_its_command_makes(tmp_path):
    """The first steps of a fresh training repeat the shipped loss curve; the shipped file is where that curve ends."""
    curve = json.loads((make_models.SHIPPED / "losses.json").read_text())
    assert len(curve) == sum(steps for steps, _ in make_models.CYCLES)
    count = lessons.BLOCK // lessons.PLAYS
    games = [*range(count), *range(make_models.GAMES, make_models.GAMES + 8)]
    examples = [lessons.encode(chat, *one) for one in lessons.demonstrations(games, processes=2)]
    fresh, unseen = examples[: lessons.BLOCK], examples[lessons.BLOCK :]
    steps = 20
    torch.set_num_threads(2)
    rates = make_models.cosine(*make_models.CYCLES[0])[:steps]
    losses = make_models.train(make_models.new_teacher(tokenizer), lessons.batches(fresh, seed=0), rates)
    assert losses == pytest.approx(curve[:steps], rel=0.01)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    # Demonstrations of games beyond those of the training, and the student, who has lost them.
    make_models.make_student(make_models.SHIPPED, tmp_path, seed=1)
    with torch.no_grad():
        loss, lost = (lessons.label_loss(model, unseen).item() for model in (teacher, make_models.load(tmp_path)[0]))
    assert loss == pytest.approx(sum(curve[-100:]) / 100, rel=0.25)
    assert lost > 2 * loss


def test_what_a_teacher_does_is_what_its_note_shows(games):
    players = [note_teacher.Player(str(games), row, random.Random(1)) for row in rows(games, "train")]
    solutions = [player.solution() for player in players]
    assert all(solution.won for solution in solutions)
    for player, solution, other in zip(players, solutions, solutions[3:] + solutions[:3], strict=True):
        thing, place = next(step.action for step in solution.steps if step.action.startswith("take"))[5:].split(
            " from "
        )
        first, attempt, said = player.lesson("demo", other)
        assert (
            f"take {thing} from {place}" in first and said[0] == f"go to {place}" and len(said) == len(attempt.steps)
        )
        # Another game's is followed word by word; behind its end there is nothing to learn.
        first, attempt, said = player.lesson("another's", other)
        followed = [action for action, step in zip(said, attempt.steps, strict=True) if action == step.action]
        assert followed == [step.action for step in other.steps][: len(followed)]
        assert len(followed) < len(other.steps) or set(said[said.index(followed[-1]) + 1 :]) <= {"", followed[-1]}
        # In hindsight it is known from the first turn on what was found at any time.
        first, attempt, said = player.lesson("hindsight", other)
        found = any(f" {thing}" in step.observation for step in attempt.steps)
        assert (f"take {thing} from {place}" in first) == found and (not found or said[0] == f"go to {place}")
        assert "Found" not in player.lesson("none", other)[0]
    # What it is taught is what the recipe has it score: the context of the turn, and the answer.
    history, taught = AppendHistory(chat, 10_000), []
    history.begin(AlfworldEnvironment.system_prompt({}), first)
    for step, action in zip(attempt.steps, said, strict=True):
        taught.append(history.context + chat.assistant(f"<action>{action}</action>"))
        history.add_response(Response(chat.assistant(f"<action>{step.action}</action>"), [], False, {}))
        history.add_turn(step.observation)
    branched = note_teacher.encode(chat, (first, attempt, said))
    assert [branched.ids[:before] + branched.ids[start:end] for start, end, before in branched.answers] == taught


def test_the_notes_that_tiny_models_read():
    solution = Execution((Step("go to desk 1"), Step("take pen 1 from desk 1"), Step("go to bed 1")), won=True)
    seen = (
        "You arrive at desk 1. On the desk 1, you see a pen 1, and a cup 2.",
        "You pick up the pen 1 from the desk 1.",
    )
    later = (
        "You open the safe 1. The safe 1 is open. In it, you see a cup 2.",
        "The box 1 is closed.",
        "Nothing happens.",
    )
    attempt, blind = (
        Execution(tuple(Step("look", text) for text in texts), won=False) for texts in (seen + later, later)
    )
    shown = "Solution: go to desk 1; take pen 1 from desk 1; go to bed 1"
    assert NotedAlfworld.teacher_note(solution, None) == SeenAlfworld.teacher_note(solution, attempt) == shown
    assert NotedAlfworld.teacher_note(None, attempt) == "Found: take pen 1 from desk 1; take cup 2 from desk 1"
    assert NotedAlfworld.teacher_note(solution, blind) == f"{shown}\nFound: take cup 2 from safe 1"
    assert SeenAlfworld.teacher_note(solution, blind) == ""
    nothing = Execution((), won=True)  # as the launch check asks for the shortest note
    assert SeenAlfworld.teacher_note(nothing, nothing) == "Solution: "
    assert NotedAlfworld.teacher_note(None, Execution((Step("look", "Nothing happens."),), won=False)) == "Found: "
