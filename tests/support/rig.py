"""A rig for whole episodes: a scripted student, a scripted teacher, and slime's own rollout loop between them.

On the real slime where SLIME_DIR points to a checkout, else on the stand-in. tests/conftest.py has the fixture `rig`.
"""

import json
import math
from argparse import Namespace

import pytest
import yaml

from examples.tcod import tcod_rollout
from examples.tcod.episode.episode import Episode, EpisodeRecord
from examples.tcod.training.samples import to_samples
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.async_utils import run
from slime.utils.http_utils import init_http_client
from slime.utils.misc import SingletonMeta
from slime.utils.types import Sample
from smoke import hooks
from tests.support.fake_sglang import FakeSGLang, generated, scored

HEADER = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
RIGHT, LEFT = "<action>right</action>", "<action>left</action>"
UNTEMPERED = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}


def user(text: str) -> str:
    """What stands between an end-of-turn token and the next response."""
    return f"\n<|im_start|>user\n{text}<|im_end|>\n{HEADER}"


def opening(goal: int) -> str:
    first = f"Goal: door {goal}. You are at door 0."
    return f"<|im_start|>system\nWalk.<|im_end|>\n<|im_start|>user\n{first}<|im_end|>\n{HEADER}"


def teacher_value(position: int, token: int) -> float:
    return -0.5 - position / 1000


def student_value(index: int) -> float:
    return -0.01 * (index + 1)


def slime_args(checkpoint, data, student_port: int, teacher_port: int, **changes) -> Namespace:
    """slime's arguments of rollouts on these servers. What slime keeps of others in this process is forgotten."""
    values = {
        **{"hf_checkpoint": str(checkpoint), "apply_chat_template_kwargs": {"enable_thinking": False}},
        **{"prompt_data": str(data), "input_key": "prompt", "label_key": "label"},
        **{"rollout_max_response_len": 64, "rollout_max_context_len": 2000, "use_dynamic_batch_size": True},
        **{"sglang_router_ip": "127.0.0.1", "sglang_router_port": student_port, "sglang_server_concurrency": 32},
        **{"rollout_num_gpus": 1, "rm_url": f"http://127.0.0.1:{teacher_port}/generate"},
    }
    args = hooks.rollout_args(**values | changes)
    SingletonMeta._instances.clear()
    init_http_client(args)
    return args


class RecordingSource(RolloutDataSourceWithBuffer):
    """slime's data source, which remembers what was drawn from it."""

    def __init__(self, args):
        super().__init__(args)
        self.drawn = []

    def get_samples(self, num_samples):
        groups = super().get_samples(num_samples)
        self.drawn += [sample for group in groups for sample in group]
        return groups


class Rig:
    """A scripted student (the reply to the i-th turn of a context is script[i]) and a scripted teacher."""

    def __init__(self, tmp_path, checkpoint, tokenizer):
        self.folder, self.checkpoint, self.tokenizer = tmp_path, checkpoint, tokenizer
        self.script = [RIGHT] * 20
        self.cut = set()  # turns whose reply is cut by the length limit
        self.student = FakeSGLang(self.student_reply)
        self.teacher_reply = lambda payload: scored(payload, teacher_value)
        self.teacher = FakeSGLang(self.teacher_answer)
        for server, limit in ((self.student, 8000), (self.teacher, 4090)):
            server.pages["/server_info"] = {"max_req_input_len": limit}

    def teacher_answer(self, payload):
        if "text" in payload:  # the launch check
            ids = self.tokenizer.encode(payload["text"], add_special_tokens=False)
            return scored({**payload, "input_ids": ids}, teacher_value)
        return self.teacher_reply(payload)

    def scoring_requests(self):
        return [payload for payload in self.teacher.payloads() if "input_ids" in payload]

    def student_reply(self, payload):
        turn = self.tokenizer.decode(payload["input_ids"]).count("<|im_start|>assistant") - 1
        return self.answer(turn, payload)

    def answer(self, turn, payload):
        ids = self.tokenizer.encode(self.script[turn], add_special_tokens=False)
        ids = ids if turn in self.cut else ids + [self.tokenizer.eos_token_id]
        finish = "stop"
        if len(ids) > payload["sampling_params"]["max_new_tokens"] or turn in self.cut:
            ids, finish = ids[: payload["sampling_params"]["max_new_tokens"]], "length"
        values = [student_value(i) for i in range(len(ids))]
        return generated(ids, values, text="", finish=finish, prompt_tokens=len(payload["input_ids"]))

    def rows(self, rows, name="train"):
        path = self.folder / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"prompt": "walk", "label": "walk", "metadata": row}) + "\n" for row in rows)
        )
        return path

    def args(self, rows, **changes) -> Namespace:
        settings = {
            **{"tcod_variant": "opd", "tcod_horizon": 4, "tcod_environment": "tests.support.toys.Corridor"},
            **{"tcod_data_root": str(self.folder), "tcod_admissible": "never", "tcod_env_timeout_s": 30.0},
            **{"tcod_env_workers": 1, "tcod_envs_per_worker": 8},
            **{key: changes.pop(key) for key in list(changes) if key.startswith("tcod_")},
        }
        settings = {key: value for key, value in settings.items() if value is not None}
        config = self.folder / "tcod.yaml"
        config.write_text(yaml.safe_dump(settings))
        changes = {"rollout_batch_size": len(rows), "custom_config_path": str(config), **settings, **changes}
        return slime_args(self.checkpoint, self.rows(rows), self.student.port, self.teacher.port, **changes)

    def rollout(self, rows, n=0, **changes):
        """(samples, metrics) of rollout n over these rows."""
        args = self.args(rows, **changes)
        source = RecordingSource(args)
        output = tcod_rollout.generate_rollout(args, n, source)
        self.drawn = source.drawn
        self.groups = output.samples
        samples = hooks.flat(output.samples)
        check_invariants(args, samples)
        return samples, output.metrics

    def generate(self, metadata, k, max_new_tokens=64, **changes):
        """(slime's arguments, one training sample) after generate alone."""
        args = self.args([metadata], **changes)
        sample = Sample(index=0, prompt="walk", metadata={**metadata, "tcod": Episode(EpisodeRecord(n=0, k=k))})
        params = {**UNTEMPERED, "max_new_tokens": max_new_tokens}
        return args, run(tcod_rollout.generate(args, sample, params))

    def play(self, metadata, k, **changes):
        """The samples of one training episode through generate and reward_func, without slime's loop."""
        args, sample = self.generate(metadata, k, **changes)
        if sample.reward is None:
            sample.reward = run(tcod_rollout.reward_func(args, sample))
        if sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED):
            return to_samples(args, sample, self.tokenizer)
        return [sample]


def check_invariants(args, samples):
    """What must hold of every sample that reaches training."""
    for sample in samples:
        assert sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED)
        assert 0 < sample.response_length < len(sample.tokens) <= args.rollout_max_context_len
        imitated = args.loss_type == "sft_loss"
        assert (sample.rollout_log_probs is None) == imitated
        lists = [sample.loss_mask] if imitated else [sample.loss_mask, sample.rollout_log_probs]
        lists += [sample.teacher_log_probs] if args.use_opd else []
        assert {len(values) for values in lists} == {sample.response_length}
        assert all(math.isfinite(value) for values in lists for value in values)
        assert type(sample.reward) is float
    raw, trained = tcod_rollout.post_process_rewards(args, samples)
    assert raw == [sample.reward for sample in samples] and len(trained) == len(samples)
    assert any(trained) == (getattr(args, "tcod_reward_coef", 0) > 0 and len(set(raw)) > 1)


def spans(tokenizer, *parts):
    """(ids, mask) of alternating sampled and context texts, the first one sampled."""
    ids, mask = [], []
    for i, text in enumerate(parts):
        new = tokenizer.encode(text, add_special_tokens=False)
        ids, mask = ids + new, mask + [1 - i % 2] * len(new)
    return ids, mask


def assert_tokens(sample, tokenizer, prompt, *parts):
    """Every field of a sample whose response is these alternating sampled and context texts."""
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    ids, mask = spans(tokenizer, *parts)
    assert tokenizer.decode(sample.tokens) == prompt + "".join(parts)
    assert sample.tokens == prompt_ids + ids
    assert sample.loss_mask == mask
    assert sample.response == "".join(parts)
    assert sample.teacher_log_probs == [teacher_value(len(prompt_ids) + i, 0) for i in range(len(ids))]
    count, expected = 0, []
    for i, trained in enumerate(mask):
        count = 0 if i and mask[i - 1] == 0 else count
        expected.append(student_value(count) if trained else 0.0)
        count += trained
    assert sample.rollout_log_probs == pytest.approx(expected)


def assert_failed(sample):
    """Nothing of a failed sample is there that could be trained on."""
    assert sample.status == Sample.Status.FAILED and sample.reward == 0.0
    assert sample.tokens == [] and sample.response_length == 0
    assert sample.loss_mask is sample.rollout_log_probs is sample.teacher_log_probs is None
