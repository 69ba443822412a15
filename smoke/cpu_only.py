"""What a CPU-only installation lacks and transformers' models and SGLang import: call `prepare` before they do."""

import sys
from pathlib import Path

import torch

STUBS = Path(__file__).resolve().parent / "stubs"


def prepare() -> None:
    """Make transformers' models and sglang importable. Nothing that is added here is ever called on a CPU.

    The package index has torchvision for CUDA only; its compiled operators do not load beside a CPU build of PyTorch,
    and its import then fails because it registers shape functions for operators that do not exist. SGLang's compiled
    kernels are for GPUs, too: stubs/ has a package of their name, which comes last on the import path.
    """
    try:
        import torchvision  # noqa: F401  (one that was built for this PyTorch brings them)
    except ModuleNotFoundError:
        pass  # transformers does without
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
    if str(STUBS) not in sys.path:
        sys.path.append(str(STUBS))
