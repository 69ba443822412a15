"""slime's conversion, data-parallel split, OPD advantage, policy loss and training step on given samples.

One rank of a gloo group, with Megatron's real parallel state, gradient buffers and schedule:

    python -m tests.support.slime_loss SAMPLES.pt CASES.json OUT.pt RANK WORLD_SIZE CP_SIZE STORE <train.py's flags>

No Ray cluster, no engine; the model is a table of logits, one row per token of the batch, so its gradient is the
loss's gradient at every token. Writes what test_slime_loss.py compares with a computation of its own.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import ray
import torch
import torch.distributed as dist

from smoke import hooks
from smoke.slime_cpu import cuda_on_cpu
from tests.support.toys import random_logits


class _Optimizer:
    """Keeps the gradient that it is given, and changes nothing."""

    def __init__(self, table: torch.nn.Parameter) -> None:
        self.table = table
        self.gradients: list[torch.Tensor] = []

    def zero_grad(self) -> None:
        pass

    def step(self) -> tuple[bool, float, None]:
        self.gradients.append(self.table.main_grad.clone())
        return True, 0.0, None


def make_model(args: Namespace, samples: list) -> tuple[torch.nn.Module, dict[int, torch.Tensor]]:
    """(the model in Megatron's gradient buffers, each sample's rows of the table by its index)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    class Table(MegatronModule):
        share_embeddings_and_output_weights = False
        model_type = ModelType.encoder_or_decoder

        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config)
            rows = [random_logits(sample.index, len(sample.tokens), args.vocab_size) for sample in samples]
            self.logits = torch.nn.Parameter(torch.cat([*rows, torch.zeros(1, args.vocab_size)]))
            self.rows: Iterator[torch.Tensor] = iter(())  # of each micro-batch to come

        def set_input_tensor(self, _: object) -> None:
            pass

        def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            rows = next(self.rows)
            padded = torch.nn.functional.pad(rows, (0, input_ids.size(1) - len(rows)), value=len(self.logits) - 1)
            return self.logits[padded][None]

    config = TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        calculate_per_token_loss=args.calculate_per_token_loss,
        context_parallel_size=args.context_parallel_size,
    )
    config.finalize_model_grads_func = finalize_model_grads
    ends = torch.tensor([len(sample.tokens) for sample in samples]).cumsum(0).tolist()
    rows = {s.index: torch.arange(end - len(s.tokens), end) for s, end in zip(samples, ends, strict=True)}
    return DistributedDataParallel(config, DistributedDataParallelConfig(), Table(config)), rows


def train(args: Namespace, samples: list) -> dict:
    """One rollout's training on this rank, as slime's actor does it."""
    from megatron.core import mpu

    from slime.backends.megatron_utils.actor import MegatronTrainRayActor
    from slime.backends.megatron_utils.cp_utils import slice_with_cp
    from slime.backends.megatron_utils.data import get_data_iterator
    from slime.backends.megatron_utils.loss import compute_advantages_and_returns, get_log_probs_and_entropy
    from slime.backends.megatron_utils.model import forward_only, train_one_step
    from slime.ray.rollout import RolloutManager

    sizes = {"dp_size": mpu.get_data_parallel_world_size(), "cp_size": mpu.get_context_parallel_world_size()}
    manager = object.__new__(RolloutManager.__ray_metadata__.modified_class)
    manager.args = args
    manager.set_train_parallel_config({**sizes, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1})
    parts = manager._split_train_data_by_dp(hooks.convert_samples_to_train_data(args, samples))
    data = MegatronTrainRayActor._get_rollout_data(Namespace(args=args), parts)

    model, rows = make_model(args, samples)
    sliced = [slice_with_cp(rows[index], len(model.module.logits) - 1) for index in data["sample_indices"]]
    batches = [torch.cat([sliced[i] for i in indices]) for indices in data["micro_batch_indices"]]
    iterator, counts = get_data_iterator(data), data["num_microbatches"]
    model.module.rows = iter(batches)
    if args.compute_advantages_and_returns:
        data |= forward_only(get_log_probs_and_entropy, args, [model], iterator, counts)
        compute_advantages_and_returns(args, data)
    for one in iterator:
        one.reset()
    model.module.rows = iter(batches)
    optimizer, scheduler = _Optimizer(model.module.logits), Namespace(step=lambda increment: None)
    logged = [
        train_one_step(args, 0, step, iterator, [model], optimizer, scheduler, count, trajectories)[0]
        for step, (count, trajectories) in enumerate(zip(counts, data["global_batch_sizes"], strict=True))
    ]
    advantages = dict(zip(data["sample_indices"], data.get("advantages", data["sample_indices"]), strict=True))
    micro_batches = [len(indices) for indices in data["micro_batch_indices"]]
    return {
        "gradients": [gradient[:-1] for gradient in optimizer.gradients],  # the last row pads
        "logged": logged,
        "advantages": advantages,
        "micro_batches": micro_batches,
    }


def main(
    samples_file: str, cases: str, out: str, rank: str, world: str, cp_size: str, store: str, *flags: str
) -> None:
    cuda_on_cpu.install()  # before anything of slime and Megatron is imported
    from megatron.core import mpu, tensor_parallel
    from megatron.training.global_vars import set_args

    from slime.utils.arguments import parse_args
    from slime.utils.types import Sample

    ray.put, ray.get = (lambda x, **_: x), (lambda x, **_: x)
    sys.argv = ["train.py", *flags]
    args = parse_args()
    args.context_parallel_size = int(cp_size)
    dist.init_process_group("gloo", store=dist.FileStore(store, int(world)), rank=int(rank), world_size=int(world))
    mpu.initialize_model_parallel(context_parallel_size=int(cp_size))
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    results = {}
    for name, changes in json.loads(Path(cases).read_text()).items():
        samples = [Sample.from_dict(values) for values in torch.load(samples_file)]
        one = Namespace(**{**vars(args), **changes})
        set_args(one)
        results[name] = train(one, samples)
    torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
