"""What rehearse.sh checks of the bundle beside a whole run of run.sh on the CPU.

    python -m tests.gpu.rehearsal gpu      what only a GPU's processes import, without one
    python -m tests.gpu.rehearsal kernels  what its engines compile, with nvcc; run.sh begins with this
"""

import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from typing import Any

# Imported by a GPU's engine and training, and not on a CPU.
ON_GPU = """
sgl_kernel flashinfer.norm flashinfer.jit torch_memory_saver cuda.bindings.runtime pynvml
sglang.launch_server sglang.srt.managers.scheduler sglang.srt.managers.detokenizer_manager
sglang.srt.model_executor.model_runner sglang.srt.layers.attention.triton_backend sglang.srt.models.qwen3
sglang.srt.utils.torch_memory_saver_adapter slime.ray.actor_group slime.backends.sglang_utils.sglang_engine
slime.backends.megatron_utils.actor smoke.slime_cpu.cpu_layer_spec
""".split()
# What an engine of a Qwen3 in bfloat16 compiles at its start: (module, function, arguments; a text is a type).
KERNELS = [
    ("flashinfer.jit.norm", "gen_norm_module"),
    ("sglang.jit_kernel.norm", "_jit_qknorm_module", 128, "bfloat16"),
    ("sglang.jit_kernel.norm", "_jit_rmsnorm_module", 1024, "bfloat16"),
    ("sglang.jit_kernel.norm", "_jit_fused_add_rmsnorm_module", "bfloat16", False),
    ("sglang.jit_kernel.rope", "_jit_fused_rope_module", True, 128, "bfloat16"),
    ("sglang.jit_kernel.activation", "_jit_activation_module", "bfloat16"),
    ("sglang.jit_kernel.kvcache", "_jit_kvcache_module", 8 * 128 * 2),
    ("sglang.jit_kernel.clamp_position", "_jit_clamp_position_module", "int64"),
    ("sglang.jit_kernel.resolve_future_token_ids", "_jit_resolve_future_token_ids_module", "int64"),
]


def pretend() -> None:
    """To the packages, this process has an H200: they take the way of a GPU until something is put on it."""
    import types

    import torch

    properties = types.SimpleNamespace(major=9, minor=0, name="NVIDIA H200", total_memory=141 * 10**9)
    properties.multi_processor_count = 132
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.mem_get_info = lambda *_: (properties.total_memory, properties.total_memory)
    torch.cuda.get_device_name = lambda *_: properties.name


def compile_kernel(module: str, function: str, *args: Any) -> str:
    """Compile one for this machine's GPU, or an H200 where there is none. Returns what went wrong."""
    import torch

    if not torch.cuda.is_available():
        pretend()
    try:
        made = getattr(importlib.import_module(module), function)(
            *(getattr(torch, arg) if isinstance(arg, str) else arg for arg in args)
        )
        if hasattr(made, "build_and_load"):
            made.build_and_load()
    except Exception as error:
        return f"{module}.{function}: {type(error).__name__}: {error}"
    return ""


def kernels() -> list[str]:
    """Compile all of them side by side, as far as there are cores; returns what went wrong."""
    if not (os.environ.get("CUDA_HOME") or shutil.which("nvcc")):
        print("no nvcc: nothing was compiled")
        return []
    with multiprocessing.get_context("spawn").Pool(min(len(KERNELS), os.cpu_count() or 1)) as pool:
        return list(filter(None, pool.starmap(compile_kernel, KERNELS, chunksize=1)))


def gpu() -> list[str]:
    """Import and preload what a GPU's processes do, have SGLang read its settings; returns what went wrong."""
    pretend()
    wrong = []
    for name in ON_GPU:
        try:
            importlib.import_module(name)
        except Exception as error:  # all of them are wanted, not the first
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    import torch_memory_saver

    saver = f"{torch_memory_saver.__path__[0]}_hook_mode_preload_cu13.abi3.so"
    variables = {**os.environ, "LD_PRELOAD": saver}
    preloaded = subprocess.run([sys.executable, "-c", ""], env=variables, capture_output=True, text=True)
    if preloaded.returncode or preloaded.stderr:
        wrong.append(f"{saver}: {preloaded.stderr}")
    from sglang.srt.server_args import prepare_server_args

    from smoke.make_models import SHIPPED
    from smoke.train_slime import as_flags
    from tests.gpu import engines

    read = prepare_server_args(["--model-path", str(SHIPPED), "--enable-memory-saver", *as_flags(engines.KERNELS)])
    print(f"SGLang reads: {read.device} {read.attention_backend}, {read.sampling_backend}")
    return wrong


if __name__ == "__main__":
    problems = {"gpu": gpu, "kernels": kernels}[sys.argv[1]]()
    sys.exit("\n".join(problems) or 0)
