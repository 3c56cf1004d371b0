"""Matrices of random weights in 8 and 4 bits, packed as the kernels read them, and what they stand for in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stocha_hf.decoding.structs import QUANTIZED, Matrix, pointer

GROUP = 32


@dataclass
class Packed:
    """`exact` is float64 [rows, columns]; the columns of the codes are padded to whole groups."""

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    bits: int
    exact: torch.Tensor

    def matrix(
        self, bias: torch.Tensor | None = None, rows_are_inputs: bool = False, threshold: float = 0.0
    ) -> Matrix:
        pointers = map(pointer, (self.codes, self.scale, self.minimum, bias))
        return Matrix(*pointers, *self.exact.shape, QUANTIZED[self.bits], rows_are_inputs, threshold)


def packed(rows: int, columns: int, bits: int, has_minimum: bool = False) -> Packed:
    """Random codes and scales, of weights about columns ** -0.5 in size."""
    groups = -(-columns // GROUP)
    size = columns**-0.5
    if bits == 8:
        codes = torch.randint(-127, 128, (rows, groups, GROUP), dtype=torch.int8)
        scale, zero = size / 64, 0
    else:
        codes = torch.randint(16, (rows, groups, GROUP), dtype=torch.uint8)
        scale, zero = size / 4, 0 if has_minimum else 8
    codes.view(rows, -1)[:, columns:] = zero
    scales = (scale * (0.5 + torch.rand(rows, groups))).half()
    minimum = -8 * scales if has_minimum else None
    exact = (codes.double() - zero) * scales.double().unsqueeze(2)
    if minimum is not None:
        exact += minimum.double().unsqueeze(2)
    if bits == 4:
        codes = codes[:, :, : GROUP // 2] | codes[:, :, GROUP // 2 :] << 4
    return Packed(codes.flatten(1).contiguous(), scales, minimum, bits, exact.flatten(1)[:, :columns])
