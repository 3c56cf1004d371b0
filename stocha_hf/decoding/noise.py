"""StochA fused with the product by up, for training: less memory and time than its definition, the same coins.

For backward, native SiLU keeps gate, silu(gate) and up. EagerStocha keeps gate, up and one byte per element; on a GPU
with Triton, noise_triton.py keeps gate, up and the keys. A compiler fuses the definition as well, and gets that.

    stocha(gate, up, 0.3, "silu", "silu")  # None where the definition of modeling_stocha.py is to run
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from stocha_hf.decoding.coins import BASES, coin_hash, coin_keys, gradients_with_graph, threshold_of


def stocha(gate: torch.Tensor, up: torch.Tensor, p: float, base: str, positive: str) -> torch.Tensor | None:
    """Compute StochA(gate) * up (Lomeli et al., arXiv 2509.22358, sec. 3).

    Args:
        gate: Gate pre-activations, [..., intermediate_size], any float dtype.
        up: The up projection's output, of gate's shape.
        p: Probability of the base activation for a negative gate.
        base: The base activation, a key of BASES.
        positive: What runs where gate >= 0: "silu", "relu" or "drawn".

    Returns:
        The hidden vector, or None where the definition is to run: under torch.func and vmap, and for another base.
    """
    if base not in BASES or torch._C._are_functorch_transforms_active():
        return None
    keys = coin_keys(gate)
    # p = 1 with S+ is SiLU to the bit, which PyTorch's own kernel is sure to give
    function = _triton_function() if gate.is_cuda and p < 1 else None
    return (function or EagerStocha).apply(gate, up, keys, p, base, positive)


@functools.cache
def _triton_function() -> Any:
    if find_spec("triton") is None:
        return None
    from stocha_hf.decoding.noise_triton import TritonStocha

    return TritonStocha


class EagerStocha(torch.autograd.Function):
    """StochA in PyTorch's operations; keeps gate, up and one byte per element.

    Which elements take the base activation is an integer mask (all ones or zero) of gate's width, and selecting is
    bitwise: on a CPU, `where` and `masked_fill` take longer than SiLU and its backward together.
    """

    TILE = 2**18  # elements at a time on a CPU: the hash stays in the cache

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, keys: torch.Tensor, p: float, base: str, positive: str
    ) -> torch.Tensor:
        width, integer = gate.shape[-1], getattr(torch, f"int{8 * gate.element_size()}")
        hidden = torch.empty(gate.shape, dtype=torch.result_type(gate, up), device=gate.device)
        chosen = torch.empty(gate.shape, dtype=torch.int8, device=gate.device)
        rows = EagerStocha.TILE // width + 1 if gate.device.type == "cpu" else len(keys)
        tensors = [tensor.reshape(-1, width) for tensor in (gate, up, hidden, chosen)]
        for x, u, out, kept, row_keys in zip(*(t.split(rows) for t in (*tensors, keys[:-width, None])), strict=True):
            mask = coin_hash(row_keys, keys[-width:]).lt_(threshold_of(p)).neg_().to(integer)
            negative = x.sign().view(integer) >> 8 * x.element_size() - 1  # NaN counts as positive: it passes through
            if positive == "silu":
                mask |= negative.bitwise_not_()
            elif positive == "relu":
                mask &= negative
            kept.copy_(mask)
            torch.mul(_act(x, mask, base, positive), u, out=out)
        ctx.save_for_backward(gate, up, chosen)
        ctx.rule = base, positive
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, chosen = ctx.saved_tensors
        base, positive = ctx.rule
        if torch.is_grad_enabled():  # create_graph: for the gradient of this gradient
            return (*gradients_with_graph(gate, up, chosen != 0, grad, base, positive), None, None, None, None)
        mask = chosen.to(getattr(torch, f"int{8 * gate.element_size()}"))
        grad_up = _act(gate, mask, base, positive) * grad
        inner = (grad * up).to(gate.dtype)
        relu = None if positive == "silu" else torch.ops.aten.threshold_backward(inner, gate, 0)
        return _select(mask, BASES[base][1](inner, gate), relu), grad_up, None, None, None, None


def _act(x: torch.Tensor, mask: torch.Tensor, base: str, positive: str) -> torch.Tensor:
    """The base activation where the mask is set, else ReLU: 0 with S+, whose mask is set for all positive x."""
    return _select(mask, BASES[base][0](x), None if positive == "silu" else F.relu(x))


def _select(mask: torch.Tensor, chosen: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """`chosen`, changed in place, where the mask's bits are set, `other` (None: 0) where they are not."""
    bits = chosen.view(mask.dtype)
    if other is None:
        bits &= mask
    else:
        bits ^= other.view(mask.dtype)
        bits &= mask
        bits ^= other.view(mask.dtype)
    return chosen
