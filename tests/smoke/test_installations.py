"""What the smoke run makes of other installations than its own: another torchvision, another device."""

import os
import subprocess
import sys

NUM_GPUS = 0

# What torchvision does when it was built for the PyTorch that is there.
TORCHVISION = """
import torch
torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_a_torchvision_that_fits_keeps_its_operators(tmp_path):
    (tmp_path / "torchvision.py").write_text(TORCHVISION)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ".")])
    done = run(
        "from smoke import cpu_only; cpu_only.prepare(); cpu_only.prepare(); import torchvision", PYTHONPATH=path
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_device_is_refused():
    done = run("from smoke import servers", SMOKE_DEVICE="gpu")
    assert (done.returncode, done.stderr) == (1, "SMOKE_DEVICE must be cpu or cuda, not gpu\n")
