"""The kernels of triton_ffn.py for 2 to 8 tokens: the neurons that any token needs are listed, then read in tiles.

Tensor cores multiply tiles of 16 tokens by 16 rows or more. With masks, as for one token, most rows of a tile would be
empty, while every step of the loop still waits for it. So a program of the first kernel lists the active neurons of
its segment, ROWS neurons, in their order, and computes up and hidden for tiles of the list; the second kernel walks
through the lists of a group of segments. Nothing is counted over the whole layer, so no program waits for another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stocha_hf.sparse.triton_one_token import hidden_value

# Tiles found on an H100 with 2 tokens (docs/decode.md)
HIDDEN = {"ROWS": 64, "BLOCK": 128, "TILE": 32, "num_warps": 4, "num_stages": 5}
DOWN = {"ROWS": 128, "BLOCK": 64, "num_warps": 4, "num_stages": 1}
LANES = 16  # tokens in a tile: what tensor cores take
GROUP = 8  # segments in a split of the second kernel, or more where that makes more than SPLITS
SPLITS = 32  # their sums are added in one tile


def launch(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    out: torch.Tensor,
    activation: str,
    threshold: float,
) -> None:
    """Write the FFN of x [..., H], 2 to 8 tokens, to `out`, on the current GPU."""
    (width, size), tokens = gate.shape, x.numel() // x.shape[-1]
    blocks, segments = triton.cdiv(size, DOWN["BLOCK"]), triton.cdiv(width, HIDDEN["ROWS"])
    group = max(GROUP, triton.next_power_of_2(triton.cdiv(segments, SPLITS)))
    splits, stride = triton.cdiv(segments, group), segments * HIDDEN["ROWS"]
    gates, hidden = x.new_empty(tokens, stride), x.new_empty(tokens, stride)  # in the lists' order
    listed, counts = (x.new_empty(count, dtype=torch.int32) for count in (stride, segments))
    parts, arrived = x.new_empty(splits, tokens, size, dtype=torch.float32), counts.new_empty(blocks)
    _hidden_kernel[(max(segments, blocks),)](
        x, gate, up, gates, hidden, listed, counts, arrived, threshold, size, width, tokens, blocks, segments, stride,
        activation, LANES, size % HIDDEN["BLOCK"] == 0, **HIDDEN,
    )  # fmt: skip
    _down_kernel[blocks, splits](
        hidden, down_t, listed, counts, parts, arrived, out, size, tokens, splits, segments, stride,
        LANES, triton.next_power_of_2(tokens), triton.next_power_of_2(splits), group, HIDDEN["ROWS"], **DOWN,
    )  # fmt: skip


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, rows, taken, size, tokens, LANES: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    """x [tokens, size] times the taken rows of w, float32 [LANES, rows]. EVEN: BLOCK divides size."""
    column, token = tl.arange(0, BLOCK), tl.arange(0, LANES)
    sums = tl.zeros([LANES, rows.shape[0]], tl.float32)
    x_rows, w_rows = x_ptr + token[:, None] * size, w_ptr + rows[:, None].to(tl.int64) * size
    for start in range(0, size, BLOCK):
        k = (start + column)[None, :]
        x_mask, w_mask = (token < tokens)[:, None], taken[:, None]
        if not EVEN:
            x_mask, w_mask = x_mask & (k < size), w_mask & (k < size)
        x = tl.load(x_rows + k, x_mask, 0.0)
        w = tl.load(w_rows + k, w_mask, 0.0)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    return sums


@triton.jit
def _is_active(gate, cut):  # type: ignore[no-untyped-def]
    """Also where the gate is NaN or infinite, as all gates of a token with infinities or NaN are."""
    return ~((gate <= cut) & (gate > float("-inf")))


@triton.jit
def _hidden_kernel(  # type: ignore[no-untyped-def]
    x_ptr, gate_ptr, up_ptr, gates_ptr, hidden_ptr, list_ptr, count_ptr, arrived_ptr, cut,
    size, width, tokens, blocks, segments, stride,
    ACTIVATION: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A segment's list of active neurons, its length, and their hidden values [tokens, stride]; and the second
    kernel's counters, set to 0.
    """
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    program, token = tl.program_id(0), tl.arange(0, LANES)
    tl.store(arrived_ptr + program, 0, program < blocks)
    if program < segments:
        present = (token < tokens)[:, None]
        rows = program * ROWS + tl.arange(0, ROWS)
        gate = _product(x_ptr, gate_ptr, rows, rows < width, size, tokens, LANES, BLOCK, EVEN).to(dtype)
        active = present & (rows < width)[None, :] & _is_active(gate.to(tl.float32), cut)
        taken = tl.max(active.to(tl.int32), 0)
        place, number = tl.cumsum(taken, 0) - 1, tl.sum(taken, 0)
        position = program * ROWS + place
        tl.store(list_ptr + position, rows, taken > 0)
        tl.store(count_ptr + program, number)
        tl.store(gates_ptr + token[:, None] * stride + position[None, :], gate, present & (taken > 0)[None, :])
        tl.debug_barrier()  # other threads read the gates back
        for start in range(0, number, TILE):
            ranks = start + tl.arange(0, TILE)
            found = (place[None, :] == ranks[:, None]) & (taken > 0)[None, :]
            neurons = tl.sum(tl.where(found, rows[None, :], 0), 1)
            where = token[:, None] * stride + (program * ROWS + ranks)[None, :]
            mask = present & (ranks < number)[None, :]
            chosen = tl.load(gates_ptr + where, mask, 0.0).to(tl.float32)
            up = _product(x_ptr, up_ptr, neurons, ranks < number, size, tokens, LANES, BLOCK, EVEN)
            hidden = hidden_value(chosen, up.to(dtype).to(tl.float32), cut, ACTIVATION, dtype)
            hidden = tl.where(_is_active(chosen, cut), hidden, 0.0).to(dtype)
            tl.store(hidden_ptr + where, hidden, mask)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr, down_ptr, list_ptr, count_ptr, part_ptr, arrived_ptr, out_ptr, size, tokens, splits, segments, stride,
    LANES: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of hidden times down, for GROUP segments' lists; the last split to finish adds all up."""
    block, split, token = tl.program_id(0), tl.program_id(1), tl.arange(0, LANES)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    first, segment = split * GROUP, tl.arange(0, GROUP)
    counts = tl.load(count_ptr + first + segment, first + segment < segments, 0)
    ends, total = tl.cumsum(counts, 0), tl.sum(counts, 0)
    sums = tl.zeros([LANES, BLOCK], tl.float32)
    for start in range(0, total, ROWS):
        ranks = start + tl.arange(0, ROWS)  # among the group's listed neurons
        before = ends[None, :] <= ranks[:, None]  # segments that end before
        position = (first + tl.sum(before.to(tl.int32), 1)) * SEGMENT + ranks
        position -= tl.sum(tl.where(before, counts[None, :], 0), 1)
        neurons = tl.load(list_ptr + position, ranks < total, 0)
        inside = (token < tokens)[:, None] & (ranks < total)[None, :]
        hidden = tl.load(hidden_ptr + token[:, None] * stride + position[None, :], inside, 0.0)
        mask = (ranks < total)[:, None] & (columns < size)[None, :]
        down = tl.load(down_ptr + neurons[:, None].to(tl.int64) * size + columns[None, :], mask, 0.0)
        sums = tl.dot(hidden, down, sums, input_precision="ieee")
    inside = (token < tokens)[:, None] & (columns < size)[None, :]
    tl.store(part_ptr + (split * tokens + token)[:, None] * size + columns[None, :], sums, inside)
    tl.debug_barrier()  # all threads' sums are stored before the program counts as done
    if tl.atomic_add(arrived_ptr + block, 1) == splits - 1:
        part, few = tl.arange(0, SPLITS), tl.arange(0, TOKENS)
        wanted = (few < tokens)[:, None] & (columns < size)[None, :]
        at = (part[:, None, None] * tokens + few[None, :, None]) * size + columns[None, None, :]
        parts = tl.load(part_ptr + at, (part < splits)[:, None, None] & wanted[None, :, :], 0.0, cache_modifier=".cg")
        tl.store(out_ptr + few[:, None] * size + columns[None, :], tl.sum(parts, 0), wanted)
