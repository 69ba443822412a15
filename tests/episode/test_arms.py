"""The episodes of OPD, F2B and B2F on a scripted engine, token by token, through slime's own rollout loop."""

import json

import pytest

from examples.tcod import Failure
from examples.tcod.curriculum import Curriculum
from examples.tcod.episode.demonstration import Demonstration
from examples.tcod.model.chat_tokens import ChatTokens
from slime.utils.types import Sample
from tests.support.rig import LEFT, RIGHT, assert_tokens, opening, user

NUM_GPUS = 0


def test_opd_plays_until_it_wins(rig, tokenizer):
    [sample], metrics = rig.rollout([{"goal": 2}])
    assert_tokens(
        sample, tokenizer, opening(2), RIGHT + "<|im_end|>", user("You are at door 1."), RIGHT + "<|im_end|>"
    )
    assert sample.reward == 1.0 and sample.status == Sample.Status.COMPLETED
    assert metrics["rollout/tcod/k"] == 4 and metrics["rollout/tcod/success"] == 1.0
    assert metrics["rollout/tcod/turns/student"] == 2


def test_opd_stops_at_the_horizon(rig, tokenizer):
    [sample], metrics = rig.rollout([{"goal": 9}])
    doors = [user(f"You are at door {i}.") for i in (1, 2, 3)]
    parts = [RIGHT + "<|im_end|>"] * 4
    assert_tokens(
        sample, tokenizer, opening(9), *[x for pair in zip(parts, doors, strict=False) for x in pair], parts[3]
    )
    assert sample.reward == 0.0 and sample.status == Sample.Status.COMPLETED
    assert metrics["rollout/tcod/success"] == 0.0


def test_f2b_plays_the_first_k_turns(rig, tokenizer):
    for n, turns in ((0, 1), (1, 1), (2, 2), (50, 4)):
        [sample], metrics = rig.rollout([{"goal": 9}], n, tcod_variant="f2b", tcod_eta=2)
        assert metrics["rollout/tcod/k"] == len(sample.metadata["tcod"]["turns"]) == turns
        assert sample.status == Sample.Status.COMPLETED
    [sample], _ = rig.rollout([{"goal": 9}], 0, tcod_variant="f2b", tcod_eta=2)
    assert_tokens(sample, tokenizer, opening(9), RIGHT + "<|im_end|>")


def test_b2f_replays_the_demonstration_as_chat_turns_in_the_prompt(rig, tokenizer):
    row = {"goal": 3, "demo": {"actions": ["right"] * 3}}
    [sample], metrics = rig.rollout([row], 0, tcod_variant="b2f", tcod_eta=2)
    prompt = opening(3) + "".join(RIGHT + "<|im_end|>" + user(f"You are at door {i}.") for i in (1, 2))
    assert_tokens(sample, tokenizer, prompt, RIGHT + "<|im_end|>")
    assert sample.reward == 1.0
    assert metrics["rollout/tcod/turns/replayed"] == 2 and metrics["rollout/tcod/steps"] == 3
    assert metrics["rollout/tcod/success_by_start/02"] == metrics["rollout/tcod/success_by_type/walk"] == 1.0
    assert metrics["rollout/tcod/success_by_type_count/walk"] == 1
    assert [name[-2:] for name in metrics if "kl_by_turn/" in name] == ["02"]


def test_b2f_replays_the_ids_that_were_sampled_where_the_vocabulary_is_the_same(rig, tokenizer):
    pad = tokenizer.pad_token_id  # ends a turn, too: the text does not tell which token did
    ids = [[*tokenizer.encode(RIGHT, add_special_tokens=False), pad]] * 2
    vocabulary = ChatTokens(tokenizer, {"enable_thinking": False}).vocabulary
    demo = {"actions": ["right"] * 2, "responses": [RIGHT] * 2, "ids": ids, "vocabulary": vocabulary}
    for changes, end, exact in (({}, "<|endoftext|><|im_end|>", 1.0), ({"vocabulary": "another"}, "<|im_end|>", 0.0)):
        [sample], metrics = rig.rollout([{"goal": 2, "demo": {**demo, **changes}}], 0, tcod_variant="b2f")
        prompt = opening(2) + RIGHT + end + user("You are at door 1.")
        assert_tokens(sample, tokenizer, prompt, RIGHT + "<|im_end|>")
        assert metrics["rollout/tcod/replayed_as_sampled"] == exact


@pytest.mark.parametrize(
    "ids, reason", [([[1]], "demo_mismatch"), ("12", "demo_malformed"), ([["a"], [1]], "demo_malformed")]
)
def test_ids_that_are_not_those_of_every_turn_are_refused(ids, reason):
    with pytest.raises(Failure, match="ids") as failure:
        Demonstration.of({"demo": {"actions": ["right"] * 2, "responses": [RIGHT] * 2, "ids": ids}}).check(4)
    assert failure.value.reason == reason


def test_b2f_replays_recorded_responses_word_for_word(rig, tokenizer):
    responses = ["Door 2 is to the right. " + RIGHT, RIGHT]
    row = {"goal": 2, "demo": {"actions": ["right", "right"], "responses": responses}}
    [sample], _ = rig.rollout([row], 0, tcod_variant="b2f")
    assert_tokens(
        sample,
        tokenizer,
        opening(2) + responses[0] + "<|im_end|>" + user("You are at door 1."),
        RIGHT + "<|im_end|>",
    )


def test_b2f_budget_is_k_plus_slack_or_what_the_horizon_leaves(rig):
    rig.script = [LEFT] * 20
    row = {"goal": 3, "demo": {"actions": ["right"] * 3}}
    changes = {"tcod_variant": "b2f", "tcod_horizon": 12}
    for more, turns in (({}, 3), ({"tcod_b2f_slack": 0}, 1), ({"tcod_b2f_budget": "horizon"}, 10)):
        [sample], _ = rig.rollout([row], 0, **changes, **more)
        assert len(sample.metadata["tcod"]["turns"]) == turns


def test_reopd_replays_a_drawn_prefix_and_plays_one_turn(rig):
    row = {"goal": 4, "demo": {"actions": ["right"] * 4}}
    samples, metrics = rig.rollout([row] * 12, 3, tcod_variant="reopd")
    curriculum = Curriculum(variant="reopd", horizon=4)
    for sample in samples:
        record = sample.metadata["tcod"]
        assert (record["replayed"], len(record["turns"])) == (curriculum.plan(1, 4, 3, sample.index).replayed, 1)
        assert sample.reward == float(record["replayed"] == 3)
    assert {sample.metadata["tcod"]["replayed"] for sample in samples} >= {0, 1, 2}
    assert metrics["rollout/tcod/k"] == metrics["rollout/tcod/turns/student"] == 1


def test_the_arms_end_in_the_same_episode(rig):
    """F2B at k = T and B2F at k >= L are the OPD episode, byte for byte."""
    rig.script = [LEFT, RIGHT, "no tag", RIGHT, RIGHT, RIGHT]
    row = {"goal": 2, "demo": {"actions": ["right", "right"]}}
    episodes = []
    for variant, n in (("opd", 0), ("f2b", 10**6), ("b2f", 10**6), ("b2f", 1)):
        [sample], _ = rig.rollout([row], n, tcod_variant=variant, tcod_horizon=6, tcod_eta=1)
        fields = sample.to_dict()
        for name in ("metadata", "trace", "session_id", "non_generation_time"):
            fields.pop(name, None)
        record = {k: v for k, v in sample.metadata["tcod"].items() if k not in ("n", "k") and not k.endswith("_s")}
        episodes.append(json.dumps([fields, record], sort_keys=True))
    assert len(set(episodes)) == 1
    assert '"won": true' in episodes[0]


def test_admissible_actions_can_be_listed_in_every_turn(rig, tokenizer):
    [sample], _ = rig.rollout([{"goal": 2}], tcod_admissible="turn")
    assert tokenizer.decode(sample.tokens).count(" Actions: left, right<|im_end|>") == 2
