"""The kernels of triton_ffn.py for one token: products by multiply-adds, loads of inactive neurons' rows masked.

A program owns a fixed block of neurons; a masked load costs no memory traffic, so nothing has to be listed. Tensor
cores would take 16 tokens' worth of work for one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Tiles found on an H100 (docs/experiments/decoding.md)
HIDDEN = {"ROWS": 2, "BLOCK": 1024, "num_warps": 1, "num_stages": 1}
DOWN = {"ROWS": 128, "BLOCK": 64, "num_warps": 4, "num_stages": 1}
PROGRAMS = 512  # of the second kernel: it splits the neurons until there are this many


def launch(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    out: torch.Tensor,
    activation: str,
    threshold: float,
) -> None:
    """Write the FFN of x, one token's [..., H], to `out`, on the current GPU."""
    width, size = gate.shape
    blocks = triton.cdiv(size, DOWN["BLOCK"])
    splits = triton.next_power_of_2(min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(width, DOWN["ROWS"])))
    hidden, parts = x.new_empty(width), x.new_empty(splits, size, dtype=torch.float32)
    arrived = x.new_empty(blocks, dtype=torch.int32)
    _hidden_kernel[(max(triton.cdiv(width, HIDDEN["ROWS"]), blocks),)](
        x, gate, up, hidden, arrived, threshold, size, width, blocks, activation, **HIDDEN
    )
    _down_kernel[blocks, splits](hidden, down_t, parts, arrived, out, size, width, splits, **DOWN)


@triton.jit
def _product(x_ptr, w_ptr, rows, taken, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [size] times the taken rows of w, float32 [rows]; and x * 0 summed up, [1]."""
    column = tl.arange(0, BLOCK)
    sums = tl.zeros([rows.shape[0], BLOCK], tl.float32)
    nothing = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        k = (start + column)[None, :]
        x = tl.load(x_ptr + k, k < size, 0.0).to(tl.float32)
        nothing += x * 0.0
        w = tl.load(w_ptr + rows[:, None].to(tl.int64) * size + k, taken[:, None] & (k < size), 0.0)
        sums += w.to(tl.float32) * x
    return tl.sum(sums, 1), tl.sum(nothing, 1)


@triton.jit
def _hidden_kernel(  # type: ignore[no-untyped-def]
    x_ptr, gate_ptr, up_ptr, hidden_ptr, arrived_ptr, cut, size, width, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The hidden vector [width] for ROWS neurons; and the second kernel's counters, set to 0."""
    dtype = hidden_ptr.dtype.element_ty
    program = tl.program_id(0)
    tl.store(arrived_ptr + program, 0, program < blocks)
    rows = program * ROWS + tl.arange(0, ROWS)
    gate, nothing = _product(x_ptr, gate_ptr, rows, rows < width, size, BLOCK)
    gate = gate.to(dtype).to(tl.float32)
    active = (rows < width) & ~((gate <= cut) & (nothing == 0))  # NaN is active
    up = tl.zeros([ROWS], tl.float32)
    if tl.max(active.to(tl.int32), 0) > 0:
        up, _ = _product(x_ptr, up_ptr, rows, active, size, BLOCK)
    hidden = hidden_value(gate, up.to(dtype).to(tl.float32), cut, ACTIVATION, dtype)
    tl.store(hidden_ptr + rows, tl.where(active, hidden, 0.0).to(dtype), rows < width)


@triton.jit
def hidden_value(gate, up, cut, ACTIVATION: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(gate) * up in dtype; gate and up hold rounded numbers in float32."""
    value = gate
    if ACTIVATION == "relu2":
        value = gate * gate
    if ACTIVATION == "shifted_relu":
        value = gate - cut
    if ACTIVATION == "drelu":
        up = tl.where(up <= 0, 0.0, up)
    if ACTIVATION == "silu":
        value = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    else:
        value = tl.where(gate <= cut, 0.0, value).to(dtype).to(tl.float32)
    return (value * up).to(dtype)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr, down_ptr, part_ptr, arrived_ptr, out_ptr, size, width,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of hidden times down, for a split of the neurons; the last split to finish adds all up.

    `hidden` is a row that is turned into a column once for the mask and again, after the loads, as a factor: as a
    vector it is turned once, and the assembler then waits for some rows before it loads the others, which is slower.
    """
    split = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    share = tl.cdiv(width, SPLITS * ROWS) * ROWS
    for start in range(split * share, (split + 1) * share, ROWS):
        rows = start + tl.arange(0, ROWS)
        hidden = tl.load(hidden_ptr + rows[None, :], (rows < width)[None, :], 0.0)
        taken = tl.max((hidden != 0).to(tl.int32), 0) > 0
        mask = taken[:, None] & (columns < size)[None, :]
        down = tl.load(down_ptr + rows[:, None].to(tl.int64) * size + columns[None, :], mask, 0.0)
        sums += tl.trans(hidden).to(tl.float32) * down.to(tl.float32)
    tl.store(part_ptr + split * size + columns, tl.sum(sums, 0), columns < size)
    tl.debug_barrier()  # all threads' sums are stored before the program counts as done
    if tl.atomic_add(arrived_ptr + tl.program_id(0), 1) == SPLITS - 1:
        part = tl.arange(0, SPLITS)[:, None] * size + columns[None, :]
        parts = tl.load(part_ptr + part, (columns < size)[None, :], 0.0, cache_modifier=".cg")
        tl.store(out_ptr + columns, tl.sum(parts, 0), columns < size)
