"""Several environments in one run: a row names its own, and is played by its horizon, rules, tools and teacher."""

import json

import pytest
import yaml

from examples.tcod import ConfigError
from examples.tcod.settings import row_checks
from examples.tcod.settings.config import TcodConfig
from slime.utils.types import Sample
from smoke import cpu_only
from tests.episode.test_evaluation import evaluation
from tests.episode.test_tools import call, with_tools
from tests.support.corridor import Corridor
from tests.support.fake_sglang import FakeSGLang, scored
from tests.support.rig import RIGHT, Rig

cpu_only.prepare()

WALK = {"tcod_environment": "tests.support.corridor.Corridor", "tcod_admissible": "turn"}
CALL = {"tcod_environment": "tests.support.corridor.ToolCorridor", "tcod_tool_parser": "qwen", "tcod_horizon": 2}
MIXED = {"tcod_environments": {"walk": WALK, "call": CALL}, "rollout_max_response_len": 250}
ROWS = [{"environment": "walk", "goal": 9}, {"environment": "call", "goal": 9}]


class TerseCorridor(Corridor):
    @staticmethod
    def teacher_note(demonstration, attempt):
        return "A terse note."


@pytest.fixture
def mixed(rig, tmp_path):
    """A rig whose student answers with calls where it is shown a tool."""
    with_tools(rig, tmp_path / "tools")

    def answer(turn, payload):
        shows_tools = '"move"' in rig.tokenizer.decode(payload["input_ids"])
        rig.script = [call("right") if shows_tools else RIGHT] * 20
        return Rig.answer(rig, turn, payload)

    rig.answer = answer
    return rig


def by_environment(samples):
    return {sample.metadata["environment"]: sample for sample in samples}


def test_each_row_has_the_horizon_rules_actions_and_tools_of_its_environment(mixed):
    samples, metrics = mixed.rollout(ROWS, **MIXED)
    walked, called = (by_environment(samples)[name] for name in ("walk", "call"))
    assert [len(one.metadata["tcod"]["turns"]) for one in (walked, called)] == [4, 2]
    assert [one.metadata["tcod"]["environment"] for one in (walked, called)] == ["walk", "call"]
    texts = [mixed.tokenizer.decode(one.tokens) for one in (walked, called)]
    assert ["Actions: left, right" in text for text in texts] == [True, False]
    assert ["<tool_response>" in text for text in texts] == [False, True]
    assert json.loads(called.metadata["tcod"]["turns"][0]["action"])[0]["name"] == "move"
    for name, turns in (("walk", 4), ("call", 2)):
        of = {key: metrics[f"rollout/tcod/by_environment/{name}/{key}"] for key in ("k", "episodes", "turns/student")}
        assert of == {"k": turns, "episodes": 1, "turns/student": turns}
        assert metrics[f"rollout/tcod/by_environment/{name}/success"] == 0
    kls = [metrics[f"rollout/tcod/by_environment/{name}/kl/trajectory"] for name in ("walk", "call")]
    assert sum(kls) / 2 == pytest.approx(metrics["rollout/tcod/kl/trajectory"]) and kls[0] != kls[1]


def test_the_chat_template_is_tried_up_to_the_longest_horizon(mixed):
    hurry = "{% if messages|length > 14 %}Hurry.{% endif %}<|im_start|>assistant"
    mixed.tokenizer.chat_template = mixed.tokenizer.chat_template.replace("<|im_start|>assistant", hurry)
    mixed.tokenizer.save_pretrained(mixed.checkpoint)
    assert len(mixed.rollout(ROWS, **MIXED)[0]) == 2
    far = {"tcod_environments": {"walk": {**WALK, "tcod_horizon": 9}, "call": CALL}}
    with pytest.raises(ConfigError, match="with 9 user turns it writes .*Hurry"):
        mixed.rollout(ROWS, **MIXED | far)


@pytest.mark.parametrize("n, walked, called", [(0, 1, 1), (3, 4, 2)])
def test_the_depth_is_that_of_the_environments_horizon(mixed, n, walked, called):
    samples, _ = mixed.rollout(ROWS, n, tcod_variant="f2b", tcod_eta=1, **MIXED)
    played = {name: sample.metadata["tcod"] for name, sample in by_environment(samples).items()}
    assert [played[name]["k"] for name in ("walk", "call")] == [walked, called]
    assert [len(played[name]["turns"]) for name in ("walk", "call")] == [walked, called]


def test_demonstrations_are_replayed_and_imitated_as_their_environment_writes_them(mixed):
    moves = {"walk": "right", "call": json.dumps([{"name": "move", "arguments": {"way": "right"}}])}
    demos = {
        name: {"actions": [move] * 2, "observations": ["You are at door 1.", "."]} for name, move in moves.items()
    }
    for name, demo in demos.items():
        seen = {"text": "You are at door 1."} | ({"role": "tool"} if name == "call" else {})
        demo["seen"] = [{"text": "Goal: door 2. You are at door 0."}, seen]
    rows = [{"environment": name, "goal": 2, "demo": demo} for name, demo in demos.items()]
    imitation = {"loss_type": "sft_loss", "use_opd": False, "opd_type": None, "rm_url": None}
    imitation |= {"debug_train_only": True}
    for changes in ({"tcod_variant": "b2f"}, {"tcod_variant": "sft", **imitation}):
        samples, metrics = mixed.rollout(rows, **MIXED, **changes)
        texts = {name: mixed.tokenizer.decode(one.tokens) for name, one in by_environment(samples).items()}
        assert texts["walk"].count(RIGHT) == texts["call"].count(call("right")) == 2
        assert metrics["rollout/tcod/failed"] == 0


@pytest.mark.parametrize("sees", [[], ["demo"]])
def test_an_environment_has_the_teacher_that_its_entry_names(mixed, sees):
    """And its own words to it. All are checked at the start."""

    def expert_reply(payload):
        if "text" in payload:  # the launch check
            payload = {**payload, "input_ids": mixed.tokenizer.encode(payload["text"], add_special_tokens=False)}
        return scored(payload, lambda position, token: -7.0)

    terse = {"tcod_environment": f"{__name__}.TerseCorridor"}
    rows = [{**row, "demo": {"actions": ["right"]}} for row in (ROWS[0], {**ROWS[0], "environment": "terse"})]
    with FakeSGLang(expert_reply) as expert:
        expert.pages["/server_info"] = {"max_req_input_len": 4090}
        entries = {"walk": {**WALK, "tcod_teacher_url": f"{expert.url}/generate"}, "terse": terse}
        changes = {"tcod_teacher_sees": sees, "tcod_note_len": 1000} if sees else {}
        samples, _ = mixed.rollout(rows, tcod_environments=entries, rollout_max_context_len=3000, **changes)
        asked = {name: server.payloads() for name, server in (("walk", expert), ("terse", mixed.teacher))}
    for name, sample in by_environment(samples).items():
        assert (set(sample.teacher_log_probs) == {-7.0}) == (name == "walk")
        [probe], [request] = ([one for one in asked[name] if key in one] for key in ("text", "input_ids"))
        assert request["input_ids"][-len(sample.tokens) // 2 :] == sample.tokens[-len(sample.tokens) // 2 :]
        said = mixed.tokenizer.decode(request["input_ids"])
        assert ("A terse note." in said, "What solves the task" in said) == (
            (bool(sees), False) if name == "terse" else (False, bool(sees))
        )


def test_an_evaluation_plays_each_to_its_horizon_and_counts_by_environment(mixed):
    rows = [{"environment": name, "goal": goal} for name in ("walk", "call") for goal in (2, 4)]
    output = evaluation(
        mixed, (1.0,), rows, train=ROWS, tcod_variant="f2b", tcod_eval_kl=True, tcod_env_workers=2, **MIXED
    )
    of = {name: value for name, value in output.metrics.items() if "/by_environment/" in name}
    assert of["eval/tcod/t1/by_environment/walk/success"] == 1.0
    assert of["eval/tcod/t1/by_environment/call/success"] == 0.5
    assert of["eval/tcod/t1/by_environment/call/turns/student"] == 2
    assert len(of) == 2 * 5 and output.metrics["eval/tcod/t1/success"] == 0.75  # no k


def test_a_run_with_one_environment_may_have_rows_with_such_a_key(rig):
    [sample], metrics = rig.rollout([{"goal": 2, "environment": "a word of its own"}])
    assert sample.reward == 1.0 and not any("by_environment" in name for name in metrics)


@pytest.mark.parametrize(
    "entries, says",
    [
        ({"walk": {"tcod_eta": 2}}, "tcod_environments.walk sets tcod_eta: it may set tcod_environment, "),
        ({"walk": {"horizon": 2}}, "tcod_environments.walk sets horizon: it may set "),
        ({"walk": {"tcod_horizon": "x"}}, "tcod_horizon in tcod_environments.walk should be a valid integer, not 'x'"),
        ({"walk": {"tcod_horizon": 1}}, "tcod_environments.walk: tcod_k_start 4 is above tcod_horizon 1: lower it"),
        ({"walk": {"tcod_data_root": "$NOWHERE"}}, "tcod_environments.walk: tcod_data_root is $NOWHERE, but that "),
        ({"walk": 3}, "tcod_environments.walk in tcod.yaml should be a valid dictionary, not 3"),
    ],
)
def test_an_entry_that_cannot_work_is_refused_when_it_is_read(entries, says):
    arm = {"tcod_variant": "f2b", "tcod_horizon": 4, "tcod_k_start": 4}
    with pytest.raises(ConfigError) as refused:
        TcodConfig.from_mapping({**arm, "tcod_environments": entries}, "tcod.yaml")
    assert says in str(refused.value) and "tcod.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_an_entry_has_the_runs_settings_where_it_names_none(tmp_path, monkeypatch):
    monkeypatch.setenv("GAMES", str(tmp_path))
    file = tmp_path / "tcod.yaml"
    entries = {"walk": {"tcod_data_root": "$GAMES"}, "call": {"tcod_horizon": 9}}
    file.write_text(yaml.safe_dump({"tcod_horizon": 5, "tcod_env_workers": 3, "tcod_environments": entries}))
    config = TcodConfig.read(file)
    walk, called = (config.for_row({"environment": name}) for name in ("walk", "call"))
    assert (walk.name, walk.tcod_data_root, walk.tcod_horizon) == ("walk", str(tmp_path), 5)
    assert (called.name, called.tcod_data_root, called.curriculum.horizon) == ("call", "", 9)
    assert {own.tcod_env_workers for own in config.per_environment} == {3}


@pytest.mark.parametrize("metadata", [{"goal": 2}, {"goal": 2, "environment": "fly"}, {"goal": 2, "environment": []}])
def test_a_row_of_no_environment_is_refused_at_the_start(rig, metadata):
    named = repr(metadata.get("environment"))
    says = rf"row .*goal.* of --prompt-data .*metadata.environment is {named}: name one of .*, walk, call"
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        rig.rollout([ROWS[0], metadata], **MIXED)
    row = Sample(metadata={"environment": "walk"})
    with pytest.raises(ConfigError, match="its metadata has no goal"):
        row_checks.check_evaluation_rows(
            TcodConfig(tcod_horizon=4, **{key: MIXED[key] for key in MIXED if "tcod" in key}), [row], "rows"
        )


def test_a_row_of_no_environment_in_an_evaluation_fails_alone(mixed, caplog):
    output = evaluation(mixed, (1.0,), [ROWS[0], {"goal": 2}], train=ROWS, **MIXED)
    assert "env_error: its metadata.environment is None: name one of tcod_environments" in caplog.text
    assert output.metrics["eval/tcod/t1/failed/env_error"] == 1 and output.metrics["eval/tcod/t1/episodes"] == 1


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"tcod_teacher_url": "http://127.0.0.1:1"}, "tcod_teacher_url is of an entry of tcod_environments: "),
        (
            {
                "tcod_environments": {"walk": {**WALK, "tcod_teacher_url": "http://127.0.0.1:1"}},
                "opd_type": "megatron",
            },
            r"tcod_teacher_url needs a teacher on SGLang: .* TEACHER=sglang",
        ),
        ({"tcod_environments": {"walk": {**WALK, "tcod_env_args": {"a": 1}}}}, r"tcod_env_args {'a': 1} do not fit"),
        ({"tcod_environments": {"walk": {"tcod_environment": "no.Such"}}}, "tcod_environment no.Such cannot be imp"),
        (
            {"tcod_environments": {"walk": {**WALK, "tcod_teacher_url": "a:1"}}},
            r"the teacher a:1 does not score .*\(--rm-url, tcod_teacher_url\)",
        ),
    ],
)
def test_settings_of_an_environment_that_cannot_work_stop_the_run(rig, changes, says):
    with pytest.raises(ConfigError, match=says):
        rig.rollout([ROWS[0]], **changes)
