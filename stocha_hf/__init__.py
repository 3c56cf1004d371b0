"""Sparse feed-forward layers for pretrained language models: convert, train, measure and publish.

Names are imported when first used, so `import stocha_hf` and every command's --help stay fast and free of torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "StochaConfig": "modeling_stocha",
    "patch": "modeling_stocha",
    "unpatch": "modeling_stocha",
    "stocha_mode": "modeling_stocha",
    "StochaError": "errors",
    "__version__": "spec",
}
__all__ = sorted(_HOME)  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'stocha_hf' has no attribute {name!r}")
    return getattr(import_module(f"stocha_hf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
