"""Prompts and texts on a CPU that is slow at bfloat16: their products in float32.

PyTorch multiplies bfloat16 fast on CPUs with AVX-512 or SVE. Elsewhere a product with many tokens takes several
times as long as one in float32, the weights' conversion included. Here Linear layers are computed so, a part of the
weights at a time. Sums are rounded to bfloat16 as before; only their order is another.

PyTorch hands every function to a mode first. So modules, hooks and classes stay as they are, whatever they are.

    with prompt(tokens):    # nothing where the CPU is fast at bfloat16, tokens are few, or a gradient is wanted
        model(tokens)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from stocha_hf.decoding.conditions import is_plain_inference

MANY = 16  # tokens from which on it pays
AT_ONCE = 2**24  # weights: 64 MiB in float32


def multiplies_bf16() -> bool:
    """Return whether PyTorch multiplies bfloat16 matrices here with vector instructions; without, one by one."""
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))


def prompt(tokens: Any) -> AbstractContextManager[Any]:
    """Return a context for a model's call with these tokens, [batch, seq] or their embeddings' first entries."""
    takes = (
        isinstance(tokens, torch.Tensor)
        and tokens.is_cpu
        and tokens.numel() >= MANY
        and not torch.is_grad_enabled()
        and not multiplies_bf16()
    )
    return InFloat32() if takes else nullcontext()


class InFloat32(TorchFunctionMode):
    """Compute torch.nn.functional.linear of bfloat16 and many tokens in float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _is_slow(*args):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _is_slow(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return (
        x.dtype == torch.bfloat16
        and is_plain_inference(x)
        and x.is_cpu
        and x.numel() >= MANY * x.shape[-1]
        and all(
            type(some) in (torch.Tensor, nn.Parameter) and some.dtype == x.dtype and some.is_cpu
            for some in (weight, *(() if bias is None else (bias,)))
        )
        and weight.dim() == 2
    )


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    wide, parts = x.float(), []
    rows = max(AT_ONCE // weight.shape[1], 1)
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        parts.append(F.linear(wide, weight[part].float(), None if bias is None else bias[part].float()).to(x.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
