"""The products of a whole decode step on a GPU for 3 to 8 tokens, by tensor cores: multiply-adds would take longer
than reading.

Tensor cores take 8 tokens or more, so that some of their lanes are empty: a matrix is read once all the same. x times
the norm's weight is rounded to the weights' type, as PyTorch rounds it; the norm's scale is a factor of the result, as
for one token (triton_products.py). A sparse FFN multiplies all gate rows of a segment, lists the neurons that any
token needs, and takes tiles of the list through up: with masks, most rows of a tile would be empty, while every step
of the loop still waits for it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stocha_hf.decoding.triton_one_token import hidden_value

LANES: tl.constexpr = tl.constexpr(8)  # tokens in a tile


@triton.jit
def dots(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, rows, taken,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The taken rows of w [., SIZE] times x [TOKENS, SIZE], or times x * norm: float32 [LANES, rows]; and the sum of
    each token's x * x, float32 [LANES, 1].
    """
    EVEN: tl.constexpr = SIZE % BLOCK == 0
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
def several_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, first_ptr, second_ptr, third_ptr, first_bias, second_bias, third_bias, residual_ptr, out_ptr,
    first_rows, second_rows, all_rows,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [TOKENS, rows] = residual + W norm(x) + bias, for one matrix, or three whose results stand side by side.

    ROWS divides the rows of the first and the second of three.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.program_id(0) * ROWS
    w_ptr, bias_ptr, shift = first_ptr, first_bias, 0
    if PARTS == 3:
        if first >= first_rows + second_rows:
            w_ptr, bias_ptr, shift = third_ptr, third_bias, first_rows + second_rows
        elif first >= first_rows:
            w_ptr, bias_ptr, shift = second_ptr, second_bias, first_rows
    rows = first + tl.arange(0, ROWS)
    inside = rows < all_rows
    sums, squares = dots(x_ptr, norm_ptr, w_ptr, rows - shift, inside, SIZE, TOKENS, NORM, BLOCK)
    if NORM:
        sums *= tl.rsqrt(squares / SIZE + eps)
    if BIAS:
        sums += tl.load(bias_ptr + rows - shift, inside, 0.0).to(tl.float32)[None, :]
    token = tl.arange(0, LANES)[:, None]
    place, mask = token * all_rows + rows[None, :], (token < TOKENS) & inside[None, :]
    if RESIDUAL:
        sums = sums.to(out_ptr.dtype.element_ty).to(tl.float32)
        sums += tl.load(residual_ptr + place, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def several_head_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, head_ptr, bias_ptr, logits_ptr, vocabulary,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits [TOKENS, vocabulary], float32 rounded to x's type."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < vocabulary
    logits, squares = dots(x_ptr, norm_ptr, head_ptr, rows, inside, SIZE, TOKENS, True, BLOCK)
    logits *= tl.rsqrt(squares / SIZE + eps)
    if BIAS:
        logits += tl.load(bias_ptr + rows, inside, 0.0).to(tl.float32)[None, :]
    logits = logits.to(x_ptr.dtype.element_ty).to(tl.float32)
    token = tl.arange(0, LANES)[:, None]
    tl.store(logits_ptr + token * vocabulary + rows[None, :], logits, (token < TOKENS) & inside[None, :])


@triton.jit
def several_hidden_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, gate_ptr, up_ptr, hidden_ptr, cut, width,
    ACTIVATION: tl.constexpr, SPARSE: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """act(gate norm(x)) * (up norm(x)), [TOKENS, width]. SPARSE reads the rows of up that a token has a gate above the
    cut for only, TILE rows at a time.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    dtype = hidden_ptr.dtype.element_ty
    token, row = tl.arange(0, LANES)[:, None], tl.arange(0, ROWS)
    first = tl.program_id(0) * ROWS
    inside = first + row < width
    gate, squares = dots(x_ptr, norm_ptr, gate_ptr, first + row, inside, SIZE, TOKENS, True, BLOCK)
    scale = tl.rsqrt(squares / SIZE + eps)
    gate = (gate * scale).to(dtype).to(tl.float32)
    place = hidden_ptr + token * width + first
    present = (token < TOKENS) & inside[None, :]
    if SPARSE:
        active = present & ~(gate <= cut)  # NaN is active, and an x that is not finite makes all gates NaN
        taken = tl.max(active.to(tl.int32), 0)
        rank, count = tl.where(taken > 0, tl.cumsum(taken, 0) - 1, -1), tl.sum(taken, 0)
        tl.store(place + row[None, :], tl.zeros([LANES, ROWS], dtype), present & (taken == 0)[None, :])
        for start in range(0, count, TILE):
            ranks = start + tl.arange(0, TILE)
            listed = ranks < count
            chosen = tl.sum(tl.where(rank[None, :] == ranks[:, None], row[None, :], 0), 1)
            up, _ = dots(x_ptr, norm_ptr, up_ptr, first + chosen, listed, SIZE, TOKENS, True, BLOCK)
            up = (up * scale).to(dtype).to(tl.float32)
            gates = tl.gather(gate, tl.broadcast_to(chosen[None, :], [LANES, TILE]), 1)
            hidden = tl.where(gates <= cut, 0.0, hidden_value(gates, up, cut, ACTIVATION, dtype))
            tl.store(place + chosen[None, :], hidden.to(dtype), (token < TOKENS) & listed[None, :])
    else:
        up, _ = dots(x_ptr, norm_ptr, up_ptr, first + row, inside, SIZE, TOKENS, True, BLOCK)
        up = (up * scale).to(dtype).to(tl.float32)
        if ACTIVATION == "silu":
            hidden = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
        else:
            hidden = hidden_value(gate, up, cut, ACTIVATION, dtype)
        tl.store(place + row[None, :], hidden.to(dtype), present)
