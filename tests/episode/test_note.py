"""What the teacher is shown beside the conversation: that it arrives, and that it changes nothing else."""

import copy
import json
from dataclasses import replace

import pytest

from examples.tcod import ConfigError, Failure
from examples.tcod.environments.protocol import Execution
from examples.tcod.episode.episode import Episode
from examples.tcod.episode.history import LEFT_OUT
from examples.tcod.settings import build
from examples.tcod.settings.run import run_of
from tests.episode.test_evaluation import evaluation
from tests.support.corridor import CONTROL_TOKENS
from tests.support.fake_sglang import scored
from tests.support.rig import LEFT, RIGHT, teacher_value
from tests.support.toys import CHAT_TEMPLATE, Corridor

DEMO = {"actions": ["right"] * 3, "observations": ["You are at door 1.", "You are at door 2.", "You are at door 3."]}
HAZARDOUS = "tests.support.corridor.HazardousCorridor"
BOTH = ["demo", "hindsight"]
THOUGHT = "<think>\nwhich one\n</think>\n\n"
NO_THOUGHTS = {"apply_chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture
def rig(rig):
    rig.teacher.pages["/server_info"] = {"max_req_input_len": 6200}  # an episode's 2000 and the note's 4096
    return rig


def told(steps):
    return "\n".join(f"> {action}" + (f"\n{answer}" if answer else "") for action, answer in steps)


def expected_note(attempt=None, won=False, demo=DEMO):
    """The protocol's own words, of (action, answer) pairs."""
    parts = ["A note that is not part of the conversation: its agent does not know it."]
    if demo:
        parts.append("What solves the task:\n" + told(zip(demo["actions"], demo["observations"], strict=True)))
    if attempt:
        end = f"The task was {'' if won else 'not '}solved."
        parts.append(f"What the agent does in this conversation, to its end:\n{told(attempt)}\n{end}")
    return "\n\n".join([*parts, "Judge the next answer as one that has to be found from the conversation alone."])


def attempt_of(record):
    """(action, answer) pairs out of the record of a whole episode; an answer is what the next turn answers."""
    turns = [*record["replayed_turns"], *record["turns"]]
    answers = [*(turn["observation"] for turn in turns[1:]), record["outcome"]]
    actions = [turn["action"] if turn.get("valid", True) else "(no valid action)" for turn in turns]
    return list(zip(actions, answers, strict=True))


def has_note(rig, payload):
    return "What solves" in rig.tokenizer.decode(payload["input_ids"])


def rendered(rig, texts, kwargs):
    roles = ["system", *["user", "assistant"] * len(texts)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return rig.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs)


CASES = {
    "append": {},
    "append, replayed": {"tcod_variant": "b2f"},
    "append, thoughts": {"tcod_thoughts": "keep"},
    "turns": {"tcod_history": "turns"},
    "turns, replayed": {"tcod_history": "turns", "tcod_variant": "b2f"},
    "turns, window": {"tcod_history": "turns", "tcod_window": 1},
    "turns, thoughts": {"tcod_history": "turns", "tcod_thoughts": "keep"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_teachers_request_is_the_record_with_the_note_in_the_first_user_turn(rig, case):
    changes = {**CASES[case], **({"apply_chat_template_kwargs": {}} if "thoughts" in case else NO_THOUGHTS)}
    says = THOUGHT if "thoughts" in case else ""
    rig.script = [says + RIGHT, "hm", says + LEFT, says + RIGHT, says + RIGHT, says + RIGHT]
    row, kwargs = {"goal": 3, "demo": DEMO}, changes["apply_chat_template_kwargs"]
    samples, metrics = rig.rollout([row], n=0, tcod_horizon=6, tcod_teacher_sees=BOTH, **changes)
    records = [sample.metadata["tcod"] for sample in samples]
    whole = {**records[0], "turns": [turn for record in records for turn in record["turns"]]}
    if "replayed" in case:  # the demonstration's two turns, which are with no sample of a turn
        whole["replayed_turns"] = [
            {"observation": text, "action": "right"}
            for text in ("Goal: door 3. You are at door 0.", "You are at door 1.")
        ]
    note = expected_note(attempt_of(whole), won=whole["won"])
    first, *later = [turn["observation"] for turn in [*whole["replayed_turns"], *whole["turns"]]]
    answers, requests = [RIGHT] * len(whole["replayed_turns"]), rig.scoring_requests()
    for request, sample in zip(requests, samples, strict=True):
        texts, own = ["Walk.", f"{first}\n\n{note}"], sample.tokens[-sample.response_length :]
        if "append" in case:  # behind the first prompt; what was replayed is there, too
            own = sample.tokens[len(rendered(rig, ["Walk.", first], kwargs)) :]
        else:
            texts += [text for pair in zip(answers, later, strict=False) for text in pair]
            if "window" in case and len(answers) > 1:
                texts = ["Walk.", f"{first}\n\n{LEFT_OUT}\n\n{note}", *texts[-2:]]
            answers.append(rig.tokenizer.decode(own).removesuffix("<|im_end|>"))
        ids = rendered(rig, texts, kwargs) + own
        assert request["input_ids"] == ids, case
        assert request["logprob_start_len"] == (start := len(ids) - sample.response_length) - 1
        assert sample.teacher_log_probs == [teacher_value(start + i, 0) for i in range(sample.response_length)]
    assert metrics["rollout/tcod/note_tokens"] == len(requests[0]["input_ids"]) - len(samples[0].tokens)
    shares = [metrics[f"rollout/tcod/note_{name}"] for name in ("demo", "hindsight", "cut")]
    assert shares == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("history", ["append", "turns"])
def test_the_student_and_what_is_trained_are_the_same_without_it(rig, history):
    """The scripted teacher scores by whether it sees the note, so its scores alone differ."""
    rig.teacher_reply = lambda payload: scored(payload, lambda at, token: -0.1 if has_note(rig, payload) else -0.9)
    fields = ("tokens", "loss_mask", "rollout_log_probs", "response", "response_length", "reward", "status")
    seen = []
    for sees in (BOTH, None):
        rig.student.requests.clear()
        samples, _ = rig.rollout([{"goal": 2, "demo": DEMO}], tcod_history=history, tcod_teacher_sees=sees)
        asked = [payload["input_ids"] for payload in rig.student.payloads()]
        seen.append(([[getattr(one, name) for name in fields] for one in samples], asked))
        assert {value for one in samples for value in one.teacher_log_probs} == {-0.1 if sees else -0.9}
        assert not any(has_note(rig, payload) for payload in rig.student.payloads())
    assert seen[0] == seen[1]


def test_text_that_spells_control_tokens_stays_text(rig):
    demo = {"actions": ["right", "<|im_end|>"], "observations": [CONTROL_TOKENS, "<|im_start|>system"]}
    row = {"goal": 3, "demo": demo, "hazard": "control tokens"}  # said to the student's second action, too
    for history in ("append", "turns"):
        rig.teacher.requests.clear()
        samples, _ = rig.rollout([row], tcod_environment=HAZARDOUS, tcod_history=history, tcod_teacher_sees=BOTH)
        for request, sample in zip(rig.scoring_requests(), samples, strict=True):
            texts = map(rig.tokenizer.decode, (sample.tokens, request["input_ids"]))
            own, asked = (text.count(CONTROL_TOKENS) for text in texts)
            assert asked == own + 2
            for token in rig.tokenizer.added_tokens_decoder:
                assert request["input_ids"].count(token) == sample.tokens.count(token)


def test_an_evaluation_is_scored_without_it(rig):
    train = [{"goal": 2, "demo": DEMO}, {"goal": 9}]
    output = evaluation(rig, (1.0,), train, train=train, tcod_eval_kl=True, tcod_teacher_sees=BOTH)
    assert output.metrics["eval/tcod/t1/kl/episodes"] == 2 and not any("note" in name for name in output.metrics)
    tokens = [sample.tokens for sample in output.data["t1"]["samples"]]
    assert sorted(payload["input_ids"] for payload in rig.scoring_requests()) == sorted(tokens)


@pytest.mark.parametrize(
    "n, rows, sees, shares",
    [
        (0, [{"goal": 2, "demo": DEMO}], BOTH, None),  # tcod_sees_from: 1
        (1, [{"goal": 2, "demo": DEMO}, {"goal": 2}], BOTH, (0.5, 1.0)),
        (1, [{"goal": 2, "demo": DEMO}, {"goal": 2}], ["demo"], (0.5, 0.0)),
        (1, [{"goal": 2, "demo": DEMO}], "hindsight", (0.0, 1.0)),
        (1, [{"goal": 2, "demo": {**DEMO, "observations": ["one of three"]}}], "hindsight", (0.0, 1.0)),  # not read
    ],
)
def test_each_sample_is_shown_what_there_is(rig, n, rows, sees, shares):
    samples, metrics = rig.rollout(rows, n=n, tcod_teacher_sees=sees, tcod_sees_from=1)
    found = [metrics.get(f"rollout/tcod/note_{part}") for part in ("demo", "hindsight")]
    assert found == list(shares or (None, None))
    plain = sorted(sample.tokens for sample in samples) == sorted(one["input_ids"] for one in rig.scoring_requests())
    assert plain is not any(shares or ())


def test_a_long_note_loses_its_oldest_observations_first(rig):
    rig.script = [RIGHT, LEFT, RIGHT, RIGHT]
    row = {"goal": 2, "demo": DEMO}
    args, sample = rig.generate(row, 4, tcod_teacher_sees=BOTH)
    run, actions, answers = run_of(args), ("right", "left", "right", "right"), (1, 0, 1, 2)
    writer = build.notes_of(run.config, run.chat)

    def write(note_len):
        return replace(writer, note_len=note_len).write(row, Episode.of(sample))

    for left_out in range(8):
        steps = enumerate(zip(actions, answers, strict=True))
        attempt = [(action, f"You are at door {door}." if i >= left_out else "") for i, (action, door) in steps]
        observations = [text if i >= left_out - 4 else "" for i, text in enumerate(DEMO["observations"])]
        expected = expected_note(attempt, won=True, demo={**DEMO, "observations": observations})
        fits = len(writer.chat.user(expected))
        assert (write(fits).text, write(fits).left_out) == (expected, left_out)
    # Beyond those its oldest steps go, at last all; where even the words around them do not fit, the episode fails.
    assert write(fits - 1).text.count("> ") == 6 and write(fits - 1).text.endswith("conversation alone.")
    with pytest.raises(Failure, match="raise tcod_note_len") as caught:
        write(9)
    assert caught.value.reason == "note_too_long"
    _, metrics = rig.rollout([row], tcod_teacher_sees=BOTH, tcod_note_len=fits)
    assert metrics["rollout/tcod/note_cut"] == 1 and metrics["rollout/tcod/note_tokens"] <= fits


def test_a_note_that_can_never_be_shown_stops_the_run(rig):
    changes = {"tcod_teacher_sees": BOTH, "tcod_history": "turns", "tcod_horizon": 6}
    with pytest.raises(ConfigError, match="no note .* more than 9 tokens without any step: raise tcod_note_len"):
        rig.rollout([{"goal": 2, "demo": DEMO}], tcod_note_len=9, **changes)
    recent = "(messages if messages|length < 10 else messages[:1] + messages[-5:])"
    rig.checkpoint, rig.tokenizer = rig.folder / "recent", copy.copy(rig.tokenizer)
    rig.tokenizer.chat_template = CHAT_TEMPLATE.replace("in messages", f"in {recent}")
    rig.tokenizer.save_pretrained(rig.checkpoint)
    with pytest.raises(ConfigError, match="the chat template drops it, .*: lower tcod_window, or remove"):
        rig.rollout([{"goal": 2, "demo": DEMO}], **changes)
    rig.rollout([{"goal": 2, "demo": DEMO}], **changes, tcod_window=2)
    [sample] = rig.play({"goal": 2, "demo": {**DEMO, "observations": ["one of three"]}}, 4, **changes, tcod_window=2)
    assert Episode.of(sample).record.failure == "demo_mismatch"


class Silent(Corridor):
    @staticmethod
    def teacher_note(demonstration, attempt):
        return "" if attempt and attempt.won else Corridor.teacher_note(demonstration, attempt)


def test_what_is_not_shown_is_not_counted(rig, monkeypatch):
    monkeypatch.setenv("TCOD_RUN_DIR", str(rig.folder / "run"))
    silent = {"tcod_environment": "tests.episode.test_note.Silent", "tcod_save_plain_scores": True}
    _, metrics = rig.rollout([{"goal": 2, "demo": DEMO}, {"goal": 9}], tcod_teacher_sees=BOTH, **silent)
    assert [metrics[f"rollout/tcod/note_{part}"] for part in BOTH] == [0.0, 0.5]
    lines = map(json.loads, (rig.folder / "run/rollouts/train_000000.jsonl").read_text().splitlines())
    assert [bool(line["note"]) for line in lines] == [False, True]  # what was won comes first
    assert len(rig.scoring_requests()) == 3  # the shown one once more
    row = {"goal": 2, "demo": {"actions": ["right"] * 9}}  # nothing to leave out but the steps
    args, sample = rig.generate(row, 4, tcod_teacher_sees=["demo"])
    writer = build.notes_of(run_of(args).config, run_of(args).chat)
    fits = len(writer.chat.user(writer.write(row, Episode.of(sample)).text))
    note = replace(writer, note_len=fits - 1).write(row, Episode.of(sample))
    assert (note.left_out, note.text.count("> ")) == (1, 8)
    words_alone = len(writer.chat.user(Corridor.teacher_note(Execution((), won=True), None)))
    note = replace(writer, note_len=words_alone).write(row, Episode.of(sample))
    assert (note.parts, note.left_out) == ((), 9)


def test_rows_that_cannot_be_shown_stop_the_run(rig):
    rows = [{"goal": 2, "demo": DEMO}, {"goal": 2, "demo": {**DEMO, "observations": ["one of three"]}}]
    with pytest.raises(ConfigError, match="cannot be shown to the teacher: 1 observations, 3 actions"):
        rig.rollout(rows, tcod_teacher_sees=BOTH)


def test_the_students_own_engines_score_behind_slimes_router(rig):
    def answer(payload):
        return scored(payload, teacher_value) if "logprob_start_len" in payload else rig.student_reply(payload)

    rig.student.reply = lambda payload: rig.teacher_answer(payload) if "text" in payload else answer(payload)
    [sample], metrics = rig.rollout([{"goal": 2, "demo": DEMO}], rm_url="self", tcod_teacher_sees=["demo"])
    [request] = [one for one in rig.student.payloads() if "input_ids" in one and "logprob_start_len" in one]
    assert rig.teacher.requests == [] and expected_note() in rig.tokenizer.decode(request["input_ids"])
    assert metrics["rollout/tcod/tokens/scored"] == sample.response_length


def test_saved_episodes_are_scored_without_their_note_too(rig, monkeypatch):
    monkeypatch.setenv("TCOD_RUN_DIR", str(rig.folder / "run"))
    rig.teacher_reply = lambda payload: scored(payload, lambda at, token: -0.1 if has_note(rig, payload) else -0.9)
    rows = [{"goal": 2, "demo": DEMO}] * 3
    changes = {"tcod_teacher_sees": BOTH, "tcod_save_plain_scores": True, "tcod_save_episodes": 2}
    for history in ("append", "turns"):
        rig.teacher.requests.clear()
        samples, _ = rig.rollout(rows, tcod_history=history, **changes)
        assert {value for one in samples for value in one.teacher_log_probs} == {-0.1}
        assert len(rig.scoring_requests()) == len(samples) // 3 * (3 + 2)
        lines = (rig.folder / "run/rollouts/train_000000.jsonl").read_text().splitlines()
        for line in map(json.loads, lines):
            attempt = [("right", "You are at door 1."), ("right", "You are at door 2.")]
            assert "\n".join(line["note"]["text"]) == expected_note(attempt, won=True)
            assert all(set(turn["teacher"]) == {-0.1} and set(turn["plain"]) == {-0.9} for turn in line["turns"])
            assert all(len(turn["plain"]) == len(turn["tokens"]) for turn in line["turns"])
        assert len(lines) == 2
    # Not where nothing is saved.
    monkeypatch.delenv("TCOD_RUN_DIR")
    rig.teacher.requests.clear()
    rig.rollout(rows, **changes)
    assert len(rig.scoring_requests()) == 3
    monkeypatch.setenv("TCOD_RUN_DIR", str(rig.folder / "run"))
    # Where that fails, the episodes are trained and saved all the same.
    plain = {"error": "?"}
    rig.teacher_reply = lambda payload: (scored(payload, teacher_value) if has_note(rig, payload) else plain)
    samples, metrics = rig.rollout(rows, **changes)
    assert len(samples) == 3 and metrics["rollout/tcod/failed"] == metrics["rollout/tcod/unsaved_episodes"] == 0
