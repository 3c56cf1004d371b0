"""Prediction of active neurons in a GPU's decode step, for one token: 4 bits of a weight say who may be active.

The first kernel multiplies the 4-bit copy of the gate and lists the neurons that can be above the cut; the second one
computes their gates again from all bits, and up where they are active. A list's order does not matter, since each
neuron's value has a place of its own: the same input gives the same bits.

A number of 32 bits at column j of a row holds, from its lowest bits on, columns j, j + SIZE / 8, and so on to
j + 7 * SIZE / 8, each as a number of steps plus 8: so what a thread reads of it and of x are columns of the same kind.
Multiply-adds take longer than reading here, so a code c is not converted: its bits, where they are, are those of a
float32 without exponent, c * 2^(4 place - 149), and x is multiplied by 2^(100 - 4 place) instead. The last three codes
would reach into the exponent, and are moved. What the 8 adds is subtracted at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stocha_hf.decoding.triton_one_token import hidden_value
from stocha_hf.decoding.triton_products import product


@triton.jit
def _times_2_to_minus_49(words, x, EIGHTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes number EIGHTH of the words times x times 2^-49."""
    PLACE: tl.constexpr = 4 * EIGHTH if EIGHTH < 5 else 4 * EIGHTH - 12
    codes = (words if EIGHTH < 5 else words >> 12) & (15 << PLACE)
    return codes.to(tl.float32, bitcast=True) * (x * 2.0 ** (100 - PLACE))


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
    total = tl.zeros([1, BLOCK], tl.float32)
    squares = tl.zeros([1, BLOCK], tl.float32)
    lengths = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, EIGHTH, BLOCK):
        ahead = start + BLOCK
        mask = present[:, None] & (ahead + column < EIGHTH)[None, :]
        following = tl.load(codes_ptrs + ahead, mask, 0, eviction_policy="evict_first")
        k = (start + column)[None, :]
        for eighth in tl.static_range(8):
            x = tl.load(x_ptr + eighth * EIGHTH + k, k < EIGHTH, 0.0).to(tl.float32)
            scaled = x * tl.load(norm_ptr + eighth * EIGHTH + k, k < EIGHTH, 0.0).to(tl.float32)
            squares += x * x
            lengths += scaled * scaled
            total += scaled
            sums += _times_2_to_minus_49(tile, scaled, eighth)
        tile = following
    scale = tl.rsqrt(tl.sum(squares, 1) / SIZE + eps)
    about = (tl.sum(sums, 1) * 2.0**49 - 8 * tl.sum(total, 1)) * tl.load(step_ptr + rows, present, 0.0)
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
