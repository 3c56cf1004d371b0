"""The head and the FFN's first products of a whole decode step on a GPU for 3 to 16 tokens, by tensor cores.

A sparse FFN multiplies all gate rows of a segment, lists the neurons that any token needs, and takes tiles of the list
through up: with masks, most rows of a tile would be empty, while every step of the loop still waits for it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stocha_hf.decoding.triton_one_token import hidden_value
from stocha_hf.decoding.triton_products import dots


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
    LANES: tl.constexpr = 8 if TOKENS <= 8 else 16
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
    LANES: tl.constexpr = 8 if TOKENS <= 8 else 16
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
        hidden = hidden_value(gate, up, cut, ACTIVATION, dtype)
        tl.store(place + row[None, :], hidden.to(dtype), present)
