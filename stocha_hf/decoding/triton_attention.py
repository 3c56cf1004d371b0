"""Attention of a decode step on a GPU, for 1 to 16 tokens: norms of heads, rotation, new rows of the cache, softmax.

A program owns a key head and a split of the tokens; the heads that share the key head are the rows of a tile, for one
new token after the other. The first split is the new tokens, whose keys and values it writes to the cache. The last
split to finish puts all together. Old tokens' first tile is asked for before the program waits for the projections
(EARLY).

    state   int64 [3 + TOKENS]: the first new token's position, tokens in the cache, the first of them that is no
            padding, and the new tokens
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
def _attend(  # type: ignore[no-untyped-def]
    a, b, key_a, key_b, value_a, value_b, visible, scale, best, total, sum_a, sum_b
):  # fmt: skip
    """Add a tile of tokens, where they are visible [rows, tile], to what each row has seen so far."""
    scores = tl.dot(a, tl.trans(key_a), input_precision="ieee")
    scores = tl.dot(b, tl.trans(key_b), scores, input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    highest = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # of a row that has seen nothing yet
    shares = tl.exp(scores - base[:, None])
    decay = tl.exp(best - base)
    weights = shares.to(value_a.dtype)
    sum_a = tl.dot(weights, value_a, sum_a * decay[:, None], input_precision="ieee")
    sum_b = tl.dot(weights, value_b, sum_b * decay[:, None], input_precision="ieee")
    return highest, total * decay + tl.sum(shares, 1), sum_a, sum_b


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, q_norm_ptr, k_norm_ptr, angle_ptr, state_ptr, table_ptr, max_ptr, sum_ptr, part_ptr, arrived_ptr, out_ptr,
    scale, eps, window,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, HEAD_NORM: tl.constexpr, EARLY: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The attention's result [TOKENS, HEADS, 2 * HALF] for qkv [TOKENS, HEADS + 2 * KEY_HEADS, 2 * HALF].

    COLUMNS is HALF, GROUP the heads of a key head times TOKENS, both rounded up to a power of two; LANES is GROUP, or
    what tensor cores take at least.
    """
    if EARLY:
        gdc_launch_dependents()
    dtype = qkv_ptr.dtype.element_ty
    DIM: tl.constexpr = 2 * HALF
    SHARED: tl.constexpr = HEADS // KEY_HEADS
    ALL: tl.constexpr = (HEADS + 2 * KEY_HEADS) * DIM
    NEW: tl.constexpr = 16  # what tensor cores take, at least
    head, split = tl.program_id(0), tl.program_id(1)
    column, old, lane = tl.arange(0, COLUMNS)[None, :], tl.arange(0, TILE)[:, None], tl.arange(0, LANES)[:, None]
    in_half, token = column < HALF, lane // SHARED
    length = tl.load(state_ptr + 1).to(tl.int32)
    start = tl.load(state_ptr + 2).to(tl.int32)
    seen = start + 0 * token  # from where on a row's token sees
    if window > 0:
        start = tl.maximum(start, length + 1 - window)
        seen = tl.maximum(seen, length + token + 1 - window)
    stride = tl.multiple_of(tl.load(table_ptr + 2), 8)
    keys = tl.multiple_of(tl.load(table_ptr).to(tl.pointer_type(dtype)), 16) + head * stride
    values = tl.multiple_of(tl.load(table_ptr + 1).to(tl.pointer_type(dtype)), 16) + head * stride
    share = tl.cdiv(length - start, SPLITS - 1)
    begin = tl.where(split == 0, length, start + (split - 1) * share)
    end = tl.minimum(begin + share, length)
    place, there = (begin + old) * DIM + column, (begin + old < end) & in_half
    key_a, key_b = tl.load(keys + place, there, 0.0), tl.load(keys + HALF + place, there, 0.0)
    value_a, value_b = tl.load(values + place, there, 0.0), tl.load(values + HALF + place, there, 0.0)
    if EARLY:
        gdc_wait()
    a, b = _rotated(
        qkv_ptr + token * ALL + (head * SHARED + lane % SHARED) * DIM, q_norm_ptr, angle_ptr + token * DIM, eps,
        column, (token < TOKENS) & in_half, HALF, HEAD_NORM,
    )  # fmt: skip
    best = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    sum_a = tl.zeros([LANES, COLUMNS], tl.float32)
    sum_b = tl.zeros([LANES, COLUMNS], tl.float32)
    if split == 0:
        new = tl.arange(0, NEW)[:, None]
        inside = (new < TOKENS) & in_half
        given = qkv_ptr + new * ALL + (HEADS + head) * DIM
        new_a, new_b = _rotated(given, k_norm_ptr, angle_ptr + new * DIM, eps, column, inside, HALF, HEAD_NORM)
        given += KEY_HEADS * DIM + column
        new_value_a, new_value_b = tl.load(given, inside, 0.0), tl.load(given + HALF, inside, 0.0)
        row = (length + new) * DIM + column
        tl.store(keys + row, new_a, inside)
        tl.store(keys + HALF + row, new_b, inside)
        tl.store(values + row, new_value_a, inside)
        tl.store(values + HALF + row, new_value_b, inside)
        visible = tl.trans(new) <= token
        best, total, sum_a, sum_b = _attend(
            a, b, new_a, new_b, new_value_a, new_value_b, visible, scale, best, total, sum_a, sum_b
        )
    for at in range(begin, end, TILE):
        visible = tl.trans(at + old < end) & (tl.trans(at + old) >= seen)
        best, total, sum_a, sum_b = _attend(
            a, b, key_a, key_b, value_a, value_b, visible, scale, best, total, sum_a, sum_b
        )
        place, there = (at + TILE + old) * DIM + column, (at + TILE + old < end) & in_half
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
        _combine(max_ptr, sum_ptr, part_ptr, out_ptr, head, TOKENS, HEADS, HALF, COLUMNS, GROUP, SHARED, SPLITS)
        tl.store(arrived_ptr + head, 0)  # for the next layer


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    max_ptr, sum_ptr, part_ptr, out_ptr, head,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    SHARED: tl.constexpr, SPLITS: tl.constexpr,
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
    out = row // SHARED * HEADS + head * SHARED + row % SHARED
    out_ptrs = out_ptr + out[:, None] * (2 * HALF) + column[None, :]
    mask = (row < TOKENS * SHARED)[:, None] & (column < HALF)[None, :]
    for half in tl.static_range(2):
        parts = tl.load(part + half * COLUMNS, cache_modifier=".cg") * factor[:, :, None]
        tl.store(out_ptrs + half * HALF, tl.sum(parts, 0).to(out_ptr.dtype.element_ty), mask)
