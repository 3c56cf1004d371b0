"""The coins of StochA, and its value and gradients given which elements take the base activation.

modeling_stocha.py has the definition and says why coins are hashed; the draws here are the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

BASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {  # (function, its backward)
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


def coin_keys(gate: torch.Tensor) -> torch.Tensor:
    """Draw the keys of a call's coins for gate [..., neurons]: int32 [tokens + neurons]."""
    width = gate.shape[-1]
    return torch.randint(-(2**31), 2**31, (gate.numel() // width + width,), dtype=torch.int32, device=gate.device)


def coin_hash(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Hash keys rows [..., 1] and columns [neurons], int32, to numbers that are uniform over the even int32 ones."""
    bits = (rows ^ columns).mul_(0x2C1B3C6D)
    bits ^= bits >> 15
    return bits.mul_(2 * 0x297A2D39)


def threshold_of(p: float) -> int:
    """Return the bound that a hash is below with probability p, to 31 bits; never at p = 0 and always at p = 1."""
    return min(int(p * 2**32) - 2**31, 2**31 - 1)


def gradients_with_graph(
    gate: torch.Tensor, up: torch.Tensor, chosen: torch.Tensor, grad: torch.Tensor, base: str, positive: str
) -> tuple[torch.Tensor, ...]:
    """Return the gradients for gate and up, given that of the hidden vector, so that they can be differentiated again.

    `chosen`, bool, is where the base activation was drawn; all are of gate's shape.
    """
    with torch.enable_grad():
        if positive == "silu":
            chosen = chosen | ~(gate < 0)
        elif positive == "relu":
            chosen = chosen & (gate < 0)
        hidden = torch.where(chosen, BASES[base][0](gate), F.relu(gate)) * up
        return torch.autograd.grad(hidden, (gate, up), grad, create_graph=True)
