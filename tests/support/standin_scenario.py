"""One scenario on a scripted engine, for whichever slime is on the import path.

test_standin.py runs it on the stand-in and, where there is a checkout, on the real slime, and compares what they write
with what slime wrote once (tests/smoke/slime_624b824a8.json).
"""

import argparse
import asyncio
import itertools
import json
import tempfile
from pathlib import Path

import slime
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import GenerateState, generate_rollout
from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.http_utils import init_http_client, post
from slime.utils.misc import SingletonMeta
from slime.utils.types import Sample
from smoke import hooks
from tests.support.fake_sglang import FakeSGLang, generated, hold
from tests.support.toys import save_tokenizer

events: list = []  # what the hooks saw, in order
generation_started: dict[str, asyncio.Event] = {}


async def generate(args, sample, sampling_params, evaluation=False):
    """metadata["turns"] turns, each followed by one token that is not trained."""
    has_session, length = sample.session_id is not None, sampling_params["max_new_tokens"]
    events.append(["generate", sample.prompt, sample.index, evaluation, has_session, length])
    generation_started.setdefault(sample.prompt, asyncio.Event()).set()
    sampling_params["max_new_tokens"] += 1  # whoever shares the dict sees it
    sample.tokens = GenerateState(args).tokenizer.encode(sample.prompt, add_special_tokens=False)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    for turn in range(sample.metadata.get("turns", 1)):
        output = await post(url, {"input_ids": sample.tokens, "turn": turn, "row": sample.metadata})
        meta = output["meta_info"]
        log_probs, tokens, _ = zip(*meta["output_token_logprobs"], strict=True)
        sample.append_response_tokens(args, tokens=tokens, log_probs=log_probs, meta_info=meta, text=output["text"])
        if sample.status == Sample.Status.ABORTED:
            return sample
        sample.append_response_tokens(args, tokens=[60 + turn], trainable=False, text="|")
    sample.non_generation_time = 0.25
    sample.status = Sample.Status(sample.metadata.get("final", sample.status.value))
    sample.reward = sample.metadata.get("own_reward")
    return sample


async def reward(args, sample, **kwargs):
    events.append(["reward", sample.prompt, sample.index, sample.status.value])
    if other := sample.metadata.get("rewarded_after"):  # with one slot: hangs if the reward held on to it
        await asyncio.wait_for(generation_started.setdefault(other, asyncio.Event()).wait(), timeout=20)
    sample.teacher_log_probs = [-(i + 1) / 8 for i in range(sample.response_length)]
    return sample.metadata.get("reward", 1.0)


def keep_trainable(args, group, **kwargs):
    lost = {sample.status.value for sample in group} & {"failed", "aborted"}
    return DynamicFilterOutput(keep=not lost, reason=", ".join(lost))


def post_process(args, samples):
    return [sample.reward for sample in samples], [0.0] * len(samples)


async def reply(payload):
    row, turn = payload["row"], payload["turn"]
    if row.get("hold"):
        await hold()
    counts = {"prompt_tokens": len(payload["input_ids"]), "cached_tokens": turn, "weight_version": "w"}
    return generated([30 + turn, 31], [-0.5 - turn, -0.25], f"t{turn}", row.get("finish", "stop"), **counts)


def write_rows(path, rows):
    Path(path).write_text("\n".join(json.dumps({"text": text, "kind": "toy", "metadata": row}) for text, row in rows))
    return path


def plain(sample):
    """What of a sample is not as in a new one, without slime's trace and what else differs from run to run."""
    new = Sample().to_dict()
    values = {name: value for name, value in sample.to_dict().items() if value != new.get(name) and name != "trace"}
    return values | {"session_id": sample.session_id is not None}


def train_batch(args, samples):
    """Without a part of slime's metrics."""
    return {k: v for k, v in hooks.convert_samples_to_train_data(args, samples).items() if k != "source_names"}


class Scenario:
    def __init__(self, folder, checkpoint, server):
        self.folder = folder
        here = f"{__name__}."
        self.common = {"hf_checkpoint": checkpoint, "input_key": "text", "label_key": "kind"}
        self.common |= {"rollout_max_response_len": 8, "rollout_num_gpus": 1, "sglang_server_concurrency": 16}
        self.common |= {"sglang_router_ip": server.host, "sglang_router_port": server.port}
        self.common |= {"custom_generate_function_path": here + "generate", "custom_rm_path": here + "reward"}
        self.common |= {"custom_reward_post_process_path": here + "post_process", "save": folder, "load": folder}
        self.common |= {"dynamic_sampling_filter_path": here + "keep_trainable"}

    def args(self, rows, **changes):
        SingletonMeta._instances.clear()
        args = hooks.rollout_args(prompt_data=write_rows(f"{self.folder}/rows.jsonl", rows), **self.common | changes)
        init_http_client(args)
        return args

    def train(self, args, rollouts=1, source=None):
        """Rollouts as they come, the train batch of each, and what the hooks saw."""
        events.clear()
        source, outcome = source or RolloutDataSourceWithBuffer(args), []
        for rollout_id in range(rollouts):
            output = generate_rollout(args, rollout_id, source)
            samples = hooks.flat(output.samples)
            outcome.append({"samples": [plain(one) for one in samples], "metrics": output.metrics})
            outcome[-1]["batch"] = train_batch(args, samples)
            assert [plain(Sample.from_dict(one.to_dict())) for one in samples] == [plain(one) for one in samples]
        return {"rollouts": outcome, "events": sorted(events, key=str)}

    def epochs(self):
        """Three rows, two a rollout, shuffled anew in each epoch; saved and loaded."""
        rows = [("a", {"turns": 2}), ("bb", {}), ("ccc", {"final": "truncated"})]
        args = self.args(rows, rollout_batch_size=2, rollout_shuffle=True, dynamic_sampling_filter_path=None)
        source = RolloutDataSourceWithBuffer(args)
        result = self.train(args, 4, source)
        source.save(3)
        loaded, fresh = RolloutDataSourceWithBuffer(args), RolloutDataSourceWithBuffer(args)
        loaded.load(3)
        fresh.load(99)  # there is no such state
        later = [[plain(one) for n in (2, 1, 3) for one in hooks.flat(of.get_samples(n))] for of in (source, loaded)]
        return result | {"later": later, "fresh": [plain(one) for one in hooks.flat(fresh.get_samples(3))]}

    def surplus(self):
        """Groups of two, four drawn for two: the two that hang are aborted and lost, the next rollout draws others."""
        rows = [("a", {}), ("b", {"hold": True}), ("c", {"turns": 3}), ("d", {"hold": True})]
        args = self.args(rows, rollout_batch_size=2, over_sampling_batch_size=4, n_samples_per_prompt=2)
        result = self.train(args, rollouts=2)
        state = GenerateState(args)
        return result | {"state": [state.aborted, state.remaining_batch_size, len(state.pendings)]}

    def drops(self):
        """A failed group, which is rewarded, and one that the engine aborted, are filtered out and replaced."""
        rows = [("a", {"final": "failed"}), ("bb", {"finish": "abort"})]
        rows += [("c", {"reward": 0.0, "finish": "length"}), ("d", {"own_reward": 0.5})]
        return self.train(self.args(rows, rollout_batch_size=2))

    def evaluation(self):
        """Two data sets, one slot. With more slots the order of events would be left to chance."""
        rows = [("x", {"rewarded_after": "y"}), ("y", {"own_reward": 0.25, "finish": "length"}), ("z", {"turns": 2})]
        one = write_rows(f"{self.folder}/one.jsonl", rows)
        two = write_rows(f"{self.folder}/two.jsonl", [("v", {"turns": 2}), ("w", {"final": "failed", "reward": 0.0})])
        common = {"input_key": "text", "label_key": "kind", "metadata_key": "metadata", "top_p": 1.0, "top_k": -1}
        own = {"custom_rm_path": f"{__name__}.reward", "custom_generate_function_path": f"{__name__}.generate"}
        own |= {"temperature": 1.0, "max_response_len": 80, "metadata_overrides": {"extra": 1}}
        configs = [
            EvalDatasetConfig("one", one, **common, temperature=0.4, max_response_len=8, n_samples_per_eval_prompt=1),
            EvalDatasetConfig("two", two, **common, **own, n_samples_per_eval_prompt=2),
        ]
        args = self.args([], rollout_batch_size=1, sglang_server_concurrency=1, eval_datasets=configs)
        events.clear()
        data = generate_rollout(args, 0, None, evaluation=True).data
        for of in data.values():
            of["samples"] = [plain(sample) for sample in of["samples"]]
        return {"data": data, "events": [event for event in events if event[0] == "generate"]}

    def batch(self):
        """The conversion by itself: masks, removed samples, siblings of one execution."""
        ids = (None, 0, 7, 7, None)
        samples = [Sample(index=i, rollout_id=of, tokens=[1, 2, 3], response_length=2) for i, of in enumerate(ids)]
        samples[1].remove_sample = True
        samples[2].loss_mask = [0, 1]
        batch = train_batch(self.args([], rollout_batch_size=1), samples)
        return {"batch": batch, "masks": [sample.loss_mask for sample in samples]}

    def appending(self):
        """What append_response_tokens refuses, and the sample that is left."""
        cases = {
            "no log-probs": {"tokens": [1]},
            "unequal lengths": {"tokens": [1, 2], "log_probs": [-1.0]},
            "log-probs of what is not trained": {"tokens": [1], "log_probs": [0.0], "trainable": False},
            "nothing": {"tokens": [], "log_probs": [], "text": ""},
            "late mask": {"tokens": [1], "trainable": False, "text": "x"},
            "log-probs": {"tokens": [1], "log_probs": [-1.0]},
            "unknown finish": {"meta_info": {"finish_reason": {"type": "odd"}, "prompt_tokens": 3}},
        }
        results = {}
        for (name, call), begun in itertools.product(cases.items(), (0, 2)):  # response tokens that are there already
            sample, refused = Sample(response_length=begun), False
            try:
                sample.append_response_tokens(None, **call)
            except ValueError:
                refused = True
            results[f"{name}, {begun}"] = [refused, plain(sample)]
        return results

    def defaults(self):
        """Of the arguments in hooks.SLIME_DEFAULTS: slime's own parsers', where slime is the real one."""
        if hooks.STANDIN in Path(slime.__file__).parents:
            return hooks.SLIME_DEFAULTS
        from slime.backends.sglang_utils.arguments import add_sglang_arguments
        from slime.utils.arguments import _pre_parse_mode, get_slime_extra_args_provider

        parser = get_slime_extra_args_provider()(argparse.ArgumentParser(conflict_handler="resolve"))
        add_sglang_arguments(parser)
        defaults = {action.dest: action.default for action in parser._actions}
        defaults |= vars(_pre_parse_mode())  # arguments that slime reads before all others
        defaults["apply_chat_template_kwargs"] = json.loads(defaults["apply_chat_template_kwargs"])
        defaults["eval_datasets"] = None  # of --eval-prompt-data and --eval-config
        return {name: defaults[name] for name in hooks.SLIME_DEFAULTS}


def main(out):
    """A line for each part of the scenario."""
    parts = ("epochs", "surplus", "drops", "evaluation", "batch", "appending", "defaults")
    with tempfile.TemporaryDirectory() as folder, FakeSGLang(reply) as server:
        scenario = Scenario(folder, save_tokenizer(Path(folder) / "tokenizer"), server)
        lines = [f'"{name}": {json.dumps(getattr(scenario, name)(), sort_keys=True)}' for name in parts]
    Path(out).write_text("{\n" + ",\n".join(lines) + "\n}\n")
