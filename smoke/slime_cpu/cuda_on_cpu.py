"""Lets slime and Megatron-LM train on a CPU: answers the few CUDA questions they ask on this path.

`install` runs in the driver and, as Ray's worker_process_setup_hook, in every worker. Each entry was found by
leaving it out: without it the run stops at the place named beside it. Tensor-parallel size 1, any data-parallel size.
"""

import contextlib
import functools
import os
import sys
import tempfile
import types
import weakref

import torch
from torch.multiprocessing import reductions

from smoke import cpu_only


class _NoStream:
    """On a CPU everything is already in order."""

    def wait_stream(self, stream: object) -> None:
        pass


class _NumpyVersion(str):
    """slime's initialize.py insists on numpy 1.x; nothing on this path depends on it."""

    def startswith(self, prefix, *args) -> bool:
        return prefix == "1." or super().startswith(prefix, *args)


def _on_cpu(factory):
    """A tensor factory that takes device="cuda" for the CPU and does not pin memory."""

    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        if not str(kwargs.get("device", "")).startswith("cuda"):
            return factory(*args, **kwargs)
        return _memory_saver.on_gpu(factory(*args, **{**kwargs, "device": "cpu"}))

    return wrapper


def _use_cpu_accelerator() -> None:
    from slime.utils import accelerator

    class CpuAccelerator(accelerator.Accelerator):
        name = device_type = "cpu"
        visible_devices_env = "CUDA_VISIBLE_DEVICES"
        communication_backend_name = "gloo"

        def is_available(self) -> bool:
            return True

        def device(self, index=None) -> torch.device:
            return torch.device("cpu")

        def device_name(self, index=None) -> str:
            return "cpu"

        def current_device(self, *_) -> str:
            return "cpu"

        def device_count(self) -> int:
            return 1

        def mem_get_info(self, device=None) -> tuple[int, int]:
            return 1 << 40, 1 << 40  # below 3 GB free, slime collects garbage before every collective

        def memory_allocated(self, device=None) -> int:
            return 0

        def nothing(self, *_) -> None:
            return None

        memory_reserved = memory_allocated
        set_device = synchronize = current_stream = empty_cache = nothing

    accelerator.set_accelerator(CpuAccelerator())


class _MemorySaver:
    """torch_memory_saver, which gives a process's GPU memory back and keeps its contents in main memory.

    On a GPU nothing can be read between `pause` and `resume`; here it is NaN. `on_gpu` notes what would be on one.
    """

    _impl = None

    def __init__(self) -> None:
        self._tensors: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def on_gpu(self, tensor: torch.Tensor) -> torch.Tensor:
        self._tensors[id(tensor)] = tensor
        return tensor

    @torch.no_grad()
    def pause(self) -> None:
        paused = [tensor for tensor in self._tensors.values() if tensor.is_floating_point()]
        self._kept = [(tensor, tensor.detach().clone()) for tensor in paused]
        for tensor in paused:
            tensor.fill_(float("nan"))

    @torch.no_grad()
    def resume(self) -> None:
        for tensor, value in self._kept or ():
            tensor.copy_(value)
        self._kept = None

    def region(self, *_: object, **__: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    disable = region


_memory_saver = _MemorySaver()


def _use_memory_saver() -> None:
    # slime looks for the package's library and preloads it; the loader skips an empty file with a message.
    folder = os.path.join(tempfile.gettempdir(), f"no_memory_saver_{os.getuid()}")
    os.makedirs(os.path.join(folder, "torch_memory_saver"), exist_ok=True)
    open(os.path.join(folder, "torch_memory_saver_hook_mode_preload.abi3.so"), "a").close()
    module = types.ModuleType("torch_memory_saver")
    module.__file__ = os.path.join(folder, "torch_memory_saver", "__init__.py")
    module.torch_memory_saver = _memory_saver
    sys.modules["torch_memory_saver"] = module


def install() -> None:
    import numpy

    cpu_only.prepare()
    _use_memory_saver()
    numpy.__version__ = _NumpyVersion(numpy.__version__)
    _use_cpu_accelerator()

    torch.cuda.current_device = lambda: torch.device("cpu")  # Megatron get_model
    torch.cuda.Stream = _NoStream  # Megatron get_model
    torch.cuda.current_stream = lambda *_: _NoStream()  # Megatron get_model
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()  # Megatron tensor_parallel/random.py
    torch.cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()  # the same, with recomputed activations
    torch.Tensor.cuda = lambda self, *_, **__: _memory_saver.on_gpu(self)  # Megatron get_model, through Module.cuda
    torch.tensor = _on_cpu(torch.tensor)  # Megatron optimizer.py
    torch.zeros = _on_cpu(torch.zeros)  # Megatron schedules.py
    torch.empty = _on_cpu(torch.empty)  # Megatron exchange_utils.py, a checkpoint's tensors
    torch.empty_like = _on_cpu(torch.empty_like)  # slime tensor_backper.py

    # The pipes of the other strategy reach children only; slime hands tensors to an engine that it has not started.
    torch.multiprocessing.set_sharing_strategy("file_system")
    reductions._reduce_tensor_original = reductions.reduce_tensor  # SGLang's own, for GPUs, is then left out

    torch.cuda.synchronize = lambda *_: None  # Megatron filesystem_async.py, writing a checkpoint
    torch._C._host_emptyCache = lambda: None  # slime memory_utils.py, with --offload-train

    tensor_type = torch.Tensor.type

    def cuda_type(self, *args, **kwargs):
        """Megatron's optimizer sorts parameters by the name "torch.cuda.FloatTensor"."""
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = cuda_type
