"""The structures that kernels take, as cpp/ declares them, and the matrices of modules in that form.

A structure holds addresses. Whoever keeps one keeps the tensors as well.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
QUANTIZED = {8: 3, 4: 4}  # bits: format
IN_PLANES = 5
ALL, GREATEST, ABOUT = range(3)  # logits that a step is to give; see cpp/head.h
KERNEL_ACTIVATIONS = {
    name: number
    for number, name in enumerate(
        ("relu", "fatrelu", "relu2", "drelu", "shifted_relu", "silu", "gelu_pytorch_tanh"),
    )
}

_POINTER, _SIZE, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Matrix(ctypes.Structure):
    """Weights [rows, columns] in one of the formats; see cpp/matrix.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("weights", "scales", "bias")),
        *((name, _SIZE) for name in ("rows", "columns", "format", "rows_are_inputs")),
        *((name, _REAL) for name in ("threshold", "centre")),
        ("factors", _POINTER),
    ]

    @property
    def outputs(self) -> int:
        return self.columns if self.rows_are_inputs else self.rows


class GateCopy(ctypes.Structure):
    """A small copy of a gate, or none; see cpp/prediction.h."""

    _fields_ = [(name, _POINTER) for name in ("codes", "scales", "slack")]


class Ffn(ctypes.Structure):
    """A gated FFN; see cpp/ffn.h."""

    _fields_ = [
        *((name, Matrix) for name in ("gate", "up", "down")),
        ("copy", GateCopy),
        ("activation", _SIZE),
        ("threshold", _REAL),
    ]


class Cached(ctypes.Structure):
    """Keys or values of a layer; see cpp/attention.h."""

    _fields_ = [("data", _POINTER), ("sequence_stride", _SIZE), ("head_stride", _SIZE)]


class Layer(ctypes.Structure):
    """A decoder layer; see cpp/step.h."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "o")),
        ("ffn", Ffn),
        *((f"{name}_norm", _POINTER) for name in ("input", "attention", "ffn_input", "ffn", "q", "k")),
        ("frequencies", _POINTER),
        *((name, _REAL) for name in ("rotary_scale", "attention_scale", "soft_cap")),
        ("window", _SIZE),
        ("keys", Cached),
        ("values", Cached),
        ("length", _SIZE),
    ]


class Model(ctypes.Structure):
    """All of a model; see cpp/step.h."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("count", _SIZE),
        ("embedding", Matrix),
        ("head", Matrix),
        ("norm", _POINTER),
        *((name, _SIZE) for name in ("type", "size", "heads", "key_heads", "head_size", "norms_from_one")),
        *((name, _REAL) for name in ("epsilon", "embedding_factor", "soft_cap")),
    ]


class Call(ctypes.Structure):
    """The tokens of a step; see cpp/step.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("ids", "positions", "starts")),
        *((name, _SIZE) for name in ("sequences", "tokens", "kept")),
        ("logits", _POINTER),
        ("cuts", _SIZE),
        ("listed", _POINTER),
        ("listed_count", _SIZE),
        ("wanted", _SIZE),
        ("sums", _POINTER),
        ("limit", _REAL),
    ]


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a tensor's first entry, None of None."""
    return None if tensor is None else tensor.data_ptr()


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module has weights in 8 or 4 bits, in the format that kernels read.

    By an attribute: each quantized folder has a copy of quantization_stocha.py, and so of the class.
    """
    return getattr(module, "quantized_format", None) in (1, 2)


def is_cut(module: Any) -> bool:
    """Return whether a module cuts its input, by an attribute: each folder's modeling file has classes of its own."""
    return "input_threshold" in module.__dict__


def matrix(weight: torch.Tensor, bias: torch.Tensor | None = None, rows_are_inputs: bool = False) -> Matrix:
    """Return a float matrix [rows, columns], contiguous."""
    return Matrix(weight.data_ptr(), None, pointer(bias), *weight.shape, DTYPES[weight.dtype], rows_are_inputs)


def matrix_of(module: Any) -> Matrix:
    """Return the matrix of a Linear layer or embedding, of floats or quantized, its rows as they lie in memory."""
    bias = module._parameters.get("bias")
    if not is_quantized(module):
        return matrix(module._parameters["weight"], bias)
    kind = IN_PLANES if module.quantized_format == 2 else QUANTIZED[module.bits]
    tensors = (module.codes, module.scale, bias)
    return Matrix(*map(pointer, tensors), len(module.scale), module.columns, kind, module.transposed)
