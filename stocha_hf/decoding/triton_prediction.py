"""Prediction of active neurons in a GPU's decode step, for one token: 4 bits of a weight say who may be active.

The first kernel multiplies the 4-bit copy of the gate and lists the neurons that can be above the cut; the second one
computes their gates again from all bits, and up where they are active. A list's order does not matter, since each
neuron's value has a place of its own: the same input gives the same bits.

A number of 16 bits at column j of a row holds, from its lowest bits on, columns j, j + SIZE / 4, j + SIZE / 2 and
j + 3 * SIZE / 4, each as a number of steps plus 8: so what a thread reads of it and of x are columns of the same kind.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stocha_hf.decoding.triton_one_token import hidden_value
from stocha_hf.decoding.triton_products import product


@triton.jit
def list_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, codes_ptr, step_ptr, slack_ptr, hidden_ptr, list_ptr, count_ptr, cut, width,
    SIZE: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the neurons whose gate may be above the cut, int32 [width], count them, and let all hidden values be 0.

    step float32 [width] is what a code's unit is worth; slack float32 [width], times the length of the input, what a
    row's rounding may be worth.
    """
    if EARLY:
        gdc_launch_dependents()
    QUARTER: tl.constexpr = SIZE // 4
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < width
    column = tl.arange(0, BLOCK)
    codes_ptrs = codes_ptr + rows[:, None].to(tl.int64) * QUARTER + column[None, :]
    tile = tl.load(codes_ptrs, present[:, None] & (column < QUARTER)[None, :], 0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    total = tl.zeros([1, BLOCK], tl.float32)
    squares = tl.zeros([1, BLOCK], tl.float32)
    lengths = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, QUARTER, BLOCK):
        place = start + BLOCK
        mask = present[:, None] & (place + column < QUARTER)[None, :]
        following = tl.load(codes_ptrs + place, mask, 0, eviction_policy="evict_first")
        codes, k = tile.to(tl.int32), (start + column)[None, :]
        for quarter in tl.static_range(4):
            x = tl.load(x_ptr + quarter * QUARTER + k, k < QUARTER, 0.0).to(tl.float32)
            scaled = x * tl.load(norm_ptr + quarter * QUARTER + k, k < QUARTER, 0.0).to(tl.float32)
            squares += x * x
            lengths += scaled * scaled
            total += scaled
            sums += ((codes >> 4 * quarter) & 15).to(tl.float32) * scaled
        tile = following
    scale = tl.rsqrt(tl.sum(squares, 1) / SIZE + eps)
    about = (tl.sum(sums, 1) - 8 * tl.sum(total, 1)) * tl.load(step_ptr + rows, present, 0.0)
    about += tl.load(slack_ptr + rows, present, 0.0) * tl.sqrt(tl.sum(lengths, 1))
    listed = (present & ~(about * scale <= cut - tl.abs(cut) / 128)).to(tl.int32)  # NaN is listed
    tl.store(hidden_ptr + rows, tl.zeros([ROWS], hidden_ptr.dtype.element_ty), present)
    number = tl.sum(listed, 0)
    first = tl.atomic_add(count_ptr, number)
    tl.store(list_ptr + first + tl.cumsum(listed, 0) - 1, rows, listed > 0)


@triton.jit
def listed_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, gate_ptr, up_ptr, hidden_ptr, list_ptr, count_ptr, cut,
    ACTIVATION: tl.constexpr, SIZE: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The hidden values of the neurons listed, as hidden_kernel computes them; any number of programs."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    dtype = hidden_ptr.dtype.element_ty
    for place in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        rows = tl.load(list_ptr + place + tl.arange(0, 1))
        gate, squares = product(x_ptr, norm_ptr, gate_ptr, rows, rows >= 0, SIZE, 1, True, False, BLOCK)
        scale = tl.rsqrt(squares / SIZE + eps)
        gate = (gate * scale).to(dtype).to(tl.float32)
        if tl.max(tl.max((~(gate <= cut)).to(tl.int32), 1), 0) > 0:
            up, _ = product(x_ptr, norm_ptr, up_ptr, rows, rows >= 0, SIZE, 1, True, False, BLOCK)
            up = (up * scale).to(dtype).to(tl.float32)
            tl.store(hidden_ptr + rows[None, :], hidden_value(gate, up, cut, ACTIVATION, dtype))
