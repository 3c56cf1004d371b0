"""Products of a GPU's decode step that read the rows of some inputs only, for one token: TEAL (arXiv 2408.14690).

A projection that cuts its input needs no weight of an entry that is cut. So its matrix lies an input a row,
[inputs, outputs], and loads of rows that multiply zeros are masked, which costs no memory traffic. A program owns
BLOCK outputs and a split of the inputs; the last split of a block to finish adds all up, in their order. The norm of x
is computed by each program, since it decides what is cut: rounded as PyTorch rounds, as is all that it would write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stocha_hf.decoding.triton_one_token import hidden_value


@triton.jit
def cut_product(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, w_ptr, columns, inside, split, cut, outputs,
    SIZE: tl.constexpr, ALL: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The split's part of x [SIZE], or of its norm, without entries within the cut, times w [SIZE, outputs]: float32,
    of the columns. ALL is SIZE, rounded up to a power of two.

    The next tile is asked for before this one is used; the first one, all of it, before the program waits for x.
    """
    SHARE: tl.constexpr = (SIZE + SPLITS - 1) // SPLITS
    begin = split * SHARE
    end = tl.minimum(begin + SHARE, SIZE)
    k = begin + tl.arange(0, TILE)
    w_ptrs = w_ptr + k[:, None].to(tl.int64) * outputs + columns[None, :]
    tile = tl.load(w_ptrs, (k < end)[:, None] & inside[None, :], 0.0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    scale = 1.0
    if NORM:
        every = tl.arange(0, ALL)
        whole = tl.load(x_ptr + every, every < SIZE, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole, 0) / SIZE + eps)
    x = _inputs(x_ptr, norm_ptr, scale, k, end, cut, NORM)
    sums = tl.zeros([TILE, columns.shape[0]], tl.float32)
    for _ in range(0, SHARE, TILE):
        k += TILE
        following_x = _inputs(x_ptr, norm_ptr, scale, k, end, cut, NORM)
        mask = (following_x != 0)[:, None] & inside[None, :]
        following = tl.load(
            w_ptr + k[:, None].to(tl.int64) * outputs + columns[None, :], mask, 0.0, eviction_policy="evict_first"
        )
        sums += x[:, None] * tile.to(tl.float32)
        x = following_x
        tile = following
    return tl.sum(sums, 0)


@triton.jit
def _inputs(x_ptr, norm_ptr, scale, k, end, cut, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries k of x, or of its norm, with 0 in the place of those within the cut; NaN is not cut."""
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + k, k < end, 0.0).to(tl.float32)
    if NORM:
        x = (x * scale).to(dtype).to(tl.float32)
        x = (x * tl.load(norm_ptr + k, k < end, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
    return tl.where(tl.abs(x) <= cut, 0.0, x)


@triton.jit
def _added(part_ptr, columns, inside, outputs, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What all splits found, added up."""
    part = tl.arange(0, SPLITS)[:, None] * outputs + columns[None, :]
    return tl.sum(tl.load(part_ptr + part, inside[None, :], 0.0, cache_modifier=".cg"), 0)


@triton.jit
def cut_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, first_ptr, second_ptr, third_ptr, first_bias, second_bias, third_bias, residual_ptr,
    part_ptr, arrived_ptr, out_ptr, first_cut, second_cut, third_cut, first_rows, second_rows, all_rows,
    SIZE: tl.constexpr, ALL: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, EARLY: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [rows] = residual + W cut(norm(x)) + bias, for one matrix, or three whose results stand side by side, each
    with its own cut. BLOCK divides the rows of the first and the second of three.
    """
    if EARLY:
        gdc_launch_dependents()
    block, split = tl.program_id(0), tl.program_id(1)
    first = block * BLOCK
    w_ptr, bias_ptr, cut, shift, rows = first_ptr, first_bias, first_cut, 0, first_rows
    if PARTS == 3:
        if first >= first_rows + second_rows:
            w_ptr, bias_ptr, cut, shift = third_ptr, third_bias, third_cut, first_rows + second_rows
            rows = all_rows - shift
        elif first >= first_rows:
            w_ptr, bias_ptr, cut, shift, rows = second_ptr, second_bias, second_cut, first_rows, second_rows
    columns = first - shift + tl.arange(0, BLOCK)
    inside = columns < rows
    sums = cut_product(
        x_ptr, norm_ptr, eps, w_ptr, columns, inside, split, cut, rows, SIZE, ALL, NORM, EARLY, SPLITS, TILE
    )
    tl.store(part_ptr + split * all_rows + shift + columns, sums, inside)
    tl.debug_barrier()  # all threads' sums are stored before the program counts as done
    if tl.atomic_add(arrived_ptr + block, 1) == SPLITS - 1:
        found = _added(part_ptr + shift, columns, inside, all_rows, SPLITS)
        if BIAS:
            found += tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)
        if RESIDUAL:
            found = found.to(out_ptr.dtype.element_ty).to(tl.float32)
            found += tl.load(residual_ptr + columns, inside, 0.0).to(tl.float32)
        tl.store(out_ptr + shift + columns, found.to(out_ptr.dtype.element_ty), inside)
        tl.store(arrived_ptr + block, 0)  # for the next product


@triton.jit
def cut_hidden_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, gate_ptr, up_ptr, part_ptr, arrived_ptr, hidden_ptr, gate_cut, up_cut, cut, width,
    ACTIVATION: tl.constexpr, SIZE: tl.constexpr, ALL: tl.constexpr, EARLY: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """act(gate cut(norm(x))) * (up cut(norm(x))), [width]; half of the programs multiply gate, half up."""
    if EARLY:
        gdc_launch_dependents()
    dtype = hidden_ptr.dtype.element_ty
    block, split, is_up = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    w_ptr, limit = gate_ptr, gate_cut
    if is_up:
        w_ptr, limit = up_ptr, up_cut
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    sums = cut_product(
        x_ptr, norm_ptr, eps, w_ptr, columns, inside, split, limit, width, SIZE, ALL, True, EARLY, SPLITS, TILE
    )
    tl.store(part_ptr + (is_up * SPLITS + split) * width + columns, sums, inside)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + block, 1) == 2 * SPLITS - 1:
        gate = _added(part_ptr, columns, inside, width, SPLITS).to(dtype).to(tl.float32)
        up = _added(part_ptr + SPLITS * width, columns, inside, width, SPLITS).to(dtype).to(tl.float32)
        if ACTIVATION == "silu":
            hidden = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
        else:
            hidden = hidden_value(gate, up, cut, ACTIVATION, dtype)
        tl.store(hidden_ptr + columns, hidden.to(dtype), inside)
        tl.store(arrived_ptr + block, 0)
