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
    bits: int
    exact: torch.Tensor

    def matrix(self, bias: torch.Tensor | None = None) -> Matrix:
        pointers = map(pointer, (self.codes, self.scale, bias))
        return Matrix(*pointers, *self.exact.shape, QUANTIZED[self.bits])


def packed(rows: int, columns: int, bits: int) -> Packed:
    """Random codes and scales, of weights about columns ** -0.5 in size."""
    groups = -(-columns // GROUP)
    sizes = columns**-0.5 * (0.5 + torch.rand(rows, groups))
    if bits == 8:
        codes = torch.randint(-127, 128, (rows, groups, GROUP), dtype=torch.int8)
        scale = (sizes / 64).half()
        exact = codes.double() * scale.double().unsqueeze(2)
    else:
        codes = torch.randint(16, (rows, groups, GROUP), dtype=torch.uint8)
        mantissa, exponent = torch.frexp(sizes / 4)  # the mantissa from 0.5 on
        sixteenths, zero = (32 * mantissa).long().clamp(16, 31), torch.randint(128, (rows, groups))
        scale = ((exponent + 23) << 11 | (sixteenths - 16) << 7 | zero).to(torch.int16)
        steps = sixteenths.double() / 16 * torch.exp2(exponent.double() - 1)
        exact = (codes.double() - zero.unsqueeze(2) / 8) * steps.unsqueeze(2)
        codes = codes[:, :, : GROUP // 2] | codes[:, :, GROUP // 2 :] << 4
    return Packed(codes.flatten(1).contiguous(), scale, bits, exact.flatten(1)[:, :columns])
