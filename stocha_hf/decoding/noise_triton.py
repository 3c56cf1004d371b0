"""StochA in one Triton kernel a pass, for training on a GPU; noise.py says what it is.

The kernel keeps gate, up and the keys, and hashes the coins again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from stocha_hf.decoding.coins import coin_hash, gradients_with_graph, threshold_of


@triton.jit
def _base(x, grad, BASE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The base activation of x and its gradient, rounded as in PyTorch's kernels."""
    if BASE == "silu":
        divisor = 1 + libdevice.exp(-x)
        if x.dtype == tl.float64:
            value, sigmoid = x / divisor, 1 / divisor
        else:
            value, sigmoid = tl.div_rn(x, divisor), tl.div_rn(1.0, divisor)
        return value, grad * sigmoid * (1 + x * (1 - sigmoid))
    else:
        tanh = libdevice.tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x)))  # sqrt(2 / pi)
        slope = 0.5 * x * (1 - tanh * tanh) * (0.7978845608028654 * (1 + 3 * 0.044715 * (x * x)))
        return 0.5 * x * (1 + tanh), grad * (0.5 * (1 + tanh) + slope)


@triton.jit(do_not_specialize=["threshold"])
def _stocha_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, keys_ptr, out_ptr, grad_ptr, grad_up_ptr, width, threshold,
    BASE: tl.constexpr, POSITIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one token: hidden into out or, given hidden's gradient, those of gate and up."""
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, offset = column < width, row.to(tl.int64) * width + column
    gate, up = tl.load(gate_ptr + offset, inside), tl.load(up_ptr + offset, inside)
    x = gate if gate.dtype == tl.float64 else gate.to(tl.float32)
    bits = (tl.load(keys_ptr + row) ^ tl.load(keys_ptr + tl.num_programs(0) + column, inside)) * 0x2C1B3C6D
    chosen = (bits ^ (bits >> 15)) * (2 * 0x297A2D39) < threshold
    if POSITIVE == "silu":
        chosen = chosen | ~(x < 0)
    if POSITIVE == "relu":
        chosen = chosen & (x < 0)
    if grad_ptr is None:
        value, _ = _base(x, x, BASE)
    else:
        grad = tl.load(grad_ptr + offset, inside).to(x.dtype)
        inner = (grad * up.to(x.dtype)).to(gate.dtype).to(x.dtype)
        value, grad_base = _base(x, inner, BASE)
        tl.store(out_ptr + offset, tl.where(chosen, grad_base, tl.where(x > 0, inner, 0.0)), inside)
    value = tl.where(chosen, value, tl.where(x < 0, 0.0, x)).to(gate.dtype).to(x.dtype)
    if grad_ptr is None:
        tl.store(out_ptr + offset, value * up.to(x.dtype), inside)
    else:
        tl.store(grad_up_ptr + offset, grad * value, inside)


class TritonStocha(torch.autograd.Function):
    """StochA in one Triton kernel a pass; keeps gate, up and the keys, from which backward hashes the coins again."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, keys: torch.Tensor, p: float, base: str, positive: str
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up, keys)
        ctx.rule = threshold_of(p), base, positive
        hidden = torch.empty_like(gate, dtype=torch.result_type(gate, up), memory_format=torch.contiguous_format)
        TritonStocha.launch(gate, up, keys, hidden, None, None, *ctx.rule)
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, keys = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: for the gradient of this gradient
            mask = coin_hash(keys[: -gate.shape[-1]].view(*gate.shape[:-1], 1), keys[-gate.shape[-1] :]) < ctx.rule[0]
            return (*gradients_with_graph(gate, up, mask, grad, *ctx.rule[1:]), None, None, None, None)
        grad_gate, grad_up = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
        TritonStocha.launch(gate, up, keys, grad_gate, grad.contiguous(), grad_up, *ctx.rule)
        return grad_gate, grad_up, None, None, None, None

    @staticmethod
    def launch(gate: torch.Tensor, up: torch.Tensor, keys: torch.Tensor, *rest: Any) -> None:
        width, block = gate.shape[-1], 512
        grid = len(keys) - width, triton.cdiv(width, block)
        with torch.cuda.device(gate.get_device()):  # Triton launches on the current one
            _stocha_kernel[grid](gate.contiguous(), up.contiguous(), keys, *rest[:3], width, *rest[3:], block)
