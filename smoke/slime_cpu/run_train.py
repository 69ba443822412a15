"""slime's own train.py, unmodified, on a CPU and in float32: `python run_train.py <train.py's flags>`.

Needs SLIME_DIR and MEGATRON_DIR, and both and this folder on PYTHONPATH.
"""

import os
import runpy
import sys

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling would take longer than the whole run
from smoke.slime_cpu import cuda_on_cpu

cuda_on_cpu.install()
import ray

import slime.backends.megatron_utils.arguments as megatron_arguments

_slime_defaults = megatron_arguments._set_default_megatron_args


def _float32_defaults(args):
    """slime always trains in bf16 or fp16; here the numbers are compared with other programs'."""
    args = _slime_defaults(args)
    args.bf16 = False
    return args


def main() -> None:
    megatron_arguments._set_default_megatron_args = _float32_defaults
    ranks = int(sys.argv[sys.argv.index("--actor-num-gpus-per-node") + 1])
    hook = {"worker_process_setup_hook": "cuda_on_cpu.install"}
    # The GPUs are names only: slime reserves one for each training rank.
    ray.init(address="local", num_cpus=6 + ranks, num_gpus=ranks, include_dashboard=False, runtime_env=hook)
    runpy.run_path(os.path.join(os.environ["SLIME_DIR"], "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
