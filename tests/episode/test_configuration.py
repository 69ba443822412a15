"""Launch checks: whatever cannot work stops the run before its first rollout, with one sentence that names the fix."""

import io
import re
import threading
from argparse import Namespace

import pytest
from aiohttp import web
from transformers import PreTrainedTokenizerBase

from examples.tcod import ConfigError, tcod_rollout
from examples.tcod.settings import server_checks
from examples.tcod.settings.config import TcodConfig, read_yaml
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from smoke import cpu_only
from tests.support.fake_sglang import scored
from tests.support.rig import teacher_value

cpu_only.prepare()

# A key, values that YAML gives for it, and what it should be.
VALUES = [
    ("tcod_variant", ["fb2", None], "'opd', 'f2b', 'b2f', 'reopd' or 'sft'"),
    ("tcod_horizon", ["30", None, [30], True], "a valid integer"),
    ("tcod_horizon", [0], "greater than or equal to 1"),
    ("tcod_eta", [2.5, float("nan")], "a valid integer"),
    ("tcod_eta", [0], "greater than or equal to 1"),
    ("tcod_k_start", [0], "greater than or equal to 1"),
    ("tcod_b2f_slack", [-1], "greater than or equal to 0"),
    ("tcod_b2f_budget", ["k"], "'slack' or 'horizon'"),
    ("tcod_reopd_gamma", [0.0], "greater than 0"),
    ("tcod_reopd_gamma", [1.5, float("nan")], "less than or equal to 1"),
    ("tcod_data_root", [None, ["/data"], 1], "a valid string"),
    ("tcod_environment", [[".env_alfworld.AlfworldEnvironment"]], "a valid string"),
    ("tcod_env_args", [None, ["seed"], "seed"], "a valid dictionary"),
    ("tcod_eval_kl", [1, "true"], "a valid boolean"),
    ("tcod_admissible", [False, "always"], "'turn' or 'never'"),
    ("tcod_env_workers", [0], "greater than or equal to 1"),
    ("tcod_max_staleness", [-1], "greater than or equal to 0"),
    ("tcod_reward_coef", [-0.5], "greater than or equal to 0"),
    ("tcod_reward_coef", [float("inf")], "a finite number"),
    ("tcod_reward", ["success"], "'won' or 'grade'"),
    ("tcod_window", [0], "greater than or equal to 1"),
    ("tcod_env_timeout_s", ["8", True], "a valid number"),
    ("tcod_teacher_timeout_s", [float("nan"), float("inf")], "a finite number"),
    ("tcod_engine_timeout_s", [0.0], "greater than 0"),
    ("tcod_save_episodes", [True, "most"], "a valid integer or 'all'"),
    ("tcod_save_episodes", [-1], "greater than or equal to 0 or 'all'"),
]


@pytest.mark.parametrize("key, values, should", VALUES)
def test_a_value_of_another_type_is_named_with_its_file(key, values, should):
    for value in values:
        with pytest.raises(ConfigError) as stop:
            TcodConfig.from_mapping({"tcod_variant": "opd", "tcod_horizon": 4, key: value}, "/run/tcod.yaml")
        assert str(stop.value) == f"{key} in /run/tcod.yaml should be {should}, not {value!r}"


@pytest.mark.parametrize(
    "text, says",
    [
        ("tcod_eta: 3\ntcod_horizon: 4\ntcod_eta: 4", r"\(tcod_eta is set twice\)"),
        ("tcod_env_args: {seed: 1, seed: 2}", r"\(seed is set twice\)"),
        ("tcod_eta: 3\nrollout_batch_size: 3", "sets rollout_batch_size: .*command line"),
        ("1: 2", "sets 1: .*command line"),
        ("- tcod_eta", "is no mapping: write one `tcod_key: value` a line"),
        ("tcod_eta: [", "cannot be read .*: name a YAML file"),
        ("tcod_data_root: \udce9", "cannot be read .*: name a YAML file"),  # Latin-1
    ],
)
def test_a_yaml_that_is_read_otherwise_than_it_looks_is_refused(tmp_path, text, says):
    file = tmp_path / "tcod.yaml"
    for wrong in (file, tmp_path):
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ConfigError, match=says if wrong is file else "cannot be read") as stop:
            read_yaml(wrong)
        assert str(wrong) in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize(
    "args, says",
    [
        ("{api_key: hush", "cannot be read (line 2: expected ',' or '}', but got '<stream end>')"),
        ("[{api_key: hush}]", "should be a valid dictionary, not [{'api_key': 'SECRET'}]"),
    ],
)
def test_a_setting_that_is_refused_shows_no_key(tmp_path, args, says):
    (tmp_path / "tcod.yaml").write_text(f"tcod_horizon: 4\ntcod_env_args: {args}")
    with pytest.raises(ConfigError, match=re.escape(says)) as stop:
        TcodConfig.read(tmp_path / "tcod.yaml")
    assert "hush" not in str(stop.value)


def test_a_yaml_is_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    file = tmp_path / "tcod.yaml"
    file.write_text("\ufefftcod_data_root: données\ntcod_env_args: {<<: &more {a: 1}, a: 2}", encoding="utf-8")
    assert read_yaml(file) == {"tcod_data_root": "données", "tcod_env_args": {"a": 2}}


def test_the_folder_of_the_data_is_found_from_any_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", "data")
    (tmp_path / "data").mkdir()
    config = TcodConfig(tcod_variant="opd", tcod_horizon=4, tcod_data_root="$HERE")
    assert config.tcod_data_root == str(tmp_path / "data")


FOREIGN = {"name": "other", "custom_generate_function_path": "a.b", "custom_rm_path": None, "temperature": 0.4}
FULLY_ASYNC = {"rollout_function_path": "examples.tcod.any.generate_rollout_fully_async", "eval_interval": 5}
MEGATRON = {"opd_type": "megatron", "offload_train": True}
TOOLS = "tests.support.corridor.ToolCorridor"
REDUCER = "custom_pg_loss_reducer_function_path"
TURN = {REDUCER: "examples.tcod.training.turn_mean.turn_mean"}
REWARD = {"tcod_reward_coef": 1.0, "n_samples_per_prompt": 2, "use_opd": False, "opd_type": None}
SFT = {"tcod_variant": "sft", "loss_type": "sft_loss", "use_opd": False, "opd_type": None}
# A change of working arguments (None: left out), and words of the sentence.
WRONG = [
    ({"tcod_etta": 3}, "unknown setting tcod_etta in "),
    ({"tcod_horizon": None}, "tcod_horizon is missing in "),
    ({"tcod_variant": "f2b", "tcod_k_start": 5}, "tcod.yaml: tcod_k_start 5 is above tcod_horizon 4: lower it"),
    ({"tcod_variant": "b2f"}, "1 of 1 rows have no usable demonstration"),
    ({"tcod_variant": "reopd"}, "tcod_variant reopd needs one of 1 to 4 (tcod_horizon) actions"),
    ({"tcod_data_root": "/nowhere"}, "tcod.yaml: tcod_data_root /nowhere is not a folder"),
    ({"tcod_data_root": "$TCOD_UNSET/x"}, "tcod_data_root is $TCOD_UNSET/x, but that variable is not set"),
    ({"tcod_data_root": "$TCOD_EMPTY"}, "tcod_data_root is $TCOD_EMPTY, but that variable is not set"),
    ({"tcod_window": 2}, "tcod_window is for tcod_history turns"),
    ({"tcod_save_plain_scores": True}, "tcod_save_plain_scores are of tcod_teacher_sees: set it too"),
    ({"tcod_teacher_sees": "demo hindsigt"}, "tcod.yaml should be 'demo' or 'hindsight', not 'hindsigt'"),
    ({**MEGATRON, "tcod_teacher_sees": ["demo"]}, "tcod_teacher_sees needs a teacher on SGLang"),
    ({"rm_url": "self"}, "without a note has a KL of 0: set tcod_teacher_sees"),
    ({"rm_url": "self", "tcod_teacher_sees": ["demo"], "tcod_sees_from": 3}, "leave tcod_sees_from out"),
    ({**FULLY_ASYNC, "rm_url": "self", "tcod_teacher_sees": ["demo"], "eval_interval": None}, "needs MODE=sync"),
    ({"tcod_teacher_sees": ["demo"]}, "no row of --prompt-data has a demonstration: take demo out"),
    ({**MEGATRON, "tcod_eval_kl": True}, "tcod_eval_kl asks a teacher's own server: remove it, or set TEACHER=sglang"),
    ({"rm_url": "self", "tcod_teacher_sees": ["hindsight"], "tcod_eval_kl": True}, "asks a teacher's own server"),
    ({"tcod_teacher_sees": ["hindsight"]}, "4089 tokens, less than --rollout-max-context-len + tcod_note_len 6096:"),
    ({"rm_url": "self", "tcod_teacher_sees": ["hindsight"], "tcod_note_len": 6000}, "raise --sglang-context-length"),
    ({"tcod_environment": ".chat.Nowhere"}, "tcod_environment .chat.Nowhere cannot be imported"),
    ({"tcod_environment": TOOLS}, "its agent calls tools: set tcod_tool_parser to the model's parser in SGLang"),
    ({"tcod_environment": TOOLS, "tcod_tool_parser": "qwen"}, "does not write tools, calls and results .*: use a"),
    ({"tcod_tool_parser": "qwen9"}, "tcod_tool_parser qwen9 is none of SGLang's parsers: take one of .*qwen25"),
    ({"tcod_env_args": {"seed": 1}}, "tcod_env_args {'seed': 1} do not fit Corridor.__init__"),
    ({"use_opd": False}, "--use-opd is missing (TEACHER=none) and tcod_reward_coef (REWARD_COEF) 0"),
    ({**REWARD, "n_samples_per_prompt": 1}, "set --n-samples-per-prompt (SAMPLES_PER_TASK) to 2 or more"),
    ({**REWARD, "tcod_variant": "reopd"}, "reopd starts each at another turn: choose another tcod_variant"),
    ({**REWARD, "advantage_estimator": "ppo"}, "ppo takes neither the mean over turns nor tcod_reward_coef"),
    ({**REWARD, "opd_type": "sglang"}, "--opd-type sglang names a teacher that nothing asks without --use-opd"),
    ({**REWARD, "tcod_eval_kl": True}, "tcod_eval_kl asks a teacher's own server"),
    ({**REWARD, "normalize_advantages": True}, "--normalize-advantages"),
    ({**SFT, "use_opd": True}, "tcod_variant sft trains on demonstrations, each once: it takes no --use-opd"),
    ({**SFT, "tcod_reward_coef": 1.0}, "no tcod_reward_coef (REWARD_COEF) and"),
    ({**SFT, "n_samples_per_prompt": 2}, "a --n-samples-per-prompt (SAMPLES_PER_TASK) of 1"),
    ({**SFT, "loss_type": "policy_loss"}, "tcod_variant sft and --loss-type policy_loss: sft and sft_loss belong"),
    ({"loss_type": "sft_loss"}, "tcod_variant opd and --loss-type sft_loss: sft and sft_loss belong together"),
    ({**SFT, "use_tis": True}, "--use-tis is of the policy loss, which tcod_variant sft does not have"),
    ({**SFT, REDUCER: TURN[REDUCER]}, "is of the policy loss, which tcod_variant sft does not have: remove it"),
    ({**SFT, **FULLY_ASYNC, "eval_interval": None}, "plays ahead, and tcod_variant sft plays nothing"),
    (SFT, "1 of 1 rows have no usable demonstration {'demo_missing': 1}"),
    ({"tcod_reward": "grade"}, "tcod_reward grade is not trained on with tcod_reward_coef (REWARD_COEF) 0"),
    ({"tcod_env_args": {"api_key": "k1"}}, "tcod_env_args {'api_key': 'SECRET'} do not fit Corridor.__init__"),
    ({"opd_kl_coef": 0.0}, "--opd-kl-coef 0 must be above 0"),
    ({"opd_kl_coef": -1.0}, "--opd-kl-coef -1 must be above 0"),
    ({"rollout_max_context_len": None}, "--rollout-max-context-len is missing"),
    ({"rollout_max_context_len": 64}, "must be below --rollout-max-context-len 64"),
    ({"rm_url": None}, "--rm-url is missing"),
    ({"tcod_history": "turns", "use_dynamic_batch_size": False}, "--use-dynamic-batch-size is missing"),
    ({"normalize_advantages": True}, "--normalize-advantages would whiten the KL away: remove it"),
    ({"partial_rollout": True}, "--partial-rollout"),
    ({"use_rollout_routing_replay": True}, "--use-rollout-routing-replay"),
    ({"group_rm": True}, "--group-rm"),
    ({"reward_key": "score"}, "--reward-key score does not apply"),
    ({"over_sampling_batch_size": 2}, "--over-sampling-batch-size 2 would train on the fastest episodes only"),
    ({"tcod_history": "turns", "log_passrate": True}, "--log-passrate expects"),
    ({"calculate_per_token_loss": True, "rollout_sample_filter_path": "a.b"}, "--rollout-sample-filter-path removes"),
    ({**TURN, "calculate_per_token_loss": True}, "--calculate-per-token-loss sums up masks"),
    ({**TURN, "advantage_estimator": "ppo"}, "--advantage-estimator ppo takes neither the mean over turns"),
    ({**TURN, "use_opsm": True}, "--use-opsm sums up masks"),
    ({**TURN, "custom_tis_function_path": "a.b"}, "--custom-tis-function-path a.b sums up masks or may change them"),
    ({**TURN, "custom_convert_samples_to_train_data_path": "a.b"}, "--custom-convert-samples-to-train-data-path a.b"),
    ({REDUCER: "examples.mine.training.turn_mean.turn_mean"}, "must be examples.tcod.training.turn_mean.turn_mean"),
    ({"custom_rm_path": None}, "--custom-rm-path must be examples.tcod.tcod_rollout.reward_func"),
    ({"custom_generate_function_path": "examples.my_agent.tcod_rollout.generate"}, "must be examples.tcod.tcod_"),
    ({"rollout_temperature": 0.7}, "--rollout-temperature 1"),
    ({"rollout_top_p": 0.9}, "--rollout-top-p 1"),
    ({"rollout_top_k": 20}, "--rollout-top-k -1"),
    (MEGATRON, "--opd-type megatron needs --colocate"),
    ({**MEGATRON, "colocate": True, "update_weight_transport": "disk"}, "--opd-type megatron needs --colocate"),
    ({"offload_train": True}, "--offload-train needs --colocate"),
    ({"eval_datasets": [Namespace(**FOREIGN)]}, "data set other has its own .*: give it a custom_rm_path too"),
    ({"eval_datasets": [Namespace(**{**FOREIGN, "custom_rm_path": "a.b"})], "tcod_eval_kl": True}, "tcod_eval_kl"),
    (FULLY_ASYNC, "--eval-interval 5 has examples.tcod.any.generate_rollout_fully_async evaluate, which fails"),
    ({**FULLY_ASYNC, "eval_function_path": "slime.rollout.sglang_rollout.generate_rollout"}, "fails or hangs in a"),
    ({**FULLY_ASYNC, "eval_function_path": "examples.tcod.tcod_rollout.generate_rollout"}, "fails or hangs in a"),
    ({**FULLY_ASYNC, "eval_function_path": "mine.evaluate", "sglang_router_port": 9}, "engines behind"),  # allowed
    ({"apply_chat_template_kwargs": {}}, "enable_thinking"),
    ({"tcod_thoughts": "keep"}, "switch thinking on in --apply-chat-template-kwargs, or set tcod_thoughts: none"),
    ({"rm_url": "http://127.0.0.1:9/generate"}, "the teacher http://127.0.0.1:9 does not score"),
    ({"rm_url": "http://me:word@127.0.0.1:9/generate"}, "the teacher http://127.0.0.1:9 does not score"),
    ({"rm_url": "http://[::1/generate"}, "does not score"),
    ({"rm_url": "127.0.0.1:9"}, "does not score"),
    ({"rollout_max_context_len": 4096}, "at most 4089 tokens, less than --rollout-max-context-len 4096: raise its"),
    ({"rollout_max_context_len": 8000}, "raise --sglang-context-length"),
    ({"eval_max_context_len": 9000}, "less than --eval-max-context-len 9000: raise --sglang-context-length"),
    ({"tcod_eval_kl": True, "eval_max_context_len": 6000}, "at most 4089 tokens, less than --eval-max-context-len 60"),
    ({"sglang_router_port": 9}, "the student's engines behind http://127.0.0.1:9 do not answer"),
]


def refused(args, says, evaluation=False):
    with pytest.raises(ConfigError, match=says) as stop:
        tcod_rollout.generate_rollout(args, 0, RolloutDataSourceWithBuffer(args), evaluation)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("change, says", WRONG)
def test_a_wrong_configuration_stops_before_the_first_rollout(rig, monkeypatch, change, says):
    monkeypatch.setenv("TCOD_EMPTY", "")
    refused(rig.args([{"goal": 2}], **change), says if ".*" in says else re.escape(says))
    assert rig.student.requests == []


def test_a_wrong_configuration_stops_before_the_first_evaluation(rig):
    refused(rig.args([{"goal": 2}], group_rm=True), "--group-rm", evaluation=True)


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"goal": 2}, {}], "row {} of --prompt-data cannot be played: its metadata has no goal"),
        ([{"goal": 2, "demo": {"actions": "right"}}], "its demo.actions is 'right': "),
        ([], "has no rows"),
    ],
)
def test_rows_that_cannot_be_played_stop_the_run(rig, rows, words):
    refused(rig.args(rows, rollout_batch_size=1), words)


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
        assert len(rig.rollout([{"goal": 2}])[0]) == 1
    else:
        refused(rig.args([{"goal": 2}]), "use a model with the student's tokenizer")


def test_what_a_teacher_refuses_with_is_told(rig):
    rig.teacher.reply = lambda payload: web.Response(status=404, text="no\nway")
    refused(rig.args([{"goal": 2}]), "does not score .HTTP 404 no way.: .*TCOD_TEACHER_API_KEY")


def test_a_teacher_behind_a_router_scores(rig):
    del rig.teacher.pages["/server_info"]  # a router has none
    assert len(rig.rollout([{"goal": 2}])[0]) == 1


def test_the_teachers_key_is_sent_and_never_shown(rig, monkeypatch, caplog):
    monkeypatch.setenv("TCOD_TEACHER_API_KEY", "s3cret")
    rig.rollout([{"goal": 2}])
    headers = [request.headers.get("authorization") for request in rig.teacher.requests]
    assert set(headers) == {"Bearer s3cret"} and "s3cret" not in caplog.text
    assert not any("authorization" in request.headers for request in rig.student.requests)


@pytest.mark.parametrize("page", [["x"], {"workers": None}, {"workers": [{}]}])
def test_a_router_that_says_something_else_stops_the_run(rig, page):
    rig.student.pages["/workers"] = page
    refused(rig.args([{"goal": 2}]), "engines behind .* do not answer")


def test_engines_that_the_router_lists_late_are_waited_for(rig, monkeypatch):
    rig.student.pages["/workers"] = {"workers": []}
    timer = threading.Timer(0.2, rig.student.pages.pop, ["/workers"])
    timer.start()
    assert len(rig.rollout([{"goal": 2}])[0]) == 1
    rig.student.pages["/workers"] = {"workers": []}
    monkeypatch.setattr(server_checks, "ROUTER_PATIENCE_S", 0.1)
    refused(rig.args([{"goal": 2}]), "knows no engine of the student")
