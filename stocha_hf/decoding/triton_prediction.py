"""Prediction of active neurons in a GPU's decode step, for one token: 4 bits of a weight say who may be active.

The first kernel multiplies the 4-bit copy of the gate and lists the neurons that can be above the cut; the second one
computes their gates again from all bits, and up where they are active. A list's order does not matter, since each
neuron's value has a place of its own: the same input gives the same bits.

A number of 32 bits at column j of a row holds, from its lowest bits on, columns j, j + SIZE / 8, and so on to
j + 7 * SIZE / 8, each as a number of steps plus 8: so what a thread reads of it and of x are columns of the same kind.
Multiply-adds take longer than reading here, so a code c is not converted: its bits become the first of the fraction of
a float32, 1 + c / 16. Two more codes are where they are, as 1 + c / 256 and 1 + c / 4096, and x is multiplied by
16, 256 or 4096 instead. What the ones and the 8 add is known, and is subtracted at the end.
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
    EIGHTH: tl.constexpr = SIZE // 8
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < width
    column = tl.arange(0, BLOCK)
    codes_ptrs = codes_ptr + rows[:, None].to(tl.int64) * EIGHTH + column[None, :]
    tile = tl.load(codes_ptrs, present[:, None] & (column < EIGHTH)[None, :], 0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    known = tl.zeros([1, BLOCK], tl.float32)
    squares = tl.zeros([1, BLOCK], tl.float32)
    lengths = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, EIGHTH, BLOCK):
        place = start + BLOCK
        mask = present[:, None] & (place + column < EIGHTH)[None, :]
        following = tl.load(codes_ptrs + place, mask, 0, eviction_policy="evict_first")
        k = (start + column)[None, :]
        for eighth in tl.static_range(8):
            x = tl.load(x_ptr + eighth * EIGHTH + k, k < EIGHTH, 0.0).to(tl.float32)
            scaled = x * tl.load(norm_ptr + eighth * EIGHTH + k, k < EIGHTH, 0.0).to(tl.float32)
            squares += x * x
            lengths += scaled * scaled
            if eighth < 3:
                moved = tile << 11  # three shifts serve eight codes
            elif eighth < 6:
                moved = tile >> 1
            else:
                moved = tile >> 9
            if eighth == 2 or eighth == 5 or eighth == 7:
                bits, unit = moved & 0x00780000, scaled * 16
            elif eighth == 1 or eighth == 4 or eighth == 6:
                bits, unit = moved & 0x00078000, scaled * 256
            else:
                bits, unit = moved & 0x00007800, scaled * 4096
            known += unit + 8 * scaled
            sums += (bits | 0x3F800000).to(tl.float32, bitcast=True) * unit
        tile = following
    scale = tl.rsqrt(tl.sum(squares, 1) / SIZE + eps)
    about = (tl.sum(sums, 1) - tl.sum(known, 1)) * tl.load(step_ptr + rows, present, 0.0)
    about += tl.load(slack_ptr + rows, present, 0.0) * tl.sqrt(tl.sum(lengths, 1))
    listed = (present & ~(about * scale <= cut - tl.abs(cut) / 128)).to(tl.int32)  # NaN is listed
    tl.store(hidden_ptr + rows, tl.zeros([ROWS], hidden_ptr.dtype.element_ty), present)
    number = tl.sum(listed, 0)
    first = tl.atomic_add(count_ptr, number)
    tl.store(list_ptr + first + tl.cumsum(listed, 0) - 1, rows, listed > 0)


@triton.jit
def listed_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, gate_ptr, up_ptr, hidden_ptr, list_ptr, count_ptr, cut,
    ACTIVATION: tl.constexpr, SIZE: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Hidden values of the neurons listed, ROWS at a time, as hidden_kernel computes them; any number of programs."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    dtype = hidden_ptr.dtype.element_ty
    count = tl.load(count_ptr)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        ranks = first + tl.arange(0, ROWS)
        listed = ranks < count
        rows = tl.load(list_ptr + ranks, listed, 0)
        gate, squares = product(x_ptr, norm_ptr, gate_ptr, rows, listed, SIZE, 1, True, False, BLOCK)
        scale = tl.rsqrt(squares / SIZE + eps)
        gate = (gate * scale).to(dtype).to(tl.float32)
        active = listed[None, :] & ~(gate <= cut)
        needed = tl.max(active.to(tl.int32), 0) > 0
        if tl.max(needed.to(tl.int32), 0) > 0:
            up, _ = product(x_ptr, norm_ptr, up_ptr, rows, needed, SIZE, 1, True, False, BLOCK)
            up = (up * scale).to(dtype).to(tl.float32)
            tl.store(hidden_ptr + rows[None, :], hidden_value(gate, up, cut, ACTIVATION, dtype), active)
