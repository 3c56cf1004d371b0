"""The kernels of triton_ffn.py for 2 to 8 tokens: the neurons that any token needs are listed, then read in tiles.

Tensor cores multiply tiles of 16 tokens by 16 rows or more. With masks, as for one token, most rows of a tile would be
empty, while every step of the loop still waits for it. So a program multiplies all gate rows of its segment, ROWS
neurons, lists the active ones in their order, and takes tiles of the list through up, activation and down. What it
adds to the output goes to its own part, [tokens, H] in float32; a second kernel adds the parts up. No program waits
for another, and nothing is counted over the whole layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stocha_hf.decoding.triton_one_token import hidden_value

# Tiles found on an H100 (docs/experiments/decoding.md)
FFN = {"ROWS": 64, "BLOCK": 256, "num_warps": 4}
SUM = {"PARTS": 256, "BLOCK": 32, "num_warps": 4, "num_stages": 1}
LANES = 16  # tokens in a tile: what tensor cores take


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
    segments = triton.cdiv(width, FFN["ROWS"])
    tile = 32 if tokens < 4 else 64  # at 90% zeros most lists fit into one: 19% of a segment with 2 tokens, 34% with 4
    parts = x.new_empty(segments, tokens, size, dtype=torch.float32)
    stages, early = _options(x, segments)
    _ffn_kernel[(segments,)](
        x, gate, up, down_t, parts, threshold, size, width, tokens,
        activation, LANES, size % FFN["BLOCK"] == 0, early, tile, num_stages=stages, **FFN,
    )  # fmt: skip
    _sum_kernel[(triton.cdiv(out.numel(), SUM["BLOCK"]),)](
        parts, out, segments, out.numel(), early, **SUM, **({"launch_pdl": True} if early else {})
    )


def _options(x: torch.Tensor, segments: int) -> tuple[int, bool]:
    """Stages of the first kernel's loops; and whether the second one's programs start while the first one ends, and
    wait there for its parts, as they can from Hopper on.
    """
    if not x.is_cuda:  # the interpreter
        return 3, False
    gpu = torch.cuda.get_device_properties(x.device)
    # Four stages take so much shared memory that an SM holds one program only
    bytes_of_four = 3 * (FFN["ROWS"] + LANES) * FFN["BLOCK"] * x.element_size()
    room = getattr(gpu, "shared_memory_per_block_optin", 0)  # PyTorch 2.6 and ROCm do not tell
    stages = 4 if segments <= gpu.multi_processor_count and bytes_of_four <= room else 3
    return stages, torch.version.cuda is not None and gpu.major >= 9


@triton.jit
def _ffn_kernel(  # type: ignore[no-untyped-def]
    x_ptr, gate_ptr, up_ptr, down_ptr, part_ptr, cut, size, width, tokens,
    ACTIVATION: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the active neurons of a segment add to the output, float32 [tokens, size] of the program's own."""
    if EARLY:
        gdc_launch_dependents()
    row, token = tl.arange(0, ROWS), tl.arange(0, LANES)
    first = tl.program_id(0) * ROWS
    inside = first + row < width
    gate = _product(x_ptr, gate_ptr, first + row, inside, size, tokens, LANES, BLOCK, EVEN).to(x_ptr.dtype.element_ty)
    active = (token < tokens)[:, None] & inside[None, :] & _is_active(gate.to(tl.float32), cut)
    taken = tl.max(active.to(tl.int32), 0)
    place, number = tl.where(taken > 0, tl.cumsum(taken, 0) - 1, -1), tl.sum(taken, 0)
    _add_tile(
        0, number, place, gate, x_ptr, up_ptr, down_ptr, part_ptr, cut, size, tokens,
        ACTIVATION, EVEN, TILE, BLOCK, True,
    )  # fmt: skip
    for start in range(TILE, number, TILE):
        tl.debug_barrier()  # other threads read the sums of the tile before
        _add_tile(
            start, number, place, gate, x_ptr, up_ptr, down_ptr, part_ptr, cut, size, tokens,
            ACTIVATION, EVEN, TILE, BLOCK, False,
        )  # fmt: skip


@triton.jit
def _add_tile(  # type: ignore[no-untyped-def]
    start, number, place, gate, x_ptr, up_ptr, down_ptr, part_ptr, cut, size, tokens,
    ACTIVATION: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Add the neurons start to start + TILE of the list to the part; the FIRST tile, also an empty one, begins it.

    gate [LANES, ROWS]; place [ROWS]: where in the list of `number` neurons a row is, or -1.
    """
    LANES: tl.constexpr = gate.shape[0]
    ROWS: tl.constexpr = gate.shape[1]
    segment, present = tl.program_id(0), (tl.arange(0, LANES) < tokens)[:, None]
    ranks = start + tl.arange(0, TILE)
    listed = ranks < number
    row = tl.sum(tl.where(place[None, :] == ranks[:, None], tl.arange(0, ROWS)[None, :], 0), 1)
    neurons = segment * ROWS + row
    chosen = tl.gather(gate, tl.broadcast_to(row[None, :], [LANES, TILE]), 1).to(tl.float32)
    up = _product(x_ptr, up_ptr, neurons, listed, size, tokens, LANES, BLOCK, EVEN)
    hidden = hidden_value(chosen, up.to(gate.dtype).to(tl.float32), cut, ACTIVATION, gate.dtype)
    hidden = tl.where(present & listed[None, :] & _is_active(chosen, cut), hidden, 0.0).to(gate.dtype)
    down_rows = down_ptr + neurons[:, None].to(tl.int64) * size
    part_rows = part_ptr + (segment * tokens + tl.arange(0, LANES))[:, None] * size
    for column in range(0, size, BLOCK):
        columns = (column + tl.arange(0, BLOCK))[None, :]
        down_mask, part_mask = listed[:, None], present
        if not EVEN:
            down_mask, part_mask = down_mask & (columns < size), part_mask & (columns < size)
        down = tl.load(down_rows + columns, down_mask, 0.0)
        if FIRST:
            sums = tl.dot(hidden, down, input_precision="ieee")
        else:
            sums = tl.dot(hidden, down, tl.load(part_rows + columns, part_mask, 0.0), input_precision="ieee")
        tl.store(part_rows + columns, sums, part_mask)


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
def _sum_kernel(  # type: ignore[no-untyped-def]
    part_ptr, out_ptr, parts, total, EARLY: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The parts [parts, total] added up, BLOCK columns of them."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        gdc_wait()
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (column < total)[None, :]
        sums += tl.load(part_ptr + part[:, None] * total + column[None, :], mask, 0.0)
    tl.store(out_ptr + column, tl.sum(sums, 0), column < total)
