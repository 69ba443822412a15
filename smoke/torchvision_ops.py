"""Import this before transformers' models or sglang on a CPU-only PyTorch.

The package index has torchvision for CUDA only; its compiled operators do not load beside a CPU build of PyTorch, and
its import then fails because it registers shape functions for operators that do not exist. Nothing here calls them.
"""

import torch

for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
