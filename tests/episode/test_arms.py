"""The episodes of OPD, F2B and B2F on a scripted engine, token by token, through slime's own rollout loop."""

import json

import pytest

from examples.tcod.curriculum import Curriculum
from examples.tcod.model.chat_tokens import ChatTokens
from slime.utils.types import Sample
from tests.support.rig import LEFT, RIGHT, assert_tokens, opening, user


def test_opd_plays_until_it_wins(rig, tokenizer):
    [sample], metrics = rig.rollout([{"goal": 2}])
    assert_tokens(
        sample, tokenizer, opening(2), RIGHT + "<|im_end|>", user("You are at door 1."), RIGHT + "<|im_end|>"
    )
    assert sample.reward == 1.0 and sample.status == Sample.Status.COMPLETED
    assert metrics["rollout/tcod/k"] == 4 and metrics["rollout/tcod/success"] == 1.0
    assert metrics["rollout/tcod/turns/student"] == 2


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


def test_b2f_replays_responses_with_their_ids_where_the_vocabulary_is_the_same(rig, tokenizer):
    pad = tokenizer.pad_token_id  # ends a turn, too: the text does not tell which token did
    responses = ["Door 2 is to the right. " + RIGHT, RIGHT]
    ids = [[*tokenizer.encode(text, add_special_tokens=False), pad] for text in responses]
    vocabulary = ChatTokens(tokenizer, {"enable_thinking": False}).vocabulary
    demo = {"actions": ["right"] * 2, "responses": responses, "ids": ids, "vocabulary": vocabulary}
    for changes, end, exact in (({}, "<|endoftext|><|im_end|>", 1.0), ({"vocabulary": "another"}, "<|im_end|>", 0.0)):
        [sample], metrics = rig.rollout([{"goal": 2, "demo": {**demo, **changes}}], 0, tcod_variant="b2f")
        prompt = opening(2) + responses[0] + end + user("You are at door 1.")
        assert_tokens(sample, tokenizer, prompt, RIGHT + "<|im_end|>")
        assert metrics["rollout/tcod/replayed_as_sampled"] == exact


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


@pytest.mark.parametrize("history", ["append", "turns"])
def test_the_arms_end_in_the_same_episode(rig, history):
    """F2B at k = T and B2F at k >= L are the OPD episode, byte for byte."""
    rig.script = [LEFT, RIGHT, "no tag", RIGHT, RIGHT, RIGHT]
    row = {"goal": 2, "demo": {"actions": ["right", "right"]}}
    episodes = []
    for variant, n in (("opd", 0), ("f2b", 10**6), ("b2f", 10**6), ("b2f", 1)):
        changes = {"tcod_variant": variant, "tcod_horizon": 6, "tcod_eta": 1, "tcod_history": history}
        samples = [sample.to_dict() for sample in rig.rollout([row], n, **changes)[0]]
        for fields in samples:
            record = fields.pop("metadata")["tcod"]
            fields["record"] = {k: v for k, v in record.items() if k not in ("n", "k") and not k.endswith("_s")}
            for name in ("trace", "session_id", "non_generation_time"):
                fields.pop(name, None)
        episodes.append(json.dumps(samples, sort_keys=True))
    assert len(set(episodes)) == 1
    assert '"won": true' in episodes[0]


def test_admissible_actions_can_be_listed_in_every_turn(rig, tokenizer):
    [sample], _ = rig.rollout([{"goal": 2}], tcod_admissible="turn")
    assert tokenizer.decode(sample.tokens).count(" Actions: left, right<|im_end|>") == 2
