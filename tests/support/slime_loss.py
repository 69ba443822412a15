"""slime's conversion, data-parallel split, OPD advantage and policy loss on given samples, one rank of a gloo group.

    python -m tests.support.slime_loss SAMPLES.pt OUT.pt RANK WORLD_SIZE STORE_FILE <train.py's flags>

No Ray cluster, no engine, no model: the logits are random numbers that depend on the sample's index alone. Writes
what test_slime_loss.py compares with a computation of its own.
"""

import sys

import ray
import torch
import torch.distributed as dist

from smoke import hooks
from smoke.slime_cpu import cuda_on_cpu
from tests.support.toys import random_logits, response_log_probs

KEYS = ["tokens", "log_probs", "rollout_log_probs", "advantages", "returns", "loss_masks", "total_lengths"]
KEYS += ["response_lengths", "rollout_mask_sums", "opd_reverse_kl"]


def main(samples_file: str, out: str, rank: str, world: str, store: str, *flags: str) -> None:
    cuda_on_cpu.install()  # before anything of slime and Megatron is imported
    from megatron.core import mpu

    from slime.backends.megatron_utils.data import get_batch, get_data_iterator
    from slime.backends.megatron_utils.loss import compute_advantages_and_returns, loss_function
    from slime.ray.rollout import RolloutManager
    from slime.utils.arguments import parse_args
    from slime.utils.data import process_rollout_data
    from slime.utils.types import Sample

    rank, world = int(rank), int(world)
    ray.put, ray.get = (lambda x, **_: x), (lambda x, **_: x)
    sys.argv = ["train.py", *flags]
    args = parse_args()
    samples = [Sample.from_dict(values) for values in torch.load(samples_file)]
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    mpu.initialize_model_parallel()

    manager = object.__new__(RolloutManager.__ray_metadata__.modified_class)
    manager.args = args
    manager.set_train_parallel_config(
        {"dp_size": world, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}
    )
    parts = manager._split_train_data_by_dp(hooks.convert_samples_to_train_data(args, samples))
    data = process_rollout_data(args, parts, rank, world)
    data["rollout_mask_sums"] = data["rollout_mask_sums"].float()

    vocab = args.vocab_size
    by_index = {sample.index: sample for sample in samples}
    logits = {i: random_logits(i, len(by_index[i].tokens), vocab) for i in data["sample_indices"]}
    data["log_probs"] = [
        response_log_probs(by_index[i].tokens, by_index[i].response_length, logits[i]) for i in data["sample_indices"]
    ]
    compute_advantages_and_returns(args, data)
    result = {i: {"advantages": a.clone()} for i, a in zip(data["sample_indices"], data["advantages"], strict=True)}
    iterator = get_data_iterator(data)[0]
    total = 0.0
    for indices in data["micro_batch_indices"]:
        batch = get_batch(iterator, KEYS, args.data_pad_size_multiplier)
        ids = [data["sample_indices"][j] for j in indices]
        leaves = [logits[i].requires_grad_() for i in ids]
        packed = torch.cat(leaves)
        packed = torch.nn.functional.pad(packed, (0, 0, 0, batch["tokens"].size(1) - len(packed)))[None]
        loss, _, _ = loss_function(args, batch, data["num_microbatches"][0], data["global_batch_sizes"][0], packed)
        loss.backward()
        total += loss.item() / data["num_microbatches"][0]
        for i, leaf in zip(ids, leaves, strict=True):
            result[i]["gradient"] = leaf.grad
    torch.save({"samples": result, "loss": total}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
