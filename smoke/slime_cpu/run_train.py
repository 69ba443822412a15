"""slime's own train.py, unmodified, on a CPU: `python -m smoke.slime_cpu.run_train [NAME.py] <flags>`.

The flags are train.py's, or those of another program beside it, as train_async.py. It trains in float32, or with
--bf16. Needs SLIME_DIR and MEGATRON_DIR, and both behind this repository on PYTHONPATH.
"""

import os
import runpy
import sys

import ray

from smoke.slime_cpu import cuda_on_cpu


def use_float32() -> None:
    """slime always trains in bf16 or fp16; here the numbers are compared with other programs'."""
    import slime.backends.megatron_utils.arguments as megatron_arguments

    slimes_defaults = megatron_arguments._set_default_megatron_args

    def float32_defaults(args):
        args = slimes_defaults(args)
        args.bf16 = False
        return args

    megatron_arguments._set_default_megatron_args = float32_defaults


def main() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling would take longer than the whole run
    cuda_on_cpu.install()  # before anything of slime and Megatron is imported
    if "--bf16" not in sys.argv:
        use_float32()
    program = sys.argv.pop(1) if sys.argv[1].endswith(".py") else "train.py"
    gpus = ["--actor-num-gpus-per-node"]
    if not {"--rollout-external-engine-addrs", "--colocate"} & set(sys.argv):
        gpus.append("--rollout-num-gpus")
    ranks = sum(int(sys.argv[sys.argv.index(flag) + 1]) for flag in gpus)
    hook = {"worker_process_setup_hook": "smoke.slime_cpu.cuda_on_cpu.install"}
    # The GPUs are names only: slime reserves one for each training rank.
    ray.init(address="local", num_cpus=6 + ranks, num_gpus=ranks, include_dashboard=False, runtime_env=hook)
    runpy.run_path(os.path.join(os.environ["SLIME_DIR"], program), run_name="__main__")


if __name__ == "__main__":
    main()
