"""Whether slime's own argument parser takes a train.py command line, on a machine without GPUs and engines.

slime and Megatron-LM must be importable. A flag that none of slime's parsers knows is a refusal here; slime itself
ignores it. --hf-checkpoint must be a folder with a config.json.
"""

import argparse
import contextlib
import importlib
import os
import sys
import types

import torch

from smoke.slime_cpu import cuda_on_cpu


def prepare() -> None:
    """Answer what slime's and Megatron's parsers ask of the machine, and import them."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron wants it for tensor parallelism
    cuda_on_cpu.install()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=9, minor=0)  # Megatron arguments.py
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # Megatron arguments.py
    importlib.import_module("slime.utils.arguments")


def refusal(flags: list[str]) -> str | None:
    """Why slime refuses these flags; None if it takes them. Ask once in a process: slime keeps what it parsed."""
    from slime.utils.arguments import parse_args

    unknown: list[set[str]] = []  # of each parser
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def recording(parser, args=None, namespace=None):
        known, rest = parse_known_args(parser, args, namespace)
        unknown.append({flag.split("=")[0] for flag in rest if flag.startswith("--")})
        return known, rest

    def refuse(parser, message):
        raise ValueError(message)

    argparse.ArgumentParser.parse_known_args = recording
    argparse.ArgumentParser.error = refuse
    sys.argv = ["train.py", *flags]
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            parse_args()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    nobodys = set.intersection(*unknown)
    return f"no parser knows {', '.join(sorted(nobodys))}" if nobodys else None
