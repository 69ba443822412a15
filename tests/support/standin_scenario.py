"""One scenario on a scripted engine, for whichever slime is on the import path.

test_standin.py runs it on the stand-in and, where there is a checkout, on the real slime, and compares what it wrote.
"""

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from aiohttp import web

from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import GenerateState, generate_rollout
from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.http_utils import init_http_client, post
from slime.utils.misc import SingletonMeta
from slime.utils.types import Sample
from smoke import hooks
from tests.support.fake_sglang import FakeSGLang, generated, hold

events: list = []  # what the hooks saw, in order
generation_started: dict[str, asyncio.Event] = {}


# ------------------------------------------------------------------------------------------------------- the hooks


async def generate(args, sample, sampling_params, evaluation=False):
    """metadata["turns"] turns, each followed by one token that is not trained."""
    seen = [sample.prompt, sample.index, evaluation, sample.session_id is not None, sampling_params["max_new_tokens"]]
    events.append(["generate", *seen])
    generation_started.setdefault(sample.prompt, asyncio.Event()).set()
    sampling_params["max_new_tokens"] += 1  # whoever shares the dict sees it
    sample.tokens = GenerateState(args).tokenizer.encode(sample.prompt, add_special_tokens=False)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    for turn in range(sample.metadata.get("turns", 1)):
        payload = {"input_ids": sample.tokens, "turn": turn, "row": sample.metadata}
        output = await post(
            url, payload, headers={"X-SMG-Routing-Key": sample.session_id} if sample.session_id else None
        )
        entries = output["meta_info"]["output_token_logprobs"]
        sample.append_response_tokens(
            args,
            tokens=[token for _, token, _ in entries],
            log_probs=[log_prob for log_prob, _, _ in entries],
            meta_info=output["meta_info"],
            text=output["text"],
        )
        if sample.status == Sample.Status.ABORTED:
            return sample
        sample.append_response_tokens(args, tokens=[60 + turn], trainable=False, text="|")
    sample.non_generation_time = 0.25
    if "final" in sample.metadata:
        sample.status = Sample.Status(sample.metadata["final"])
    if "own_reward" in sample.metadata:
        sample.reward = sample.metadata["own_reward"]
    return sample


async def reward(args, sample, **kwargs):
    events.append(["reward", sample.prompt, sample.index, sample.status.value])
    if other := sample.metadata.get("rewarded_after"):  # with one slot: hangs if the reward held on to it
        await asyncio.wait_for(generation_started.setdefault(other, asyncio.Event()).wait(), timeout=20)
    sample.teacher_log_probs = [-(i + 1) / 8 for i in range(sample.response_length)]
    return sample.metadata.get("reward", 1.0)


def keep_trainable(args, group, **kwargs):
    for sample in group:
        if sample.status in (Sample.Status.FAILED, Sample.Status.ABORTED):
            return DynamicFilterOutput(keep=False, reason=sample.status.value)
    return DynamicFilterOutput(keep=True)


def keep_all(args, group, **kwargs):
    return True


def post_process(args, samples):
    return [sample.reward for sample in samples], [0.0] * len(samples)


# ------------------------------------------------------------------------------------------------------ the engine


refused: set[str] = set()


async def reply(payload):
    row, turn, ids = payload["row"], payload["turn"], payload["input_ids"]
    if row.get("hold"):
        await hold()
    if row.get("refused_once") and row["refused_once"] not in refused:
        refused.add(row["refused_once"])
        return web.Response(status=503, text="busy")
    finish = row.get("finish", "stop")
    tokens, log_probs = [30 + turn, 31], [-0.5 - turn, -0.25]
    return generated(
        tokens, log_probs, f"t{turn}", finish, prompt_tokens=len(ids), cached_tokens=turn, weight_version="w"
    )


# ----------------------------------------------------------------------------------------------------- the scenario


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"text": name, "kind": "toy", "metadata": row}) + "\n" for name, row in rows))
    return str(path)


def plain(sample):
    """to_dict without slime's trace and what else differs from run to run."""
    values = sample.to_dict()
    values.pop("trace", None)
    return values | {"session_id": values["session_id"] is not None}


class Scenario:
    def __init__(self, folder, checkpoint, server):
        self.folder = folder
        self.common = {
            "hf_checkpoint": checkpoint,
            "input_key": "text",
            "label_key": "kind",
            "rollout_max_response_len": 8,
            "rollout_num_gpus": 1,
            "sglang_server_concurrency": 16,
            "sglang_router_ip": server.host,
            "sglang_router_port": server.port,
            "custom_generate_function_path": f"{__name__}.generate",
            "custom_rm_path": f"{__name__}.reward",
            "custom_reward_post_process_path": f"{__name__}.post_process",
            "dynamic_sampling_filter_path": f"{__name__}.keep_trainable",
            "save": str(folder),
            "load": str(folder),
        }

    def args(self, rows, **changes):
        SingletonMeta._instances.clear()
        args = hooks.rollout_args(prompt_data=write_rows(self.folder / "rows.jsonl", rows), **self.common | changes)
        init_http_client(args)
        return args

    def train(self, args, source, rollouts=1):
        """Rollouts as they come, the train batch and metrics of each, and how the data source was asked."""
        events.clear()
        draws, outcome = [], []
        get_samples = source.get_samples
        source.get_samples = lambda number: draws.append(number) or get_samples(number)
        for rollout_id in range(rollouts):
            output = generate_rollout(args, rollout_id, source)
            samples = [sample for group in output.samples for sample in group]
            outcome.append(
                {
                    "groups": [[plain(sample) for sample in group] for group in output.samples],
                    "metrics": hooks.rollout_metrics(args, samples, output.metrics, 2.0),
                    "batch": hooks.convert_samples_to_train_data(args, samples),
                }
            )
            again = [Sample.from_dict(sample.to_dict()) for sample in samples]
            assert [plain(sample) for sample in again] == [plain(sample) for sample in samples]
        return {"rollouts": outcome, "draws": draws, "events": sorted(events, key=str)}

    def epochs(self):
        """Three rows, two a rollout, shuffled anew in each epoch; saved, loaded, put back."""
        rows = [("a", {"turns": 2}), ("bb", {"refused_once": "bb"}), ("ccc", {"final": "truncated"})]
        args = self.args(rows, rollout_batch_size=2, rollout_shuffle=True, dynamic_sampling_filter_path=None)
        source = RolloutDataSourceWithBuffer(args)
        result = self.train(args, source, rollouts=4)
        source.save(3)
        later = [RolloutDataSourceWithBuffer(args) for _ in range(2)]
        later[0].load(3)
        later[1].load(99)
        returned = later[0].get_samples(1)
        later[0].add_samples(returned)
        draws = [
            [[plain(s) for s in group] for group in each.get_samples(n)]
            for each in (source, *later)
            for n in (2, 1, 3)
        ]
        return result | {"later": draws, "lengths": [len(source), len(source.dataset.samples), len(later[0].buffer)]}

    def surplus(self):
        """Groups of two, four drawn for two: the two that hang are aborted and lost, the next rollout draws others."""
        rows = [("a", {}), ("b", {"hold": True}), ("c", {"turns": 3}), ("d", {"hold": True})]
        args = self.args(
            rows,
            rollout_batch_size=2,
            over_sampling_batch_size=4,
            n_samples_per_prompt=2,
            dynamic_sampling_filter_path=f"{__name__}.keep_all",
        )
        result = self.train(args, RolloutDataSourceWithBuffer(args), rollouts=2)
        state = GenerateState(args)
        return result | {"state": [state.aborted, state.remaining_batch_size, len(state.pendings)]}

    def drops(self):
        """A failed group, and one that the engine aborted, are filtered out and replaced."""
        rows = [
            ("a", {"final": "failed"}),
            ("bb", {"finish": "abort"}),
            ("c", {"reward": 0.0, "finish": "length", "raw_reward": 0.75}),
            ("d", {"own_reward": 0.5}),
        ]
        args = self.args(rows, rollout_batch_size=2)
        return self.train(args, RolloutDataSourceWithBuffer(args))

    def evaluation(self):
        """Two data sets, one slot. With more slots the order of events would be left to chance."""
        rows = [("x", {"rewarded_after": "y"}), ("y", {"own_reward": 0.25, "finish": "length"}), ("z", {"turns": 2})]
        one = write_rows(self.folder / "one.jsonl", rows)
        two = write_rows(self.folder / "two.jsonl", [("v", {"turns": 2}), ("w", {"final": "failed", "reward": 0.0})])
        common = {"input_key": "text", "label_key": "kind", "metadata_key": "metadata", "top_p": 1.0, "top_k": -1}
        configs = [
            EvalDatasetConfig("one", one, **common, temperature=0.4, max_response_len=8, n_samples_per_eval_prompt=1),
            EvalDatasetConfig(
                "two",
                two,
                **common,
                temperature=1.0,
                max_response_len=80,
                n_samples_per_eval_prompt=2,
                custom_rm_path=f"{__name__}.reward",
                custom_generate_function_path=f"{__name__}.generate",
                metadata_overrides={"extra": 1},
            ),
        ]
        args = self.args([], rollout_batch_size=1, sglang_server_concurrency=1, eval_datasets=configs)
        events.clear()
        data = generate_rollout(args, 0, None, evaluation=True).data
        result = {k: v | {"samples": [plain(sample) for sample in v["samples"]]} for k, v in data.items()}
        return {"data": result, "events": [event for event in events if event[0] == "generate"]}

    def batch(self):
        """The conversion by itself: masks, removed samples, siblings of one execution, training metadata."""
        args = self.args([], rollout_batch_size=1)
        samples = [
            Sample(index=i, group_index=i, rollout_id=rollout_id, tokens=[1, 2, 3], response_length=2, reward=reward)
            for i, (rollout_id, reward) in enumerate([(None, 1.0), (0, 0.0), (7, 1.0), (7, 1.0), (None, 0.0)])
        ]
        samples[1].remove_sample = True
        samples[2].loss_mask = [0, 1]
        for sample in samples:
            sample.train_metadata = {"weight": 2}
        return {"batch": hooks.convert_samples_to_train_data(args, samples), "masks": [s.loss_mask for s in samples]}

    def refusal(self):
        """The stand-in has no partial rollouts, and says so."""
        try:
            GenerateState(self.args([], partial_rollout=True))
        except NotImplementedError as error:
            return str(error)

    def appending(self):
        """What append_response_tokens refuses, and the sample that is left."""
        cases = {
            "no log-probs": ([{"tokens": [1]}], {}),
            "unequal lengths": ([{"tokens": [1, 2], "log_probs": [-1.0]}], {}),
            "log-probs of what is not trained": ([{"tokens": [1], "log_probs": [0.0], "trainable": False}], {}),
            "earlier tokens without log-probs": ([{"tokens": [1], "log_probs": [-1.0]}], {"response_length": 2}),
            "nothing": ([{"tokens": [], "log_probs": [], "text": ""}, {}], {}),
            "late mask": ([{"tokens": [1], "trainable": False, "text": "x"}], {"response_length": 2}),
            "unknown finish": ([{"meta_info": {"finish_reason": {"type": "odd"}, "prompt_tokens": 3}}], {}),
            "not terminal": (
                [
                    {
                        "meta_info": {"finish_reason": {"type": "stop"}, "prompt_tokens": 3},
                        "update_terminal_info": False,
                    }
                ],
                {},
            ),
        }
        results = {}
        for name, (calls, start) in cases.items():
            sample, errors = Sample(**start), []
            for call in calls:
                try:
                    sample.append_response_tokens(None, **call)
                except ValueError:
                    errors.append("ValueError")
            results[name] = [errors, plain(sample), sample.effective_response_length]
        return results


def slime_defaults():
    """Of the arguments in hooks.SLIME_DEFAULTS, by the real slime's own parsers."""
    from slime.backends.sglang_utils.arguments import add_sglang_arguments
    from slime.utils.arguments import get_slime_extra_args_provider

    parser = argparse.ArgumentParser(conflict_handler="resolve")
    get_slime_extra_args_provider()(parser)
    add_sglang_arguments(parser)
    defaults = {action.dest: action.default for action in parser._actions}
    defaults["apply_chat_template_kwargs"] = json.loads(defaults["apply_chat_template_kwargs"])
    return {name: defaults[name] for name in hooks.SLIME_DEFAULTS if name in defaults}


def main(checkpoint, out):
    slime = hooks.find_slime()
    with tempfile.TemporaryDirectory() as folder, FakeSGLang(reply) as server:
        scenario = Scenario(Path(folder), checkpoint, server)
        names = ("epochs", "surplus", "drops", "evaluation", "batch", "appending", "refusal")
        result = {"slime": slime, **{name: getattr(scenario, name)() for name in names}}
        if slime.startswith("slime at"):
            result["defaults"] = slime_defaults()
        result["routing keys"] = sum("x-smg-routing-key" in request.headers for request in server.requests)
    Path(out).write_text(json.dumps(result))
