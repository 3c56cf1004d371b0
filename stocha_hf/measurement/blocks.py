"""The decoder blocks of a model, and their seven projections by name.

Found by the names that all architectures of this package share, in native, patched and converted models alike, and in
wrappers. What is measured at a projection's input or at an activation's output hangs on the modules found here.

    for block in blocks(model):
        block.linears["down_proj"].register_forward_pre_hook(...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stocha_hf.cuts import ATTENTION, PROJECTIONS
from stocha_hf.errors import StochaError

FFN = tuple(name for name in PROJECTIONS if name not in ATTENTION)


@dataclass(frozen=True)
class Block:
    """One decoder block: its module, its projections by name, and its FFN's activation."""

    module: nn.Module
    linears: dict[str, Any]
    act: nn.Module


def blocks(model: nn.Module) -> list[Block]:
    """Return the decoder blocks of a model in order. Raises StochaError where there are none."""
    found = [_block(module) for module in model.modules() if _is_block(module)]
    if not found:
        raise StochaError(f"the {type(model).__name__} has no decoder blocks with {', '.join(PROJECTIONS)}")
    return found


def _is_block(module: nn.Module) -> bool:
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    return all(hasattr(attention, name) for name in ATTENTION) and all(hasattr(mlp, name) for name in FFN)


def _block(module: nn.Module) -> Block:
    owners: list[tuple[object, tuple[str, ...]]] = [(module.self_attn, ATTENTION), (module.mlp, FFN)]
    linears = {name: getattr(owner, name) for owner, names in owners for name in names}
    return Block(module, linears, module.mlp.act_fn)  # type: ignore[union-attr, arg-type]


def weight_of(linear: Any) -> torch.Tensor:
    """A projection's weight [outputs, inputs], in numbers also where it is quantized."""
    return linear.dequantized() if hasattr(linear, "dequantized") else linear.weight.detach()


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Inside, the module's weights are float32; what was not written to is as it was afterwards."""
    kinds = [parameter.dtype for parameter in module.parameters()]
    for parameter in module.parameters():
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, kind in zip(module.parameters(), kinds, strict=True):
            parameter.data = parameter.data.to(kind)
