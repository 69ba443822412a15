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
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if str(STUBS) not in sys.path:
        sys.path.append(str(STUBS))
