"""Quantized modules by the kernels: a Linear layer in a step of few tokens, and rows as floats for more of them."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from stocha_hf.decoding import ops
from stocha_hf.decoding.build import kernels
from stocha_hf.decoding.conditions import is_step
from stocha_hf.decoding.cuts import skipping_zeros
from stocha_hf.decoding.structs import DTYPES, is_quantized, matrix_of


def linear(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Compute a quantized Linear layer on x [..., in_features]; None where PyTorch is to compute it."""
    bias = module._parameters.get("bias")
    plain = is_quantized(module) and (bias is None or bias.dtype == x.dtype)
    if not plain or not x.is_cpu or not is_step(x) or not ops.available():
        return None
    return ops.run_linear(x, skipping_zeros(matrix_of(module), module, x))


def dequantize(module: Any, first: int, last: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Return rows `first` to `last` - 1 of a quantized matrix, [last - first, columns]; None on other devices."""
    library = kernels() if is_quantized(module) and module.codes.is_cpu and dtype in DTYPES else None
    if library is None:
        return None
    out = torch.empty(last - first, module.columns, dtype=dtype)
    library.stocha_dequantize(
        ctypes.byref(matrix_of(module)), first, last, module.columns, DTYPES[dtype], out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
