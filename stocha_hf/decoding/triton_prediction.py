"""Prediction of active neurons in a GPU's decode step, for one token: 4 bits of a weight say who may be active.

The first kernel multiplies the 4-bit copy of the gate and lists the neurons that can be above the cut; the second one
computes their gates again from all bits, and up where they are active. A list's order does not matter, since each
neuron's value has a place of its own: the same input gives the same bits.

A number of 32 bits at column j of a row holds, from its lowest bits on, columns j, j + SIZE / 8, and so on to
j + 7 * SIZE / 8, each as a number of steps plus 8: so what a thread reads of it and of x are columns of the same kind.
Multiply-adds of floats would take longer than reading here. So x, times the norm, is rounded to whole numbers of 16
bits, whose high and low bytes are multiplied by four codes at a time (dp4a). What the 8 adds is known, and is
subtracted at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stocha_hf.decoding.triton_one_token import hidden_value
from stocha_hf.decoding.triton_products import product

GREATEST = tl.constexpr(32512.0)  # what the greatest |x| becomes: 127 in the high byte, so that it keeps its sign
LAST_BITS = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 plus this has itself, rounded, as its last bits


@triton.jit
def byte_products(codes, x, sums, SIGNED: tl.constexpr, DP4A: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return sums + the four bytes of codes, without signs, times the four of x: all int32 [rows, columns]."""
    x = tl.broadcast_to(x, codes.shape)
    if DP4A:
        instruction: tl.constexpr = "dp4a.u32.s32" if SIGNED else "dp4a.u32.u32"
        text: tl.constexpr = instruction + " $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(text, "=r,r,r,r", [codes, x, sums], dtype=tl.int32, is_pure=True, pack=1)
    for byte in tl.static_range(4):
        part = (x >> (8 * byte)) & 255
        if SIGNED:
            part = tl.where(part > 127, part - 256, part)
        sums += ((codes >> (8 * byte)) & 255) * part
    return sums


@triton.jit
def list_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, codes_ptr, step_ptr, slack_ptr, hidden_ptr, list_ptr, count_ptr, cut, width,
    SIZE: tl.constexpr, EARLY: tl.constexpr, DP4A: tl.constexpr, TOTAL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """List the neurons whose gate may be above the cut, int32 [width], count them, and let all hidden values be 0.

    A program has TOTAL rows, ROWS at a time, BLOCK numbers of each: at least all. step float32 [width] is what a
    code's unit is worth; slack float32 [width], times the length of the input, what a row's rounding may be worth.
    """
    if EARLY:
        gdc_launch_dependents()
    EIGHTH: tl.constexpr = SIZE // 8
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    inside = k < EIGHTH
    first = tl.program_id(0) * TOTAL
    codes_ptrs = codes_ptr + row[:, None].to(tl.int64) * EIGHTH + k
    present = (first + row < width)[:, None] & inside
    tile = tl.load(codes_ptrs + first.to(tl.int64) * EIGHTH, present, 0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    squares = tl.zeros([1, BLOCK], tl.float32)
    lengths = tl.zeros([1, BLOCK], tl.float32)
    most = tl.zeros([1, BLOCK], tl.float32)
    for eighth in tl.static_range(8):
        x = tl.load(x_ptr + eighth * EIGHTH + k, inside, 0.0).to(tl.float32)
        scaled = x * tl.load(norm_ptr + eighth * EIGHTH + k, inside, 0.0).to(tl.float32)
        squares += x * x
        lengths += scaled * scaled
        most = tl.maximum(most, tl.abs(scaled))
    greatest = tl.max(tl.max(most, 1), 0)
    inverse = tl.where(greatest > 0, GREATEST / greatest, 0.0)
    unit = tl.where(greatest > 0, greatest / GREATEST, 0.0)
    scale = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / SIZE + eps)
    length = tl.sqrt(tl.sum(tl.sum(lengths, 1), 0))
    high_even = tl.zeros([1, BLOCK], tl.int32)  # bytes of the even eighths of x, and of the odd ones
    low_even = tl.zeros([1, BLOCK], tl.int32)
    high_odd = tl.zeros([1, BLOCK], tl.int32)
    low_odd = tl.zeros([1, BLOCK], tl.int32)
    high_sum = tl.zeros([1, BLOCK], tl.int32)
    low_sum = tl.zeros([1, BLOCK], tl.int32)
    for eighth in tl.static_range(8):
        x = tl.load(x_ptr + eighth * EIGHTH + k, inside, 0.0).to(tl.float32)
        scaled = x * tl.load(norm_ptr + eighth * EIGHTH + k, inside, 0.0).to(tl.float32)
        number = (scaled * inverse + LAST_BITS).to(tl.int32, bitcast=True)
        low, high = number & 255, (number >> 8) & 255
        low_sum += low
        high_sum += tl.where(high > 127, high - 256, high)
        if eighth % 2 == 0:
            low_even |= low << (4 * eighth)
            high_even |= high << (4 * eighth)
        else:
            low_odd |= low << (4 * eighth - 4)
            high_odd |= high << (4 * eighth - 4)
    known_high, known_low = 8 * tl.sum(tl.sum(high_sum, 1), 0), 8 * tl.sum(tl.sum(low_sum, 1), 0)
    slot = tl.arange(0, TOTAL)
    values = tl.zeros([TOTAL], tl.float32)
    for start in range(0, TOTAL, ROWS):
        place = first + start + ROWS
        present = ((start + ROWS < TOTAL) & (place + row < width))[:, None] & inside
        following = tl.load(codes_ptrs + place.to(tl.int64) * EIGHTH, present, 0, eviction_policy="evict_first")
        even, odd = tile & 0x0F0F0F0F, (tile >> 4) & 0x0F0F0F0F
        highs = byte_products(even, high_even, tl.zeros([ROWS, BLOCK], tl.int32), True, DP4A)
        highs = byte_products(odd, high_odd, highs, True, DP4A)
        lows = byte_products(even, low_even, tl.zeros([ROWS, BLOCK], tl.int32), False, DP4A)
        lows = byte_products(odd, low_odd, lows, False, DP4A)
        tile = following
        sums = (tl.sum(highs, 1) - known_high).to(tl.float32) * 256 + (tl.sum(lows, 1) - known_low).to(tl.float32)
        values += tl.sum(tl.where((start + row)[:, None] == slot[None, :], sums[:, None], 0.0), 0)
    rows = first + slot
    present = rows < width
    about = values * unit * tl.load(step_ptr + rows, present, 0.0)
    about += tl.load(slack_ptr + rows, present, 0.0) * length
    listed = (present & ~(about * scale <= cut - tl.abs(cut) / 128)).to(tl.int32)  # NaN is listed
    tl.store(hidden_ptr + rows, tl.zeros([TOTAL], hidden_ptr.dtype.element_ty), present)
    begin = tl.atomic_add(count_ptr, tl.sum(listed, 0))
    tl.store(list_ptr + begin + tl.cumsum(listed, 0) - 1, rows, listed > 0)


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
