"""What rehearse.sh checks of the bundle beside a whole run of run.sh on the CPU.

    python -m tests.gpu.rehearsal gpu            what only a GPU's processes import, without one
    python -m tests.gpu.rehearsal kernels        what its engines compile, with nvcc; run.sh begins with this
    python -m tests.gpu.rehearsal traces FOLDER  what the processes of a run on the CPU opened, and could import

As `tcod_trace.py` in an environment, with a .pth file that imports it, this notes every file that a process opens.
"""

import ast
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from typing import Any

TRACES = os.environ.get("TCOD_TRACES", "")  # a folder: a file for each process
# What the code names and the bundle lacks, by the reason for which a run of a Qwen3 on an NVIDIA GPU does without it.
ABSENT = {
    "other processors": """aiter amdsmi custom_ops habana_frameworks mate memfabric_hybrid mindspore mlx mori msprobe
        pymtml quark rocpd rpdTracerControl sgl_kernel_npu torch_npu torchada torchair zbal""",
    "mixtures of experts, other attention, quantised weights": """auto_round bitsandbytes deep_ep deep_gemm
        dequant_k_cache fast_hadamard_transform flash_attn flash_attn_interface kt_kernel modelopt mooncake nixl_ep
        petit_kernel sglang.srt.single_batch_overlap tilelang torchao vllm xformers xielu""",
    "Megatron's fused kernels, which are switched off, and other layers": """amp_C apex causal_conv1d
        emerging_optimizers fla flash_attn_3 flash_mla flashattn_hopper fused_weight_gradient_mlp_cuda grouped_gemm
        mamba_ssm nvidia_kitchen scaled_masked_softmax_cuda scaled_softmax_cuda scaled_softmax_cudaa
        scaled_upper_triang_masked_softmax_cuda transformer_engine transformer_engine_torch""",
    "watchdogs and storage": """botocore memray multistorageclient nvidia_resiliency_ext one_logger userlib
        workload_inspector""",
    "other tokenizers, tables": "datasets file_utils pyarrow qwen_vl_utils tiktoken",
    "other versions of what is there": """cuda.cuda cuda.cudart megatron.core.tokenizers.utils.build_tokenizer
        sglang.srt.patch_torch torch._C""",
    "weights from elsewhere": "boto3 fastsafetensors modelexpress modelscope redis runai_model_streamer",
    "sound and pictures": "cv2 decord mistral_common timm torchaudio torchcodec vector_quantize_pytorch",
    "other servers, parsers and traces": """fastokens gpt_oss granian lxml netifaces nvtx opentelemetry.exporter
        opentelemetry.sdk setuptools_scm sglang.private smg_grpc_proto""",
}
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


def trace() -> None:
    """From now on, note the path of each file that this process opens."""
    seen: set[str] = set()
    own = f"{TRACES}/{os.getpid()}"

    def note(event: str, values: tuple) -> None:
        if event == "open" and isinstance(values[0], (str, bytes)) and not (values[2] or 0) & os.O_WRONLY:
            path = os.fsdecode(values[0])
            if path not in seen and path != own:
                seen.add(path)
                with open(own, "a") as file:
                    file.write(os.path.abspath(path) + "\n")

    sys.addaudithook(note)


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


def source(path: str) -> str:
    folder, name = os.path.split(path)
    if os.path.basename(folder) == "__pycache__":
        return os.path.join(os.path.dirname(folder), name.partition(".")[0] + ".py")
    return path


def imports(path: str) -> list[tuple[str, int]]:
    """(module, line) of every import in a file, wherever it stands; relative ones too, as paths of modules."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        tree = ast.parse(file.read())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = os.path.dirname(path)
            for _ in range(node.level - 1):
                up = os.path.dirname(up)
            module = (node.module or "").replace(".", "/")
            found.append((f"{up}/{module}" if node.level else node.module or "", node.lineno))
    return found


def is_there(module: str) -> bool:
    """Whether there is such a module on the path; of a package its own, without an import."""
    if module.startswith("/"):
        return is_module(module)
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return True
    roots = [folder for folder in sys.path if is_module(f"{folder}/{top}")]
    return any(is_module(f"{root}/{module.replace('.', '/')}") for root in roots)


def is_module(path: str) -> bool:
    if os.path.isdir(path) or os.path.exists(f"{path}.py"):
        return True
    folder, name = os.path.split(path)
    files = os.listdir(folder) if os.path.isdir(folder) else []
    return any(file.startswith(f"{name}.") and file.endswith(".so") for file in files)


def traces(folder: str) -> list[str]:
    opened: set[str] = set()
    for name in os.listdir(folder):
        with open(f"{folder}/{name}") as file:
            opened |= {line.rstrip("\n") for line in file}
    wrong, code = [], set()
    allowed = os.environ["ALLOWED"].split(":")
    for path in sorted(opened):
        if not path.startswith(tuple(allowed)) and os.path.isfile(path):
            wrong.append(f"opened, and not of the bundle, the repository or the machine: {path}")
        if (text := source(path)).endswith(".py") and os.path.exists(text) and text.startswith(allowed[0]):
            code.add(text)
    absent: dict[str, list[str]] = {}
    for path in sorted(path for path in code if "/site-packages/" not in path or "/sglang/" in path):
        for module, line in imports(path):
            if not is_there(module):
                absent.setdefault(module, []).append(f"{path}:{line}")
    known = tuple(f"{name}." for names in ABSENT.values() for name in names.split())
    for module, places in absent.items():
        if not f"{module.rpartition('/')[2]}.".startswith(known):
            wrong.append(f"{module} is not in the bundle: {places[0]}, {len(places)} places")
    print(f"{len(opened)} files were opened, {len(code)} of them code; {len(absent)} modules are absent")
    return wrong


if TRACES and __name__ == "tcod_trace":
    trace()
elif __name__ == "__main__":
    problems = {"gpu": gpu, "kernels": kernels, "traces": traces}[sys.argv[1]](*sys.argv[2:])
    sys.exit("\n".join(problems) or 0)
