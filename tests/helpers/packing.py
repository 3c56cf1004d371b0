"""Matrices of random weights in 8 and 4 bits, packed as the kernels read them, and what they stand for in float64;
and the kernels' variants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stocha_hf.decoding.structs import IN_PLANES, QUANTIZED, Matrix, pointer
from stocha_hf.quantization_stocha import split

GROUP = 32
# Layouts of other processors on this one: sixteen lanes and four, in plain C++; and this one's older instructions, by
# what /proc/cpuinfo calls those that a variant leaves out.
OTHERS = {
    "16 lanes": ("-DSTOCHA_LANES=16",),
    "4 lanes": ("-DSTOCHA_LANES=4",),
    "avx512_vnni": ("-mno-avx512vnni",),
    "avx512f": ("-mno-avx512f",),  # with AVX-VNNI, where the processor has that
    "avx_vnni": ("-mno-avx512f", "-mno-avxvnni"),
}


def variants() -> list[Any]:
    """The compiler's further flags for each variant of the kernels that this processor can run.

    -Og compiles in half of -O1's time, where GCC takes vectors wider than the machine's apart.
    """
    info = Path("/proc/cpuinfo")
    has = set(info.read_text().split()) if info.exists() else set()
    return [
        pytest.param((), id="native"),
        *(
            pytest.param(("-Og", *flags), id=name if "lanes" in name else f"no {name}", marks=pytest.mark.slow)
            for name, flags in OTHERS.items()
            if "lanes" in name or name in has
        ),
    ]


VARIANTS = variants()


@dataclass
class Packed:
    """`exact` is float64 [rows, columns]; the columns of the codes are padded to whole groups."""

    codes: torch.Tensor
    scale: torch.Tensor
    bits: int
    exact: torch.Tensor

    def matrix(
        self, bias: torch.Tensor | None = None, rows_are_inputs: bool = False, threshold: float = 0.0
    ) -> Matrix:
        pointers = map(pointer, (self.codes, self.scale, bias))
        kind = IN_PLANES if self.codes.dim() == 3 else QUANTIZED[self.bits]
        return Matrix(*pointers, *self.exact.shape, kind, rows_are_inputs, threshold)

    def in_planes(self) -> Packed:
        """The same of 8 bits, in two planes."""
        return replace(self, codes=split(self.codes))


def packed(rows: int, columns: int, bits: int | str) -> Packed:
    """Random codes and scales, of weights about columns ** -0.5 in size; "planes" are of 8 bits."""
    if bits == "planes":
        return packed(rows, columns, 8).in_planes()
    assert isinstance(bits, int)
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
