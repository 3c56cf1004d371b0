"""Products of a GPU's decode step whose inputs are cut, for one token: TEAL (arXiv 2408.14690).

A projection that cuts its input needs no weight of an entry that is cut. So its matrix lies an input a row, [inputs,
outputs]. A program owns BLOCK outputs and a split of the inputs: it lists which of these are kept, and then reads
their rows, whole ones, as many at a time as keeps the memory busy. Loads that are masked instead leave gaps in what is
on its way. The last split of a block to finish adds all up, in their order.

Reading less takes longer where a matrix is small. `whole_kernel` reads all of it, an output a row, as the kernels
without cuts do: its first loads need not wait for x.

What is cut depends on the norm of x, which each program computes: rounded as PyTorch rounds, as is all that it would
write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stocha_hf.decoding.triton_one_token import hidden_value


@triton.jit
def _scale(x_ptr, eps, SIZE: tl.constexpr, ALL: tl.constexpr, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the norm multiplies x by; 1 without a norm. ALL is SIZE, rounded up to a power of two."""
    scale = 1.0
    if NORM:
        every = tl.arange(0, ALL)
        whole = tl.load(x_ptr + every, every < SIZE, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole, 0) / SIZE + eps)
    return scale


@triton.jit
def _inputs(x_ptr, norm_ptr, scale, k, inside, cut, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries k of x, or of its norm, with 0 in the place of those within the cut; NaN is not cut."""
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + k, inside, 0.0).to(tl.float32)
    if NORM:
        x = (x * scale).to(dtype).to(tl.float32)
        x = (x * tl.load(norm_ptr + k, inside, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
    return tl.where(tl.abs(x) <= cut, 0.0, x)


@triton.jit
def _entries(list_ptr, rank, count):  # type: ignore[no-untyped-def]
    """The inputs of these ranks on a list, and their values; beyond the last one that one, with 0."""
    entry = tl.load(list_ptr + tl.minimum(rank, count - 1))
    return entry >> 32, tl.where(rank < count, entry.to(tl.int32).to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _rows(w_ptr, inputs, columns, inside, outputs, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows of these inputs [ROWS, DEPTH], of w [., outputs]: [ROWS, DEPTH, columns]."""
    ptrs = w_ptr + (inputs * outputs)[:, :, None] + columns[None, None, :]
    return tl.load(ptrs, None if EVEN else inside[None, None, :], eviction_policy="evict_first")


@triton.jit
def kept_product(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, w_ptr, list_ptr, columns, inside, split, cut, outputs,
    SIZE: tl.constexpr, ALL: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr,
    ROOM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The split's part of x [SIZE], or of its norm, without entries within the cut, times the columns of w [SIZE,
    outputs]: float32. The program's list, int64, has ROOM for all inputs of a split. EVEN: all columns are inside.

    Warps read ROWS rows side by side, DEPTH of them each. The next ones are asked for before these are used.
    """
    SHARE: tl.constexpr = (SIZE + SPLITS - 1) // SPLITS
    TILE: tl.constexpr = ROWS * DEPTH
    k = split * SHARE + tl.arange(0, ROOM)
    scale = _scale(x_ptr, eps, SIZE, ALL, NORM)
    x = _inputs(x_ptr, norm_ptr, scale, k, k < tl.minimum(split * SHARE + SHARE, SIZE), cut, NORM)
    kept = (x != 0).to(tl.int32)
    entry = (k.to(tl.int64) << 32) | (x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    tl.store(list_ptr + tl.cumsum(kept, 0) - 1, entry, kept > 0)
    count = tl.sum(kept, 0)
    tl.debug_barrier()  # the list is whole before any thread reads it
    sums = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    if count > 0:
        rank = tl.arange(0, ROWS)[:, None] + ROWS * tl.arange(0, DEPTH)[None, :]
        inputs, values = _entries(list_ptr, rank, count)
        tile = _rows(w_ptr, inputs, columns, inside, outputs, EVEN)
        inputs, following_values = _entries(list_ptr, rank + TILE, count)
        for start in range(TILE, count, TILE):
            following = _rows(w_ptr, inputs, columns, inside, outputs, EVEN)
            inputs, later_values = _entries(list_ptr, rank + start + TILE, count)
            sums += tl.sum(values[:, :, None] * tile.to(tl.float32), 1)
            tile, values, following_values = following, following_values, later_values
        sums += tl.sum(values[:, :, None] * tile.to(tl.float32), 1)
    return tl.sum(sums, 0)


@triton.jit
def _added(part_ptr, columns, inside, outputs, SPLITS: tl.constexpr, ALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """What all splits found, added up. ALL is SPLITS, rounded up to a power of two."""
    split = tl.arange(0, ALL)[:, None]
    part = part_ptr + split * outputs + columns[None, :]
    return tl.sum(tl.load(part, (split < SPLITS) & inside[None, :], 0.0, cache_modifier=".cg"), 0)


@triton.jit
def _of_three(  # type: ignore[no-untyped-def]
    first, first_ptr, second_ptr, third_ptr, first_bias, second_bias, third_bias, first_cut, second_cut, third_cut,
    first_rows, second_rows, all_rows, PARTS: tl.constexpr,
):  # fmt: skip
    """Of one matrix, or of the one of three that the first row is of: it, its bias and cut, where its rows begin
    among all, and how many they are.
    """
    w_ptr, bias_ptr, cut, shift, rows = first_ptr, first_bias, first_cut, 0, all_rows
    if PARTS == 3:
        rows = first_rows
        if first >= first_rows + second_rows:
            w_ptr, bias_ptr, cut, shift = third_ptr, third_bias, third_cut, first_rows + second_rows
            rows = all_rows - shift
        elif first >= first_rows:
            w_ptr, bias_ptr, cut, shift, rows = second_ptr, second_bias, second_cut, first_rows, second_rows
    return w_ptr, bias_ptr, cut, shift, rows


@triton.jit
def cut_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, first_ptr, second_ptr, third_ptr, first_bias, second_bias, third_bias, residual_ptr,
    list_ptr, part_ptr, arrived_ptr, out_ptr, first_cut, second_cut, third_cut, first_rows, second_rows, all_rows,
    SIZE: tl.constexpr, ALL: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, EARLY: tl.constexpr, EVEN: tl.constexpr, ROOM: tl.constexpr, SPLITS: tl.constexpr,
    ALL_SPLITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [rows] = residual + W cut(norm(x)) + bias, for one matrix, or three whose results stand side by side, each
    with its own cut. BLOCK divides the rows of the first and the second of three.
    """
    if EARLY:
        gdc_wait()
    block, split = tl.program_id(0), tl.program_id(1)
    w_ptr, bias_ptr, cut, shift, rows = _of_three(
        block * BLOCK, first_ptr, second_ptr, third_ptr, first_bias, second_bias, third_bias, first_cut, second_cut,
        third_cut, first_rows, second_rows, all_rows, PARTS,
    )  # fmt: skip
    columns = block * BLOCK - shift + tl.arange(0, BLOCK)
    inside = columns < rows
    list_ptr += (block * SPLITS + split) * ROOM
    sums = kept_product(
        x_ptr, norm_ptr, eps, w_ptr, list_ptr, columns, inside, split, cut, rows, SIZE, ALL, NORM, EVEN, SPLITS, ROOM,
        ROWS, DEPTH,
    )  # fmt: skip
    if EARLY:
        gdc_launch_dependents()  # not before: programs that wait would take the room of some that read
    tl.store(part_ptr + split * all_rows + shift + columns, sums, inside)
    tl.debug_barrier()  # all threads' sums are stored before the program counts as done
    if tl.atomic_add(arrived_ptr + block, 1) == SPLITS - 1:
        found = _added(part_ptr + shift, columns, inside, all_rows, SPLITS, ALL_SPLITS)
        if BIAS:
            found += tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)
        if RESIDUAL:
            found = found.to(out_ptr.dtype.element_ty).to(tl.float32)
            found += tl.load(residual_ptr + columns, inside, 0.0).to(tl.float32)
        tl.store(out_ptr + shift + columns, found.to(out_ptr.dtype.element_ty), inside)
        tl.store(arrived_ptr + block, 0)  # for the next product


@triton.jit
def _hidden(gate, up, cut, ACTIVATION: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(gate) * up in dtype, of float32 sums."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    if ACTIVATION == "silu":
        return ((gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up).to(dtype)
    else:
        return hidden_value(gate, up, cut, ACTIVATION, dtype)


@triton.jit
def cut_hidden_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, gate_ptr, up_ptr, list_ptr, part_ptr, arrived_ptr, hidden_ptr, gate_cut, up_cut, cut, width,
    ACTIVATION: tl.constexpr, SIZE: tl.constexpr, ALL: tl.constexpr, EARLY: tl.constexpr, EVEN: tl.constexpr,
    ROOM: tl.constexpr, SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """act(gate cut(norm(x))) * (up cut(norm(x))), [width]; half of the programs multiply gate, half up."""
    if EARLY:
        gdc_wait()
    block, split, is_up = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    w_ptr, limit = gate_ptr, gate_cut
    if is_up:
        w_ptr, limit = up_ptr, up_cut
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    list_ptr += ((block * 2 + is_up) * SPLITS + split) * ROOM
    sums = kept_product(
        x_ptr, norm_ptr, eps, w_ptr, list_ptr, columns, inside, split, limit, width, SIZE, ALL, True, EVEN, SPLITS,
        ROOM, ROWS, DEPTH,
    )  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    tl.store(part_ptr + (is_up * SPLITS + split) * width + columns, sums, inside)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + block, 1) == 2 * SPLITS - 1:
        gate = _added(part_ptr, columns, inside, width, SPLITS, ALL_SPLITS)
        up = _added(part_ptr + SPLITS * width, columns, inside, width, SPLITS, ALL_SPLITS)
        tl.store(hidden_ptr + columns, _hidden(gate, up, cut, ACTIVATION, hidden_ptr.dtype.element_ty), inside)
        tl.store(arrived_ptr + block, 0)


@triton.jit
def _whole_product(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, scale, w_ptrs, tile, inside, cut, SIZE: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows of w [., SIZE] times x, or its norm, without entries within the cut: float32; `tile` is their first one."""
    column = tl.arange(0, BLOCK)
    sums = tl.zeros(tile.shape, tl.float32)
    for start in range(0, SIZE, BLOCK):
        there = inside[:, None] & (start + BLOCK + column < SIZE)[None, :]
        following = tl.load(w_ptrs + start + BLOCK, there, 0.0, eviction_policy="evict_first")
        x = _inputs(x_ptr, norm_ptr, scale, start + column, start + column < SIZE, cut, NORM)
        sums += x[None, :] * tile.to(tl.float32)
        tile = following
    return tl.sum(sums, 1)


@triton.jit
def whole_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, first_ptr, second_ptr, third_ptr, first_bias, second_bias, third_bias, residual_ptr, out_ptr,
    first_cut, second_cut, third_cut, first_rows, second_rows, all_rows, hidden_cut,
    ACTIVATION: tl.constexpr, SIZE: tl.constexpr, ALL: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As cut_linear_kernel, or with two PARTS as cut_hidden_kernel, of matrices that lie an output a row."""
    if EARLY:
        gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    w_ptr, bias_ptr, cut, shift, _ = _of_three(
        first, first_ptr, second_ptr, third_ptr, first_bias, second_bias, third_bias, first_cut, second_cut,
        third_cut, first_rows, second_rows, all_rows, PARTS,
    )  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    rows, column = first + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = rows < all_rows
    place = (rows - shift)[:, None].to(tl.int64) * SIZE + column[None, :]
    there = inside[:, None] & (column < SIZE)[None, :]
    tile = tl.load(w_ptr + place, there, 0.0, eviction_policy="evict_first")
    if PARTS == 2:
        up_tile = tl.load(second_ptr + place, there, 0.0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    scale = _scale(x_ptr, eps, SIZE, ALL, NORM)
    found = _whole_product(x_ptr, norm_ptr, scale, w_ptr + place, tile, inside, cut, SIZE, NORM, BLOCK)
    if PARTS == 2:
        up = _whole_product(x_ptr, norm_ptr, scale, second_ptr + place, up_tile, inside, second_cut, SIZE, NORM, BLOCK)
        found = _hidden(found, up, hidden_cut, ACTIVATION, dtype)
    if BIAS:
        found += tl.load(bias_ptr + rows - shift, inside, 0.0).to(tl.float32)
    if RESIDUAL:
        found = found.to(dtype).to(tl.float32) + tl.load(residual_ptr + rows, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + rows, found.to(dtype), inside)
