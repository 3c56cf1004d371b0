"""Attention of a decode step on a GPU, for one token: norms of heads, rotation, the cache's new row, softmax, values.

A program owns a key head and a split of the cache's tokens; the heads that share the key head are the rows of a tile.
The first split also takes the new token, whose key and value it writes to the cache. The last split to finish puts
all together. Old tokens' first tile is asked for before the program waits for the projections (EARLY).

    state   int64 [4]: the token, its position, tokens in the cache, the first of them that is no padding
    table   int64 [4], of a layer: the addresses of keys and values, [key heads, room, DIM] each, a head's stride, 0
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rotated(  # type: ignore[no-untyped-def]
    ptr, norm_ptr, angle_ptr, eps, column, inside,
    HALF: tl.constexpr, HEAD_NORM: tl.constexpr,
):  # fmt: skip
    """Rows of 2 * HALF numbers at ptr [rows, 1], normed and rotated, in halves; rounded as PyTorch rounds."""
    dtype = ptr.dtype.element_ty
    a = tl.load(ptr + column, inside, 0.0).to(tl.float32)
    b = tl.load(ptr + HALF + column, inside, 0.0).to(tl.float32)
    if HEAD_NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        weight_a = tl.load(norm_ptr + column, inside, 0.0).to(tl.float32)
        weight_b = tl.load(norm_ptr + HALF + column, inside, 0.0).to(tl.float32)
        a = ((a * scale).to(dtype).to(tl.float32) * weight_a).to(dtype).to(tl.float32)
        b = ((b * scale).to(dtype).to(tl.float32) * weight_b).to(dtype).to(tl.float32)
    cos = tl.load(angle_ptr + column, inside, 0.0).to(tl.float32)
    sin = tl.load(angle_ptr + HALF + column, inside, 0.0).to(tl.float32)
    first = (a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)
    second = (b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)
    return first.to(dtype), second.to(dtype)


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, q_norm_ptr, k_norm_ptr, angle_ptr, state_ptr, table_ptr, max_ptr, sum_ptr, part_ptr, arrived_ptr, out_ptr,
    scale, eps, window,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    LANES: tl.constexpr, HEAD_NORM: tl.constexpr, EARLY: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The attention's result [HEADS, 2 * HALF] for qkv [HEADS + 2 * KEY_HEADS, 2 * HALF].

    COLUMNS is HALF, GROUP the heads of a key head, both rounded up to a power of two; LANES the rows of a tile.
    """
    if EARLY:
        gdc_launch_dependents()
    dtype = qkv_ptr.dtype.element_ty
    DIM: tl.constexpr = 2 * HALF
    SHARED: tl.constexpr = HEADS // KEY_HEADS
    head, split = tl.program_id(0), tl.program_id(1)
    column, token, lane = tl.arange(0, COLUMNS)[None, :], tl.arange(0, TILE)[:, None], tl.arange(0, LANES)[:, None]
    in_half = column < HALF
    length = tl.load(state_ptr + 2).to(tl.int32)
    seen = tl.load(state_ptr + 3).to(tl.int32)
    if window > 0:
        seen = tl.maximum(seen, length + 1 - window)
    stride = tl.multiple_of(tl.load(table_ptr + 2), 8)
    keys = tl.multiple_of(tl.load(table_ptr).to(tl.pointer_type(dtype)), 16) + head * stride
    values = tl.multiple_of(tl.load(table_ptr + 1).to(tl.pointer_type(dtype)), 16) + head * stride
    share = tl.cdiv(length - seen, SPLITS)
    begin = seen + split * share
    end = tl.minimum(begin + share, length)
    place, there = (begin + token) * DIM + column, (begin + token < end) & in_half
    key_a, key_b = tl.load(keys + place, there, 0.0), tl.load(keys + HALF + place, there, 0.0)
    value_a, value_b = tl.load(values + place, there, 0.0), tl.load(values + HALF + place, there, 0.0)
    if EARLY:
        gdc_wait()
    query = qkv_ptr + (head * SHARED + lane) * DIM
    a, b = _rotated(query, q_norm_ptr, angle_ptr, eps, column, (lane < SHARED) & in_half, HALF, HEAD_NORM)
    best = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    sum_a = tl.zeros([LANES, COLUMNS], tl.float32)
    sum_b = tl.zeros([LANES, COLUMNS], tl.float32)
    if split == 0:
        one = tl.arange(0, 1)[:, None]
        new_a, new_b = _rotated(
            qkv_ptr + (HEADS + head + one) * DIM, k_norm_ptr, angle_ptr, eps, column, in_half, HALF, HEAD_NORM
        )
        value = qkv_ptr + (HEADS + KEY_HEADS + head) * DIM + column
        new_value_a, new_value_b = tl.load(value, in_half, 0.0), tl.load(value + HALF, in_half, 0.0)
        at = length * DIM + column
        tl.store(keys + at, new_a, in_half)
        tl.store(keys + HALF + at, new_b, in_half)
        tl.store(values + at, new_value_a, in_half)
        tl.store(values + HALF + at, new_value_b, in_half)
        best = tl.sum(a.to(tl.float32) * new_a.to(tl.float32), 1) + tl.sum(b.to(tl.float32) * new_b.to(tl.float32), 1)
        best *= scale
        total += 1.0
        sum_a += new_value_a.to(tl.float32)
        sum_b += new_value_b.to(tl.float32)
    for start in range(begin, end, TILE):
        scores = tl.dot(a, tl.trans(key_a), input_precision="ieee")
        scores = tl.dot(b, tl.trans(key_b), scores, input_precision="ieee") * scale
        scores = tl.where(tl.trans(start + token < end), scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp(scores - highest[:, None])
        decay = tl.exp(best - highest)
        total = total * decay + tl.sum(shares, 1)
        best = highest
        weights = shares.to(dtype)
        sum_a = tl.dot(weights, value_a, sum_a * decay[:, None], input_precision="ieee")
        sum_b = tl.dot(weights, value_b, sum_b * decay[:, None], input_precision="ieee")
        place, there = (start + TILE + token) * DIM + column, (start + TILE + token < end) & in_half
        key_a, key_b = tl.load(keys + place, there, 0.0), tl.load(keys + HALF + place, there, 0.0)
        value_a, value_b = tl.load(values + place, there, 0.0), tl.load(values + HALF + place, there, 0.0)
    first = (head * SPLITS + split) * GROUP
    lanes = tl.arange(0, LANES)
    tl.store(max_ptr + first + lanes, best, lanes < GROUP)
    tl.store(sum_ptr + first + lanes, total, lanes < GROUP)
    part = part_ptr + (first + lane) * (2 * COLUMNS) + column
    tl.store(part, sum_a, lane < GROUP)
    tl.store(part + COLUMNS, sum_b, lane < GROUP)
    tl.debug_barrier()  # all threads' parts are stored before the program counts as done
    if tl.atomic_add(arrived_ptr + head, 1) == SPLITS - 1:
        _combine(max_ptr, sum_ptr, part_ptr, out_ptr, head, HALF, COLUMNS, GROUP, SHARED, SPLITS)
        tl.store(arrived_ptr + head, 0)  # for the next layer


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    max_ptr, sum_ptr, part_ptr, out_ptr, head,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write a key head's rows of the result, from what its splits found."""
    split, row = tl.arange(0, SPLITS)[:, None], tl.arange(0, GROUP)
    place = (head * SPLITS + split) * GROUP + row[None, :]
    best = tl.load(max_ptr + place, cache_modifier=".cg")
    factor = tl.exp(best - tl.max(best, 0)[None, :])
    total = tl.sum(tl.load(sum_ptr + place, cache_modifier=".cg") * factor, 0)
    factor /= total[None, :]
    column = tl.arange(0, COLUMNS)
    part = part_ptr + place[:, :, None] * (2 * COLUMNS) + column[None, None, :]
    out = out_ptr + (head * SHARED + row[:, None]) * (2 * HALF) + column[None, :]
    mask = (row < SHARED)[:, None] & (column < HALF)[None, :]
    for half in tl.static_range(2):
        parts = tl.load(part + half * COLUMNS, cache_modifier=".cg") * factor[:, :, None]
        tl.store(out + half * HALF, tl.sum(parts, 0).to(out_ptr.dtype.element_ty), mask)
