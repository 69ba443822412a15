"""Launch checks: whatever cannot work stops the run before its first rollout, with one sentence that names the fix."""

import re
import threading

import pytest
from aiohttp import web
from transformers import PreTrainedTokenizerBase

from examples.tcod import ConfigError, tcod_rollout
from examples.tcod.settings import server_checks
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.misc import SingletonMeta
from tests.support.fake_sglang import FakeSGLang, scored
from tests.support.fault_proxy import FaultProxy
from tests.support.rig import teacher_value

NUM_GPUS = 0

TURN = {"custom_pg_loss_reducer_function_path": "examples.tcod.training.turn_mean.turn_mean"}

# A change of working settings (None: left out), and words of the sentence.
WRONG = [
    ({"tcod_etta": 3}, "unknown setting tcod_etta"),
    ({"tcod_variant": "f2b", "tcod_eta": 0}, "tcod_eta must be >= 1"),
    ({"tcod_eta": 2.5}, "tcod_eta must be of type int"),
    ({"tcod_eta": True}, "tcod_eta must be of type int"),
    ({"tcod_horizon": "30"}, "tcod_horizon must be of type int"),
    ({"tcod_horizon": 0}, "tcod_horizon must be >= 1"),
    ({"tcod_variant": "f2b", "tcod_k_start": 5}, "below tcod_k_start 5"),
    ({"tcod_variant": "b2f", "tcod_b2f_slack": -1}, "tcod_b2f_slack must be >= 0"),
    ({"tcod_b2f_budget": "all"}, "tcod_b2f_budget must be one of slack, horizon"),
    ({"tcod_eval_kl": 1}, "tcod_eval_kl must be of type bool"),
    ({"tcod_variant": "fb2"}, "tcod_variant must be one of"),
    ({"tcod_horizon": None}, "tcod_horizon is missing"),
    ({"tcod_admissible": "always"}, "tcod_admissible must be one of turn, never"),
    ({"tcod_data_root": "/nowhere"}, "tcod_data_root /nowhere is not a folder"),
    ({"tcod_data_root": "$TCOD_UNSET/x"}, "that variable is not set"),
    ({"tcod_environment": ".chat.Nowhere"}, "tcod_environment .chat.Nowhere cannot be imported"),
    ({"tcod_environment": "nowhere.Corridor"}, "tcod_environment nowhere.Corridor cannot be imported"),
    ({"tcod_env_workers": 0}, "tcod_env_workers must be >= 1"),
    ({"tcod_env_timeout_s": 0.0}, "tcod_env_timeout_s must be a positive number"),
    ({"tcod_teacher_timeout_s": float("nan")}, "tcod_teacher_timeout_s must be a positive number"),
    ({"tcod_max_staleness": -1}, "tcod_max_staleness must be >= 0"),
    ({"tcod_max_replacements": 0}, "tcod_max_replacements must be >= 1"),
    ({"tcod_variant": "b2f"}, "of 1 rows 1 have none"),
    ({"tcod_variant": "reopd"}, "tcod_variant reopd needs a demonstration of 1 to 4 (tcod_horizon) actions"),
    ({"tcod_variant": "reopd", "tcod_reopd_gamma": 1.5}, "tcod_reopd_gamma must be above 0"),
    ({**TURN, "calculate_per_token_loss": True}, "--calculate-per-token-loss is the mean over tokens"),
    ({**TURN, "advantage_estimator": "ppo"}, "--advantage-estimator ppo reads the masks"),
    ({**TURN, "custom_tis_function_path": "a.b"}, "--custom-tis-function-path may change the masks"),
    ({**TURN, "custom_convert_samples_to_train_data_path": "a.b"}, "--custom-convert-samples-to-train-data-path may"),
    (
        {"custom_pg_loss_reducer_function_path": "examples.mine.training.turn_mean.turn_mean"},
        "must be examples.tcod.training.turn_mean.turn_mean",
    ),
    ({"calculate_per_token_loss": True, "rollout_sample_filter_path": "a.b"}, "--rollout-sample-filter-path removes"),
    ({"partial_rollout": True}, "--partial-rollout"),
    ({"group_rm": True}, "--group-rm"),
    ({"use_opd": False}, "--use-opd"),
    ({"opd_kl_coef": 0.0}, "--opd-kl-coef is 0"),
    ({"normalize_advantages": True}, "--normalize-advantages"),
    ({"tcod_engine_timeout_s": 0.0}, "tcod_engine_timeout_s must be a positive number"),
    ({"rollout_temperature": 0.7}, "--rollout-temperature 1"),
    ({"rollout_top_p": 0.9}, "--rollout-top-p 1"),
    ({"rm_url": None}, "--rm-url is missing"),
    ({"rm_url": "http://127.0.0.1:9/generate"}, "no teacher answers"),
    ({"rm_url": "http://[::1/generate"}, "no teacher answers"),
    ({"rm_url": "http://127.0.0.1:abc/generate"}, "no teacher answers"),
    ({"over_sampling_batch_size": 2}, "--over-sampling-batch-size 2 would train on the fastest episodes only"),
    ({"eval_max_context_len": 9000}, "less than --eval-max-context-len 9000: raise --sglang-context-length"),
    ({"rollout_max_context_len": None}, "--rollout-max-context-len is missing"),
    ({"rollout_max_context_len": 64}, "must be below"),
    ({"rollout_max_context_len": 4096}, "raise its --context-length"),
    ({"custom_rm_path": None}, "--custom-rm-path must be examples.tcod.tcod_rollout.reward_func"),
    ({"dynamic_sampling_filter_path": None}, "filter-path must be examples.tcod.tcod_rollout.drop_failed"),
    ({"custom_generate_function_path": "examples.my_agent.tcod_rollout.generate"}, "must be examples.tcod.tcod_"),
    ({"opd_type": "megatron", "offload_train": True}, "--opd-type megatron needs --colocate"),
    ({"opd_type": "megatron", "colocate": True, "update_weight_transport": "disk"}, "--opd-type megatron needs --col"),
    ({"offload_train": True}, "--offload-train gives up the memory"),
    ({"use_rollout_routing_replay": True}, "--use-rollout-routing-replay"),
    ({"apply_chat_template_kwargs": {}}, "enable_thinking"),
    ({"rollout_max_context_len": 8000}, "raise --sglang-context-length"),
    ({"sglang_router_port": 9}, "the student's engines behind http://127.0.0.1:9 do not answer"),
]


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("change, says", WRONG)
def test_a_wrong_configuration_stops_before_the_first_rollout(rig, change, says, evaluating):
    args = rig.args([{"goal": 2}], **change)
    SingletonMeta._instances.clear()
    with pytest.raises(ConfigError, match=re.escape(says)) as stop:
        tcod_rollout.generate_rollout(args, 0, RolloutDataSourceWithBuffer(args), evaluation=evaluating)
    assert "\n" not in str(stop.value)
    assert rig.student.requests == []


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"goal": 2}, {}], "row 2 of --prompt-data cannot be played: its metadata has no goal"),
        ([{"goal": 2}, ["goal"]], "row 2 of --prompt-data cannot be played: its metadata is no JSON object"),
        ([{"goal": 2, "demo": "right"}], "row 1 of --prompt-data cannot be played: its demo is no JSON object"),
        ([{"goal": 2, "demo": {"actions": "right"}}], "actions of its demo is no list of texts"),
        ([], "has no rows"),
    ],
)
def test_rows_that_cannot_be_played_stop_the_run(rig, rows, words):
    args = rig.args(rows, rollout_batch_size=1)
    SingletonMeta._instances.clear()
    with pytest.raises(ConfigError, match=words):
        tcod_rollout.generate_rollout(args, 0, RolloutDataSourceWithBuffer(args))


def test_a_teacher_with_other_tokens_stops_the_run(rig):
    rig.teacher.reply = lambda payload: scored({**payload, "input_ids": [5, 6, 7]}, teacher_value)
    with pytest.raises(ConfigError, match="use a teacher with the student's tokenizer"):
        rig.rollout([{"goal": 2}])


@pytest.mark.parametrize("bos, known", [(258, True), (7, False)])
def test_a_teacher_that_puts_a_bos_before_a_text_scores_the_same_ids(rig, monkeypatch, bos, known):
    """Only a text gets it: SGLang restores add_bos_token where AutoTokenizer does not."""

    def answer(payload):
        if "text" not in payload:
            return scored(payload, teacher_value)
        ids = rig.tokenizer.encode(payload["text"], add_special_tokens=False)
        return scored({**payload, "input_ids": [bos, *ids]}, teacher_value)

    rig.teacher.reply = answer
    monkeypatch.setattr(PreTrainedTokenizerBase, "bos_token_id", 258, raising=False)
    if known:
        samples, _ = rig.rollout([{"goal": 2}])
        assert len(samples) == 1
    else:
        with pytest.raises(ConfigError, match="use a teacher with the student's tokenizer"):
            rig.rollout([{"goal": 2}])


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_teacher_that_is_up_and_refuses_is_not_said_to_be_down(rig, status):
    rig.teacher.reply = lambda payload: web.Response(status=status, text="no")
    with pytest.raises(ConfigError, match=f"is up and refuses .HTTP {status} no.: .*TCOD_TEACHER_API_KEY"):
        rig.rollout([{"goal": 2}])


def test_a_teacher_behind_a_router_has_the_limit_of_its_workers(rig):
    """A router has no /server_info."""
    with FakeSGLang(rig.teacher_answer) as router, FakeSGLang(rig.teacher_answer) as second:
        second.pages["/server_info"] = {"max_req_input_len": 1000}
        router.pages["/workers"] = {"workers": [{"url": rig.teacher.url}, {"url": second.url}]}
        with pytest.raises(ConfigError, match="at most 999 tokens"):
            rig.rollout([{"goal": 2}], rm_url=f"{router.url}/generate")
        router.pages["/workers"] = {"workers": [{"url": "http://127.0.0.1:9"}]}  # not to be reached from here
        samples, _ = rig.rollout([{"goal": 2}], rm_url=f"{router.url}/generate")
        assert len(samples) == 1


def test_the_teachers_key_is_sent_and_never_shown(rig, monkeypatch, caplog):
    monkeypatch.setenv("TCOD_TEACHER_API_KEY", "s3cret")
    rig.rollout([{"goal": 2}])
    headers = [request.headers.get("authorization") for request in rig.teacher.requests]
    assert set(headers) == {"Bearer s3cret"} and "s3cret" not in caplog.text
    assert not any("authorization" in request.headers for request in rig.student.requests)


@pytest.mark.parametrize("fault", ["reset", "lost", "truncated"])
def test_a_teacher_that_cannot_finish_a_reply_stops_the_run(rig, fault):
    with FaultProxy(rig.teacher.port) as proxy:
        proxy.fault = lambda body: fault
        with pytest.raises(ConfigError, match="no teacher answers at --rm-url .*: start it first"):
            rig.rollout([{"goal": 2}], rm_url=proxy.url)


@pytest.mark.parametrize("page", [[], {"workers": None}, {"workers": [{}]}])
def test_a_router_that_says_something_else_stops_the_run(rig, page):
    with FakeSGLang(rig.student_reply) as router:
        router.pages["/workers"] = page
        with pytest.raises(ConfigError, match="the student's engines behind .* do not answer"):
            rig.rollout([{"goal": 2}], sglang_router_port=router.port)


def test_engines_that_the_router_lists_late_are_waited_for(rig):
    rig.student.pages["/workers"] = {"workers": []}
    threading.Timer(1.0, rig.student.pages.pop, ["/workers"]).start()
    samples, _ = rig.rollout([{"goal": 2}])
    assert len(samples) == 1


def test_a_router_without_engines_stops_the_run(rig, monkeypatch):
    monkeypatch.setattr(server_checks, "ROUTER_PATIENCE_S", 1.0)
    rig.student.pages["/workers"] = {"workers": []}
    with pytest.raises(ConfigError, match="knows no engine of the student"):
        rig.rollout([{"goal": 2}])


def test_foreign_keys_in_the_yaml_are_refused(rig):
    args = rig.args([{"goal": 2}])
    with open(args.custom_config_path, "a") as file:
        file.write("rollout_batch_size: 3\n")
    with pytest.raises(ConfigError, match="rollout_batch_size.*command line"):
        tcod_rollout.generate_rollout(args, 0, None)
