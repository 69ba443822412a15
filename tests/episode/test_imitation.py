"""Imitation: demonstrations as samples, token for token what an episode replays, with no engine or environment."""

import json
import sys

import pytest
import ray

from examples.tcod import ConfigError
from examples.tcod.episode.demonstration import Demonstration
from examples.tcod.settings import build, run
from examples.tcod.tools import check_environment
from slime.utils.types import Sample
from tests.support.rig import RIGHT

SFT = {"tcod_variant": "sft", "loss_type": "sft_loss", "use_opd": False, "opd_type": None, "rm_url": None}


def row(length, **more):
    """The demonstration of a corridor, with all that was seen."""
    answers = [f"You are at door {i}." for i in range(1, length + 1)]
    texts = [f"Goal: door {length}. You are at door 0.", *answers[:-1]]
    seen = [{"text": text, "admissible": ["left", "right"]} for text in texts]
    return {"goal": length, "demo": {"actions": ["right"] * length, "observations": answers, "seen": seen, **more}}


def imitated(rig, rows, **changes):
    """A rollout without an environment, and without servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "EnvironmentPool", None)
        patch.setattr(run, "check_models", None)
        samples, metrics = rig.rollout(rows, **{**SFT, "debug_train_only": True, **changes})
    assert not rig.student.requests and not rig.teacher.requests
    return samples, metrics


@pytest.mark.parametrize("admissible", ["turn", "never"])
@pytest.mark.parametrize("history, window", [("append", None), ("turns", None), ("turns", 1)])
@pytest.mark.parametrize("odd", [False, True], ids=["text", "ids"])
def test_the_tokens_are_those_of_a_replay(rig, tokenizer, history, window, admissible, odd):
    """b2f replays the first two turns, and its student says the third: the same contexts, the same last response."""
    said = ["First to the right. " + RIGHT, RIGHT, "And there. " + RIGHT]
    ids = [tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] for text in said]
    vocabulary = build.load_chat(str(rig.checkpoint), {"enable_thinking": False}).vocabulary
    recorded = {"responses": said, **({"ids": ids, "vocabulary": vocabulary} if odd else {})}
    settings = {"tcod_history": history, "tcod_window": window, "tcod_admissible": admissible}
    samples, metrics = imitated(rig, [row(3, **recorded)], **settings)
    rig.script = [said[-1]] * 3
    [replayed], _ = rig.rollout([row(3, **recorded)], tcod_variant="b2f", **settings)
    assert samples[-1].tokens == replayed.tokens and {sample.rollout_id for sample in samples} == {samples[0].index}
    trained = [
        [token for token, on in zip(one.tokens[-one.response_length :], one.loss_mask, strict=True) if on]
        for one in samples
    ]
    assert trained == ([sum(ids, [])] if history == "append" else ids)
    assert metrics["rollout/tcod/tokens/trained"] == sum(map(len, ids)) and metrics["rollout/tcod/failed"] == 0
    assert metrics["rollout/tcod/samples"] == len(samples) and "rollout/tcod/success" not in metrics
    assert all(one.status == Sample.Status.COMPLETED and one.teacher_log_probs is None for one in samples)
    listed = {" Actions: " in one.metadata["tcod"]["turns"][-1]["observation"] for one in samples}
    assert listed == {admissible == "turn"}


def test_a_demonstration_that_cannot_be_used_is_replaced_and_counted(rig):
    rows = [row(2), row(3, responses=["nothing"] * 3), row(4)]
    samples, metrics = imitated(rig, rows, rollout_batch_size=3, rollout_max_context_len=320)
    assert [len(sample.metadata["tcod"]["turns"]) for sample in samples] == [2] * 3
    assert metrics["rollout/tcod/failed/demo_mismatch"] >= 1 and metrics["rollout/tcod/failed/prompt_too_long"] >= 1
    assert len(imitated(rig, [row(2)], rollout_batch_size=12, tcod_max_replacements=1)[0]) == 12
    [fits], _ = imitated(rig, [row(2)], rollout_max_context_len=len(samples[0].tokens) + 1)  # for the end of a turn
    assert fits.tokens == samples[0].tokens
    with pytest.raises(RuntimeError, match="samples by reason: {'demo_mismatch': 5}"):
        imitated(rig, [row(3, responses=["nothing"] * 3)])


def test_rows_without_what_was_seen_are_refused(rig):
    malformed = [[{"text": 1}] * 2, [{"x": ""}] * 2, [{"text": "here"}, {"text": 1}]]
    for seen, reason in ((None, "unrecorded"), *((one, "malformed") for one in malformed)):
        with pytest.raises(ConfigError, match=f"1 of 1 rows have no usable demonstration {{'demo_{reason}"):
            imitated(rig, [row(2, seen=seen)])


@pytest.mark.parametrize("variant, more", [("opd", [{"goal": 4}]), ("sft", [{"goal": 2, "demo": row(2)["demo"]}])])
def test_check_environment_records_what_is_seen(rig, monkeypatch, capsys, variant, more):
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: None)
    config, out = rig.folder / "tcod.yaml", rig.folder / "recorded.jsonl"
    bare = [{"goal": goal, "demo": {"actions": ["right"] * goal}} for goal in (1, 3)]
    rig.args(bare, tcod_variant=variant)  # writes the settings
    arguments = ["--config", str(config), "--rows", str(rig.rows([*bare, *more])), "--record", str(out)]
    monkeypatch.setattr(sys, "argv", ["check_environment", *arguments])
    check_environment.main()
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["metadata"] for one in written] == [row(1), row(3), *more]
    assert written[0]["prompt"] == "walk" and "3 of 3 rows play" in capsys.readouterr().out
    assert Demonstration.of(written[1]["metadata"]).seen_before(2).text == "You are at door 2."
