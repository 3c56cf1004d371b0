"""The architectures of which a whole decode step is one call of the kernels: a row each."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Where a model_type's classes are, and their prefix. Gemma's have norms around both halves of a layer, whose
    weights count from 1. Mistral has one sliding window for all layers, which its attention reads in the config.
    """

    module: str
    prefix: str
    is_gemma: bool = False
    has_one_window: bool = False

    def kind(self, name: str) -> Any:
        """Return a class of the native file, such as DecoderLayer, or None."""
        native = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        return getattr(native, self.prefix + name, None)


FAMILIES = {
    "llama": Family("llama", "Llama"),
    "mistral": Family("mistral", "Mistral", has_one_window=True),
    "qwen2": Family("qwen2", "Qwen2"),
    "qwen3": Family("qwen3", "Qwen3"),
    "gemma2": Family("gemma2", "Gemma2", is_gemma=True),
    "gemma3_text": Family("gemma3", "Gemma3", is_gemma=True),
}
