"""Both layouts of projections that cut their inputs: in lossless decoding one is for drafts, one for verifications.

A step with cuts reads the inputs that are left, which a matrix gives that has a row an input. A verification reads all
of them for several tokens, and is fastest where a row is an output. A folder has one of these. So copies of its large
matrices that are quantized, a row an output, are made a row an input: steps with cuts read the copies, other steps the
folder's own. A copy is rounded once more, along the outputs. That moves what is drafted, and no text.

Copies take as much memory as the matrices, so they are made when asked for.

    keep_both_layouts(model)
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from stocha_hf.decoding.build import kernels
from stocha_hf.decoding.memory import use_large_pages
from stocha_hf.decoding.state import key_of
from stocha_hf.decoding.structs import Matrix, is_cut, is_quantized, matrix_of, pointer
from stocha_hf.errors import StochaError
from stocha_hf.quantization import GROUP, LARGE

BITS = 4


class InputRows:
    """The copy of a quantized matrix, a row an input. Copies and pickles of a model do not take it along."""

    def __init__(self, module: Any, library: Any) -> None:
        self.columns, self.key = len(module.scale), key_of(module.codes)
        groups = -(-self.columns // GROUP)
        self.codes = torch.empty(module.columns, groups * GROUP // 2, dtype=torch.uint8)
        self.scale = torch.empty(module.columns, groups, dtype=torch.int16)
        own = matrix_of(module)
        library.stocha_turn(ctypes.byref(own), ctypes.byref(self.like(own)), torch.get_num_threads())
        for part in (self.codes, self.scale):
            use_large_pages(part)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.codes.nbytes + self.scale.nbytes

    def like(self, own: Matrix) -> Matrix:
        """Return it as the kernels take it, with the bias and cuts of the module's own matrix."""
        found = Matrix.from_buffer_copy(own)
        found.weights, found.scales = pointer(self.codes), pointer(self.scale)
        found.rows, found.columns, found.rows_are_inputs = len(self.scale), self.columns, 1
        return found


def input_rows(module: Any) -> InputRows | None:
    """Return the copy of a projection's matrix; None where there is none of its codes as they are."""
    copy = module.__dict__.get("input_major")
    return copy if isinstance(copy, InputRows) and copy.key == key_of(module.codes) else None


def keep_both_layouts(model: Any) -> int:
    """Give large quantized projections that cut their inputs a copy that steps with cuts read, a row an input.

    On a CPU, for `lossless`. A copy is not part of the state dict, is ignored once the weights change, and is dropped
    by `model.train()`.

    Args:
        model: A converted model in 4 bits, with cuts in projections whose rows are outputs.

    Returns:
        The number of copies.

    Raises:
        StochaError: For a model without such a projection, or on another device.
    """
    cut = [module for module in model.modules() if is_cut(module)]
    found = [module for module in cut if _takes(module)]
    large = [module for module in found if module.codes.nbytes >= LARGE]
    if not large:
        raise StochaError(
            f"the model has {len(cut)} projections that cut their inputs, of which {len(found)} have 4 bits and a "
            f"row an output and {len(large)} of these have {LARGE} bytes or more: expected some, as "
            "`stocha-convert --bits 4 --rows outputs` writes them"
        )
    if large[0].codes.device.type != "cpu":
        raise StochaError(
            f"the model is on {large[0].codes.device}: expected the CPU, whose kernels read both layouts"
        )
    library = kernels()
    if library is None:
        raise StochaError("the kernels cannot be built: expected a C++ compiler, since only they read both layouts")
    with torch.inference_mode(False), torch.no_grad():
        for module in large:
            module.input_major = InputRows(module, library)
    return len(large)


def _takes(module: Any) -> bool:
    quantized = is_quantized(module) and module.bits == BITS
    return quantized and not module.transposed and not module.input_centre
