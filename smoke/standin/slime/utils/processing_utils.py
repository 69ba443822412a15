from typing import Any

from transformers import AutoTokenizer


def load_tokenizer(name_or_path: str, **kwargs: Any) -> Any:
    return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
