"""Mixed bits: which matrices of a 4-bit folder get 8 bits, for a wanted mean of bits a weight.

Four more bits keep most in v_proj, and then in down_proj (docs/experiments/quantization.md). Of one name, matrices go
first whose weights lose the largest share of their norm in 4 bits. In this order, each gets 8 bits that still fits the
mean, which counts the projections and their scales: `--bits 4` is 4.5 with no matrix in 8 bits, and 4.62 with v_proj
(SmolLM2-135M).

    stocha-convert SOURCE OUTPUT --bits 5.5
"""

from __future__ import annotations

import math
from dataclasses import replace

from stocha_hf.checkpoints.tensors import LAYER, Tensors
from stocha_hf.errors import StochaError
from stocha_hf.progress import Progress
from stocha_hf.quantization import BITS, PROJECTIONS, Quantization
from stocha_hf.quantization_stocha import dequantize, quantize

FIRST = ("v_proj", "down_proj")  # what gets 8 bits before all others
EVERY = 8  # one row of so many is rounded to see what a matrix loses
SIZES = {"I8": 8, "U8": 8, "F16": 16, "I16": 16}  # bits of safetensors' dtypes


def with_mean_bits(tensors: Tensors, entry: Quantization, wanted: float) -> Quantization:
    """Return the entry with more matrices in 8 bits: a projection's weight has at most `wanted` bits on average.

    Raises StochaError where the entry has more already.
    """
    shapes = _projections(tensors)
    bits = {name: _bits(entry, name, *shape) for name, shape in shapes.items()}
    weights = sum(math.prod(shape) for shape in shapes.values())
    if sum(bits.values()) > wanted * weights:
        least = math.ceil(100 * sum(bits.values()) / weights) / 100
        names = [name for name in entry.in_8_bits if name.rpartition(".")[2] in PROJECTIONS]
        advice = f"a mean of at least {least:g}" if least < BITS[1] else "fewer names of projections in in_8_bits"
        raise StochaError(
            f"bits is {wanted:g}, but {' '.join(names) or 'no matrix'} in 8 bits and the other projections in 4 take "
            f"{least:g}: expected 4 or 8, or {advice}"
        )
    room, eight = wanted * weights - sum(bits.values()), replace(entry, bits=8)
    chosen = []
    for name in _in_order(tensors, entry, list(shapes)):
        more = _bits(eight, name, *shapes[name]) - bits[name]
        if more <= room:
            room -= more
            chosen.append(name[name.index("layers.") :])
    return replace(entry, in_8_bits=(*entry.in_8_bits, *sorted(chosen)))


def _projections(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """[outputs, inputs] of each layer's projections, by the module's name."""
    modules = {name.removesuffix(".weight"): shape for name, shape in tensors.shapes.items() if LAYER.search(name)}
    return {name: shape for name, shape in modules.items() if name.rpartition(".")[2] in PROJECTIONS}


def _bits(entry: Quantization, name: str, outputs: int, inputs: int) -> int:
    """Of all of a matrix, with its scales."""
    return sum(SIZES[dtype] * math.prod(shape) for dtype, shape in entry.tensors(name, outputs, inputs).values())


def _in_order(tensors: Tensors, entry: Quantization, names: list[str]) -> list[str]:
    """The matrices that have 4 bits: those of FIRST, then the others; within each, what loses most comes first."""
    four = [name for name in names if entry.bits_of(name) == 4]
    losses = {name: _loss(tensors, entry, name) for name in Progress(four, desc="Judging", unit="matrix")}
    ranks = {name: FIRST.index(last) if (last := name.rpartition(".")[2]) in FIRST else len(FIRST) for name in four}
    return sorted(four, key=lambda name: (ranks[name], -losses[name]))


def _loss(tensors: Tensors, entry: Quantization, name: str) -> float:
    """The share of its norm that rounding some rows of a matrix to 4 bits takes."""
    weight = tensors.read(f"{name}.weight").float()
    rows = (weight.t() if entry.is_transposed(name) else weight)[::EVERY].contiguous()
    rounded = dequantize(*quantize(rows, 4), 4, rows.shape[1])
    return float((rounded - rows).norm() / rows.norm().clamp(min=1e-30))
