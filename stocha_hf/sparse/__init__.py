"""Contract 0: what modeling_stocha.py of stocha_hf 0.1, which repos published then carry, looks for in this package.

Such a file imports `runtime` from here and takes KERNELS, install and release. Its FFNs decode with the kernels; its
attention and lm_head run in PyTorch, since the file knows no contract by which to fuse them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from stocha_hf.decoding import ops
from stocha_hf.decoding.memory import release


class Kernels(NamedTuple):
    """What an FFN of such a file decodes with."""

    available: Callable[[str], bool]  # of a device type
    ffn: Callable[..., torch.Tensor]


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "this checkpoint's modeling_stocha.py is of stocha_hf 0.1: only its FFNs decode with kernels; run "
        "stocha-convert on the checkpoint to renew the file",
        RuntimeWarning,
        stacklevel=3,
    )


def _install(model: Any) -> None:
    _warn_once()


runtime = SimpleNamespace(KERNELS=Kernels(ops.available, ops.ffn), install=_install, release=release)
