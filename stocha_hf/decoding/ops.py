"""The kernels as functions of tensors, and the FFN and Linear kernels as torch operators, for 1 to 8 tokens.

`torch.ops.stocha.ffn` and `torch.ops.stocha.linear` have fake implementations, so that torch.compile keeps them as
they are. In eager mode the kernels are called without torch's dispatcher, which takes longer than a small layer does.
All tensors are of one dtype, bfloat16, float16 or float32, and on the CPU; for the FFN also on a GPU (triton_ffn.py).
Where the kernels cannot be built, the operators are PyTorch's dense operations.

    ffn(x, gate, up, down_t, "fatrelu", 0.1)   # = W_down(act(W_gate x) * (W_up x)), reading active neurons only
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from stocha_hf.decoding import triton_ffn
from stocha_hf.decoding.build import kernels
from stocha_hf.decoding.gate_prediction import CoarseGate
from stocha_hf.decoding.state import key_of
from stocha_hf.decoding.structs import DTYPES, KERNEL_ACTIVATIONS, Ffn, GateCopy, Matrix, matrix
from stocha_hf.decoding.thin_gate import ThinGate

MOST_TOKENS = 8  # at most
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
    coarse: CoarseGate | ThinGate | None = None,
) -> torch.Tensor:
    """A gated FFN on x [..., H]; gate, up and the transposed down are contiguous, [M, H]; `coarse` is a copy of gate.

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
    coarse: CoarseGate | ThinGate | None = None,
) -> torch.Tensor:
    library = kernels()
    if library is None:
        return _dense(x, gate, up, down_t, activation, threshold)
    weights = Ffn(
        matrix(gate), matrix(up), matrix(down_t, rows_are_inputs=True),
        GateCopy() if coarse is None or coarse.key != key_of(gate) else coarse.structure(),
        KERNEL_ACTIVATIONS[activation], threshold,
    )  # fmt: skip
    return run_ffn(x, weights)


def run_ffn(x: torch.Tensor, weights: Ffn) -> torch.Tensor:
    """x [..., H], 1 to 8 tokens on a CPU, through a gated FFN."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels().stocha_ffn(  # type: ignore[union-attr]
        ctypes.byref(weights), DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), _tokens(x), torch.get_num_threads()
    )
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
    return run_linear(x, matrix(weight, bias))


def run_linear(x: torch.Tensor, weights: Matrix) -> torch.Tensor:
    """x [..., inputs], 1 to 8 tokens on a CPU, times a matrix: [..., outputs]."""
    x, out = x.contiguous(), x.new_empty(*x.shape[:-1], weights.outputs)
    kernels().stocha_linear(  # type: ignore[union-attr]
        ctypes.byref(weights), DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), _tokens(x), torch.get_num_threads()
    )
    return out


def _tokens(x: torch.Tensor) -> int:
    count = x.numel() // x.shape[-1]
    if not 1 <= count <= MOST_TOKENS:
        raise ValueError(f"x has {count} tokens: expected 1 to {MOST_TOKENS}, a decode step's")
    return count


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
