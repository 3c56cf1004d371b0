"""The products of a whole decode step on a GPU: a row of a matrix is read once, by a few warps.

For 1 or 2 tokens by multiply-adds (`product`): a program owns ROWS rows and goes through them BLOCK columns at a time;
the next tile is asked for before this one is used. The first tile is asked for before the program waits for the kernel
before it (EARLY: from Hopper on a kernel's programs may start while that one ends). The RMS norm before a product is a
factor of its result: x times the norm's weight is multiplied, squares of x are summed beside it. Sums are in float32;
what PyTorch would write is rounded to the weights' type.

For 3 to 16 tokens by tensor cores (`dots`), as multiply-adds would take longer than reading. They take 8 tokens or
16, so that some of their lanes are empty. x times the norm's weight is rounded to the weights' type there, as
PyTorch rounds it. The head and the FFN's first products of so many tokens are in triton_several.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stocha_hf.decoding.triton_one_token import hidden_value


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, rows, taken,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, WAIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The taken rows of w [., SIZE] times x [TOKENS, SIZE], or times x * norm: float32 [TOKENS, rows]; and the sum of
    each token's x * x, float32 [TOKENS, 1].

    With WAIT, x is there once the kernel before is through; w is there before.
    """
    EVEN: tl.constexpr = SIZE % BLOCK == 0
    column = tl.arange(0, BLOCK)[None, None, :]
    taken = taken[None, :, None]
    x_ptrs = x_ptr + tl.arange(0, TOKENS)[:, None, None] * SIZE
    w_ptrs = w_ptr + rows[None, :, None].to(tl.int64) * SIZE + column
    tile = tl.load(w_ptrs, taken if EVEN else taken & (column < SIZE), 0.0, eviction_policy="evict_first")
    if WAIT:
        gdc_wait()
    sums = tl.zeros([TOKENS, rows.shape[0], BLOCK], tl.float32)
    squares = tl.zeros([TOKENS, 1, BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        place = start + BLOCK
        mask = taken & (place < SIZE) if EVEN else taken & (place + column < SIZE)
        following = tl.load(w_ptrs + place, mask, 0.0, eviction_policy="evict_first")
        k = start + column
        inside = None if EVEN else k < SIZE
        x = tl.load(x_ptrs + k, inside).to(tl.float32)
        if not EVEN:
            x = tl.where(inside, x, 0.0)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + k, inside).to(tl.float32)
        sums += tile.to(tl.float32) * x
        tile = following
    return tl.sum(sums, 2), tl.sum(squares, 2)


@triton.jit
def dots(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, rows, taken,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The taken rows of w [., SIZE] times x [TOKENS, SIZE], or times x * norm: float32 [LANES, rows]; and the sum of
    each token's x * x, float32 [LANES, 1].
    """
    EVEN: tl.constexpr = SIZE % BLOCK == 0
    LANES: tl.constexpr = 8 if TOKENS <= 8 else 16
    dtype = w_ptr.dtype.element_ty
    column, token = tl.arange(0, BLOCK)[None, :], tl.arange(0, LANES)[:, None]
    x_ptrs, w_ptrs = x_ptr + token * SIZE, w_ptr + rows[:, None].to(tl.int64) * SIZE
    sums = tl.zeros([rows.shape[0], LANES], tl.float32)
    squares = tl.zeros([LANES, 1], tl.float32)
    for start in range(0, SIZE, BLOCK):
        k = start + column
        x_mask, w_mask = token < TOKENS, taken[:, None]
        if not EVEN:
            x_mask, w_mask = x_mask & (k < SIZE), w_mask & (k < SIZE)
        x = tl.load(x_ptrs + k, x_mask, 0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)[:, None]
            weight = tl.load(norm_ptr + k) if EVEN else tl.load(norm_ptr + k, k < SIZE, 0.0)
            x = (wide * weight.to(tl.float32)).to(dtype)
        w = tl.load(w_ptrs + k, w_mask, 0.0)
        sums = tl.dot(w, tl.trans(x), sums, input_precision="ieee")
    return tl.trans(sums), squares


@triton.jit
def linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, first_ptr, second_ptr, third_ptr, first_bias, second_bias, third_bias, residual_ptr, out_ptr,
    first_rows, second_rows, all_rows,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, CORES: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [TOKENS, rows] = residual + W norm(x) + bias, for one matrix, or three whose results stand side by side; by
    tensor cores with CORES.

    ROWS divides the rows of the first and the second of three.
    """
    if EARLY:
        gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    w_ptr, bias_ptr, shift = first_ptr, first_bias, 0
    if PARTS == 3:
        if first >= first_rows + second_rows:
            w_ptr, bias_ptr, shift = third_ptr, third_bias, first_rows + second_rows
        elif first >= first_rows:
            w_ptr, bias_ptr, shift = second_ptr, second_bias, first_rows
    rows = first + tl.arange(0, ROWS)
    inside = rows < all_rows
    LANES: tl.constexpr = TOKENS if not CORES else 8 if TOKENS <= 8 else 16
    token = tl.arange(0, LANES)[:, None]
    place, mask = token * all_rows + rows[None, :], inside[None, :]
    if CORES:
        mask = mask & (token < TOKENS)
        if EARLY:
            gdc_wait()
        sums, squares = dots(x_ptr, norm_ptr, w_ptr, rows - shift, inside, SIZE, TOKENS, NORM, BLOCK)
    else:
        sums, squares = product(x_ptr, norm_ptr, w_ptr, rows - shift, inside, SIZE, TOKENS, NORM, EARLY, BLOCK)
    if NORM:
        sums *= tl.rsqrt(squares / SIZE + eps)
    if BIAS:
        sums += tl.load(bias_ptr + rows - shift, inside, 0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        sums = sums.to(out_ptr.dtype.element_ty).to(tl.float32)
        sums += tl.load(residual_ptr + place, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def hidden_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, gate_ptr, up_ptr, hidden_ptr, cut, width,
    ACTIVATION: tl.constexpr, SPARSE: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """act(gate norm(x)) * (up norm(x)), [TOKENS, width]. SPARSE reads the rows of up that a token has a gate above the
    cut for only, UP columns at a time: nothing else of the program is left to do meanwhile.
    """
    if EARLY:
        gdc_launch_dependents()
    dtype = hidden_ptr.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < width
    gate, squares = product(x_ptr, norm_ptr, gate_ptr, rows, inside, SIZE, TOKENS, True, EARLY, BLOCK)
    scale = tl.rsqrt(squares / SIZE + eps)
    gate = (gate * scale).to(dtype).to(tl.float32)
    if SPARSE:
        active = inside[None, :] & ~(gate <= cut)  # NaN is active, and an x that is not finite makes all gates NaN
        needed = tl.max(active.to(tl.int32), 0) > 0
        up = tl.zeros([TOKENS, ROWS], tl.float32)
        if tl.max(needed.to(tl.int32), 0) > 0:
            up, _ = product(x_ptr, norm_ptr, up_ptr, rows, needed, SIZE, TOKENS, True, False, UP)
        up = (up * scale).to(dtype).to(tl.float32)
        hidden = tl.where(active, hidden_value(gate, up, cut, ACTIVATION, dtype), 0.0)
    else:
        up, _ = product(x_ptr, norm_ptr, up_ptr, rows, inside, SIZE, TOKENS, True, False, UP)
        up = (up * scale).to(dtype).to(tl.float32)
        hidden = hidden_value(gate, up, cut, ACTIVATION, dtype)
    place = tl.arange(0, TOKENS)[:, None] * width + rows[None, :]
    tl.store(hidden_ptr + place, hidden.to(dtype), inside[None, :])


@triton.jit
def down_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr, down_ptr, residual_ptr, list_ptr, part_ptr, arrived_ptr, out_ptr, cut, width, share,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr, EARLY: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual + hidden [TOKENS, width], but for values within the cut, times down [width, SIZE]: BLOCK columns, for a
    split of `share` neurons, SHARE or less.

    A program lists its split's neurons that are active for a token, and reads their rows, TILE at a time. The last
    split to finish adds all up, in their order.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    block, split = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    number, token = tl.arange(0, SHARE), tl.arange(0, TOKENS)
    neurons = split * share + number
    present = (number < share) & (neurons < width)
    hidden = tl.load(hidden_ptr + token[:, None] * width + neurons[None, :], present[None, :], 0.0)
    taken = tl.max((~(tl.abs(hidden.to(tl.float32)) <= cut)).to(tl.int32), 0)  # NaN is taken
    count = tl.sum(taken, 0)
    list_ptr += (split * tl.num_programs(0) + block) * SHARE
    tl.store(list_ptr + tl.cumsum(taken, 0) - 1, neurons, taken > 0)
    tl.debug_barrier()  # the list is whole before any thread reads it
    sums = tl.zeros([TOKENS, TILE, BLOCK], tl.float32)
    for start in range(0, count, TILE):
        rank = (start + tl.arange(0, TILE))[None, :, None]
        rows = tl.load(list_ptr + rank, rank < count, 0)
        factor = tl.load(hidden_ptr + token[:, None, None] * width + rows, rank < count, 0.0).to(tl.float32)
        mask = (rank < count) & inside[None, None, :]
        tile = tl.load(down_ptr + rows.to(tl.int64) * SIZE + columns[None, None, :], mask, 0.0)
        sums += factor * tile.to(tl.float32)
    place = token[:, None] * SIZE + columns[None, :]
    tl.store(part_ptr + split * TOKENS * SIZE + place, tl.sum(sums, 1), inside[None, :])
    tl.debug_barrier()  # all threads' sums are stored before the program counts as done
    if tl.atomic_add(arrived_ptr + block, 1) == SPLITS - 1:
        part = tl.arange(0, SPLITS)[:, None, None] * (TOKENS * SIZE) + place[None, :, :]
        parts = tl.load(part_ptr + part, inside[None, None, :], 0.0, cache_modifier=".cg")
        sum = tl.sum(parts, 0).to(out_ptr.dtype.element_ty).to(tl.float32)
        sum += tl.load(residual_ptr + place, inside[None, :], 0.0).to(tl.float32)
        tl.store(out_ptr + place, sum.to(out_ptr.dtype.element_ty), inside[None, :])
        tl.store(arrived_ptr + block, 0)  # for the next layer
