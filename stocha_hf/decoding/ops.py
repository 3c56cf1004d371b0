"""The kernels as functions of tensors, and the FFN and Linear kernels as torch operators, for 1 to 8 tokens.

`torch.ops.stocha.ffn` and `torch.ops.stocha.linear` have fake implementations, so that torch.compile keeps them as
they are. In eager mode the kernels are called without torch's dispatcher, which takes longer than a small layer does.
All tensors are of one dtype, bfloat16, float16 or float32, and on the CPU; for the FFN also on a GPU (triton_ffn.py).
Where the kernels cannot be built, the operators are PyTorch's dense operations.

    ffn(x, gate, up, down_t, "fatrelu", 0.1)   # = W_down(act(W_gate x) * (W_up x)), reading active neurons only
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from stocha_hf.decoding import triton_ffn
from stocha_hf.decoding.build import kernels
from stocha_hf.decoding.gate_prediction import CoarseGate
from stocha_hf.decoding.state import key_of

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
TOKENS = 8  # at most
ACTIVATIONS = {"relu": 0, "fatrelu": 1, "relu2": 2, "drelu": 3, "shifted_relu": 4}  # as in kernels.cpp
HIDDEN: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {  # (gate, up, threshold) -> hidden
    "relu": lambda gate, up, threshold: F.relu(gate) * up,
    "fatrelu": lambda gate, up, threshold: F.threshold(gate, threshold, 0.0) * up,
    "relu2": lambda gate, up, threshold: F.relu(gate).square() * up,
    "drelu": lambda gate, up, threshold: F.relu(gate) * F.relu(up),
    "shifted_relu": lambda gate, up, threshold: F.relu(gate - threshold) * up,
}


def available(device: str = "cpu") -> bool:
    """Whether the kernels for a type of device are there; builds the CPU's at the first call."""
    return kernels() is not None if device == "cpu" else triton_ffn.available()


def ffn(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    activation: str,
    threshold: float,
    coarse: CoarseGate | None = None,
) -> torch.Tensor:
    """A gated FFN on x [..., H]; gate, up and the transposed down are contiguous, [M, H]; `coarse` is the gate's copy.

    Equals PyTorch's dense path within the rounding of sums, but for infinite or NaN weights of skipped neurons.
    """
    if torch.compiler.is_compiling():
        return torch.ops.stocha.ffn(x, gate, up, down_t, activation, threshold)
    if x.is_cuda:
        return _ffn_on_gpu(x, gate, up, down_t, activation, threshold)
    return _ffn(x, gate, up, down_t, activation, threshold, coarse)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., inputs] times weight [outputs, inputs], contiguous."""
    if torch.compiler.is_compiling():
        return torch.ops.stocha.linear(x, weight, bias)
    return _linear(x, weight, bias)


def _ffn(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    activation: str,
    threshold: float,
    coarse: CoarseGate | None = None,
) -> torch.Tensor:
    library = kernels()
    if library is None:
        return _dense(x, gate, up, down_t, activation, threshold)
    width, size = gate.shape
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    weights, scales, margin = _coarse(coarse, gate)
    library.stocha_ffn(
        DTYPES[x.dtype], x.data_ptr(), gate.data_ptr(), up.data_ptr(), down_t.data_ptr(), out.data_ptr(), weights,
        scales, _tokens(x), size, width, ACTIVATIONS[activation], threshold, margin, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _ffn_on_gpu(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    _tokens(x)
    out = triton_ffn.ffn(x, *rest) if triton_ffn.available() else None
    return _dense(x, *rest) if out is None else out


def _dense(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down_t: torch.Tensor, activation: str, threshold: float
) -> torch.Tensor:
    return HIDDEN[activation](F.linear(x, gate), F.linear(x, up), threshold) @ down_t


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    library = kernels()
    if library is None:
        return F.linear(x, weight, bias)
    outputs, inputs = weight.shape
    x, out = x.contiguous(), x.new_empty(*x.shape[:-1], outputs)
    library.stocha_linear(
        DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), _pointer(bias), out.data_ptr(),
        _tokens(x), inputs, outputs, torch.get_num_threads(),
    )  # fmt: skip
    return out


def qkv(
    x: torch.Tensor,
    norm: torch.Tensor,
    projections: Sequence[Mapping[str, Any]],
    head_norms: Sequence[torch.Tensor | None],
    rotary: tuple[torch.Tensor, torch.Tensor],
    head_size: int,
    epsilon: float,
) -> list[torch.Tensor]:
    """Query, key, value [B, heads, 1, head_size] of x [B, 1, H]: RMSNorm, projections, head norms, rotary embedding.

    `projections` are q, k and v's parameters {"weight", "bias"}; `rotary` is (cosine, sine), [B or 1, 1, head_size].
    """
    batch, size = x.shape[0], x.shape[2]
    weights, biases = [p["weight"] for p in projections], [p["bias"] for p in projections]
    outs = [x.new_empty(batch, len(weight) // head_size, 1, head_size) for weight in weights]
    rotary = tuple(part.expand(batch, 1, head_size).to(x.dtype).contiguous() for part in rotary)  # type: ignore
    x = x.contiguous()
    kernels().stocha_qkv(  # type: ignore[union-attr]
        DTYPES[x.dtype], *map(_pointer, (x, norm, *weights, *biases, *head_norms, *rotary, *outs)),
        batch, size, outs[0].shape[1], outs[1].shape[1], head_size, epsilon, torch.get_num_threads(),
    )  # fmt: skip
    return outs


def layer(
    residual: torch.Tensor,
    attention: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    projection: Mapping[str, Any],
    norm: torch.Tensor,
    matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    activation: str,
    threshold: float,
    coarse: CoarseGate | None,
    scale: float,
    epsilon: float,
) -> torch.Tensor:
    """A decoder layer from its attention on, [B, 1, H]: o_proj(attention) + residual, then the FFN of its RMSNorm.

    `attention` is query [B, heads, 1, D], keys and values [B, key heads, S, D]; `projection` o_proj's parameters;
    `matrices` gate, up and the transposed down.
    """
    query, keys, values = attention
    keys, values = (part if part.stride()[2:] == (query.shape[3], 1) else part.contiguous() for part in (keys, values))
    residual, out = residual.contiguous(), torch.empty_like(residual, memory_format=torch.contiguous_format)
    tensors = (query, keys, values, projection["weight"], projection["bias"], norm, residual, *matrices, out)
    width, size = matrices[0].shape
    weights, scales, margin = _coarse(coarse, matrices[0])
    kernels().stocha_layer(  # type: ignore[union-attr]
        DTYPES[out.dtype], *map(_pointer, tensors), weights, scales, len(query), size, width, query.shape[1],
        keys.shape[1], keys.shape[2], query.shape[3], *keys.stride()[:2], *values.stride()[:2],
        ACTIVATIONS[activation], threshold, margin, scale, epsilon, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _tokens(x: torch.Tensor) -> int:
    count = x.numel() // x.shape[-1]
    if not 1 <= count <= TOKENS:
        raise ValueError(f"x has {count} tokens: expected 1 to {TOKENS}, a decode step's")
    return count


def _coarse(coarse: CoarseGate | None, gate: torch.Tensor) -> tuple[int | None, int | None, float]:
    if coarse is None or coarse.key != key_of(gate):
        return None, None, 0.0
    return coarse.weights.data_ptr(), coarse.scales.data_ptr(), coarse.margin


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_library = torch.library.Library("stocha", "DEF")
_library.define("ffn(Tensor x, Tensor gate, Tensor up, Tensor down_t, str activation, float threshold) -> Tensor")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("ffn", _ffn, "CPU")
_library.impl("ffn", _ffn_on_gpu, "CUDA")
_library.impl("linear", _linear, "CPU")


@torch.library.register_fake("stocha::ffn")
def _(x: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("stocha::linear")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
