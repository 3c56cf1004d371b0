"""Projections that cut their inputs: what the kernels are told of them, and their calls outside whole steps.

A cut saves reading where the matrix lies an input a row. A quantized folder stores it so; of floats a step makes a
copy (state.py). A centre other than 0 is computed in full: what is cut counts there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stocha_hf.decoding import ops
from stocha_hf.decoding.conditions import is_called, is_plain_inference, is_step
from stocha_hf.decoding.state import input_major, sole
from stocha_hf.decoding.structs import Matrix, is_cut, matrix, pointer

SMALLEST = 1e-40  # a threshold of what is cut already: less than any number but 0


def with_cut(found: Matrix, module: Any, dtype: torch.dtype) -> Matrix:
    """Return a matrix with the cut of a module, its numbers rounded as PyTorch rounds what x is compared with.

    Tokens' own factors, of this dtype, are read where they are: who keeps the matrix keeps them.
    """
    if is_cut(module):
        factors = token_factors(module)
        exact = dtype if factors is None else torch.float32
        found.threshold = torch.tensor(module.input_threshold, dtype=exact).item()
        found.centre = torch.tensor(module.input_centre, dtype=dtype).item()
        found.factors = pointer(factors)
    return found


def token_factors(module: Any) -> torch.Tensor | None:
    """Return the weights of its tokens' own factors of a module that cuts; None in folders' copies of before."""
    found = module.__dict__.get("factors", ())
    return found[0]._parameters[found[1]] if found else None


def skipping_zeros(found: Matrix, module: Any, x: torch.Tensor) -> Matrix:
    """Return a matrix that does not read what multiplies zeros, for an x that its module has cut."""
    if is_cut(module) and module.cuts(x):
        found.threshold = SMALLEST
    return found


def cut_linear(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Compute a Linear layer on an x [..., in_features] that it has cut where it cuts; None for the native path."""
    if (
        module.native_class is not nn.Linear
        or not x.is_cpu
        or torch.compiler.is_compiling()
        or not is_plain_inference(x)
    ):
        return None
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if type(weight) is not nn.Parameter or weight.dtype != x.dtype or not weight.is_cpu:
        return None
    if is_step(x) and module.cuts(x) and weight.is_contiguous() and not is_called(module) and ops.available():
        copy = input_major(module)
        if copy is not None:
            found = matrix(copy, bias, rows_are_inputs=True)
            return ops.run_linear(x, skipping_zeros(found, module, x))
    copy = sole(module.input_major, weight)
    if copy is None:
        return None
    return x @ copy if bias is None else x @ copy + bias
