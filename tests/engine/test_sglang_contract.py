"""The recipe on the real SGLang (CPU) and the real ALFWorld engine, with the smoke run's tiny teacher as the model.

The student's engine and the teacher's are one server here, so the KL of every sampled token must be zero.
"""

import json
import math
from pathlib import Path

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tcod import ConfigError, Failure, tcod_rollout
from examples.tcod.model.chat_tokens import ChatTokens
from examples.tcod.model.teacher import TeacherClient
from examples.tcod.settings.config import TcodConfig
from examples.tcod.settings.server_checks import check_models
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.async_utils import run
from slime.utils.eval_config import EvalDatasetConfig
from smoke import hooks, make_games, make_models
from smoke.servers import SGLangServer
from smoke.train_arm import push_weights
from smoke.trainer import Trainer, response_log_probs
from tests.support.rig import slime_args

NUM_GPUS = 0
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_ray")]
MODEL = make_models.SHIPPED
CONTEXT = 1100
VOCABULARY = len(AutoTokenizer.from_pretrained(MODEL))
# float32 on both sides; the differences seen are below 1e-5 nats.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with SGLangServer("server", MODEL, tmp_path_factory.mktemp("log") / "server.log") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("games")
    rows = [make_games.make_game(root, "train", "pick_and_place_simple", i, 900 + i) for i in range(3)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def rollout(server, data):
    """rollout(variant, n, **changes) -> (args, samples, metrics), through slime's loop."""

    def play(variant, n, **changes):
        args = arguments(server, data, variant, **changes)
        try:
            output = tcod_rollout.generate_rollout(args, n, RolloutDataSourceWithBuffer(args))
        except RuntimeError:
            server.check_running()  # if it ended, its log says why
            raise
        return args, hooks.flat(output.samples), output.metrics

    return play


def arguments(server, data, variant, **changes):
    values = {"rollout_batch_size": 3, "rollout_max_response_len": 24, "rollout_max_context_len": CONTEXT}
    values |= {"tcod_variant": variant, "tcod_horizon": 8, "tcod_eta": 1, "tcod_admissible": "never"}
    values |= {"tcod_data_root": str(data), "tcod_env_workers": 1, "tcod_envs_per_worker": 8, **changes}
    return slime_args(MODEL, data / "train.jsonl", server.port, server.port, **values)


def client(server):
    return TeacherClient(server.url, timeout_s=60, concurrency=4, vocab_size=VOCABULARY)


@pytest.mark.parametrize("variant, n", [("opd", 0), ("f2b", 1), ("b2f", 1)])
def test_a_student_that_is_its_own_teacher_has_no_kl(rollout, variant, n):
    args, samples, metrics = rollout(variant, n)
    assert len(samples) == 3 and metrics["rollout/tcod/failed"] == 0
    for sample in samples:
        record = sample.metadata["tcod"]
        scores = zip(sample.rollout_log_probs, sample.teacher_log_probs, sample.loss_mask, strict=True)
        assert max(abs(student - teacher) for student, teacher, trained in scores if trained) < CLOSE
        assert len(sample.loss_mask) == len(sample.teacher_log_probs) == sample.response_length
        tokenizer = tcod_rollout.sglang_rollout.GenerateState(args).tokenizer
        text = tokenizer.decode(sample.tokens)
        # Replayed and sampled turns have one shape: header, empty think block, content, end of turn.
        turns = text.split("<|im_start|>assistant\n<think>\n\n</think>\n\n")[1:]
        assert len(turns) == record["replayed"] + len(record["turns"])
        assert "Your task is to: " in text.split("<|im_start|>user\n")[1]
        for index, turn in enumerate(turns[: record["replayed"]]):
            assert turn.startswith(f"<action>{sample.metadata['demo']['actions'][index]}</action><|im_end|>\n")
    if variant == "f2b":
        assert metrics["rollout/tcod/k"] == 2 and all(len(s.metadata["tcod"]["turns"]) <= 2 for s in samples)
    if variant == "b2f":
        expected = [max(len(s.metadata["demo"]["actions"]) - 2, 0) for s in samples]
        assert [s.metadata["tcod"]["replayed"] for s in samples] == expected


def test_the_engine_reuses_the_prefix_of_an_episode(rollout):
    _, samples, _ = rollout("opd", 0)
    for sample in samples:
        if len(sample.metadata["tcod"]["turns"]) > 2:
            assert sample.prefix_cache_info.cached_tokens > 0.5 * sample.prefix_cache_info.total_prompt_tokens


def test_surplus_episodes_are_aborted_and_undone(rollout, over_sampling):
    _, samples, metrics = rollout("opd", 0, rollout_batch_size=2, over_sampling_batch_size=6)
    assert len(samples) == 2 and metrics["rollout/tcod/failed"] == 0
    assert metrics["rollout/tcod/aborted"] <= 4


def test_groups_with_a_game_that_does_not_load_are_replaced(rollout, data):
    """A corrupt game passes the launch check, fails in its worker, and costs its group only."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    (data / "corrupt.tw-pddl").write_text("{")
    rows[1]["metadata"]["game_file"] = "corrupt.tw-pddl"
    (data / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"prompt_data": str(data / "mixed.jsonl"), "n_samples_per_prompt": 2}
    args, samples, metrics = rollout("b2f", 0, **changes)
    assert len(samples) == 6 and len({sample.group_index for sample in samples}) == 3
    assert all(sample.metadata["game_file"] != "corrupt.tw-pddl" for sample in samples)
    # Its two samples; any that shared the worker which was then replaced are counted under that reason.
    assert metrics["rollout/tcod/failed/env_error"] >= 1
    tcod_rollout.post_process_rewards(args, samples)


def test_evaluation_and_slimes_logging(server, data, monkeypatch):
    common = {"path": str(data / "train.jsonl"), "input_key": "prompt", "label_key": "label", "top_p": 1.0}
    common |= {"metadata_key": "metadata", "n_samples_per_eval_prompt": 1, "top_k": -1, "max_response_len": 24}
    datasets = [EvalDatasetConfig(name=f"t{t:g}", temperature=t, **common) for t in (0.4, 1.0)]
    args = arguments(server, data, "f2b", eval_datasets=datasets, tcod_eval_kl=True)
    source = RolloutDataSourceWithBuffer(args)
    evaluated = tcod_rollout.generate_rollout(args, 3, source, evaluation=True)
    assert evaluated.metrics["eval/tcod/t0.4/episodes"] == evaluated.metrics["eval/tcod/t1/kl/episodes"] == 3
    assert abs(evaluated.metrics["eval/tcod/t1/kl/trajectory"]) < 100 * CLOSE
    if not hooks.find_slime().startswith("slime at"):
        return
    from slime.observability import logging_utils
    from slime.observability.rollout_metrics import log_eval_rollout_data, log_rollout_data

    logged = {}
    monkeypatch.setattr(logging_utils, "log", lambda args, values, step_key: logged.update(values))
    vars(args).update(custom_rollout_log_function_path=None, custom_eval_rollout_log_function_path=None)
    vars(args).update(load_debug_rollout_data=None, log_passrate=False, wandb_always_use_train_step=False)
    trained = tcod_rollout.generate_rollout(args, 3, source)
    log_rollout_data(3, args, hooks.flat(trained.samples), trained.metrics, 1.0)
    log_eval_rollout_data(3, args, evaluated.data, evaluated.metrics)
    assert logged["rollout/tcod/k"] == 4 and 0 <= logged["rollout/tcod/success"] <= 1
    assert logged["eval/t0.4"] == logged["eval/tcod/t0.4/success"]


def test_the_teachers_scores_are_the_models_log_probs(server):
    tokens = torch.randint(4, 400, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        expected = response_log_probs(model, tokens, 45)
    scores = run(client(server).score(tokens, 15))
    assert scores == pytest.approx(expected.tolist(), abs=CLOSE)


def test_the_longest_context_that_the_launch_check_allows_can_be_scored(server, data):
    limit = requests.get(f"{server.url}/server_info", timeout=30).json()["max_req_input_len"]
    args = arguments(server, data, "opd", rollout_max_context_len=limit - 1)
    tokenizer = tcod_rollout.sglang_rollout.GenerateState(args).tokenizer
    chat = ChatTokens(tokenizer, args.apply_chat_template_kwargs)
    check_models(args, TcodConfig.from_args(args), chat)
    scores = run(client(server).score([5] * (limit - 1), 10))
    assert len(scores) == limit - 11 and all(map(math.isfinite, scores))
    args.rollout_max_context_len = limit
    with pytest.raises(ConfigError, match=f"at most {limit - 1} tokens"):
        check_models(args, TcodConfig.from_args(args), chat)


def test_a_request_that_the_teacher_refuses_is_not_repeated(server):
    with pytest.raises(Failure) as caught:
        run(client(server).score([5] * 5000, 10))
    assert caught.value.reason == "teacher_refused"


def test_pushed_weights_are_what_the_engine_then_samples_from(server, rollout, tmp_path):
    """After a gradient step and a push, the engine's log-probs are those of the trained model."""
    args, samples, _ = rollout("opd", 0)
    trainer = Trainer(MODEL, lr=1e-2)
    batch = hooks.convert_samples_to_train_data(args, samples)
    assert trainer.step(batch)["logprob_abs_diff"] < CLOSE
    trainer.step({**batch, "rewards": [1.0] * len(samples)})  # the KL to itself alone would move nothing
    for file in Path(MODEL).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    trainer.save(tmp_path)
    try:
        push_weights(server.port, tmp_path, version="7")
        assert requests.get(f"{server.url}/model_info", timeout=30).json()["weight_version"] == "7"
        tokens, length = samples[0].tokens, samples[0].response_length
        with torch.no_grad():
            expected = response_log_probs(trainer.model, tokens, length)
        scores = run(client(server).score(tokens, len(tokens) - length))
        assert scores == pytest.approx(expected.tolist(), abs=CLOSE)
        assert max(abs(a - b) for a, b in zip(scores, samples[0].teacher_log_probs, strict=True)) > 100 * CLOSE
    finally:
        push_weights(server.port, MODEL, version="default")
