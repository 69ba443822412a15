"""Test modules import transformers' models."""

from smoke import cpu_only

cpu_only.prepare()
