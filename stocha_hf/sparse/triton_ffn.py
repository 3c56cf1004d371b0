"""The sparse FFN of a decode step on a GPU, in two Triton kernels, for 1 to 8 tokens.

The first multiplies all gate rows, decides which neurons are active and reads only their rows of up; the second adds
up the active neurons' rows of the transposed down projection. What is active never leaves the GPU and no shape depends
on it, so that CUDA graphs can record both: each program owns a fixed block of neurons and masks the loads of inactive
rows, which then cost no memory traffic. Sums are split over programs and added in a fixed order by the last of them:
the same input gives the same bits.

Rounding follows PyTorch's dense path, as in kernels.cpp: gate, up, activation and hidden are rounded to the weights'
type, sums are in float32. Where a token holds infinities or NaN, all neurons are active, since 0 * inf is NaN.

    ffn(x, gate, up, down_t, "relu", 0.0)  # = W_down(act(W_gate x) * (W_up x)) on the GPU of x

`TRITON_INTERPRET=1 pytest tests/test_triton.py` runs the kernels on CPU tensors (Triton 3.6 needs NumPy < 2.4 for it).
"""

from __future__ import annotations

import warnings

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# Tiles for one token, and for more, which the tensor cores take; found on an H100 (docs/decode.md)
HIDDEN = {
    1: {"ROWS": 2, "BLOCK": 1024, "num_warps": 1, "num_stages": 1},
    16: {"ROWS": 64, "BLOCK": 128, "num_warps": 2, "num_stages": 4},
}
DOWN = {
    1: {"ROWS": 128, "BLOCK": 64, "num_warps": 4, "num_stages": 1},
    16: {"ROWS": 64, "BLOCK": 64, "num_warps": 2, "num_stages": 3},
}
PROGRAMS = 512  # of the second kernel: it splits the neurons until there are this many
_failures: list[Exception] = []


def available() -> bool:
    """Whether Triton is installed and has not failed yet."""
    return triton is not None and not _failures


def ffn(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down_t: torch.Tensor, activation: str, threshold: float
) -> torch.Tensor | None:
    """A gated FFN on x [..., H] of 1 to 8 tokens; gate, up and the transposed down are contiguous, [M, H].

    All on one GPU and of one dtype: bfloat16, float16 or float32. Equals PyTorch's dense path within the rounding of
    sums, but for infinite or NaN weights of skipped neurons. None, after one warning that names the cause, where
    Triton cannot build the kernels.
    """
    (width, size), tokens = gate.shape, x.numel() // x.shape[-1]
    lanes = 1 if tokens == 1 else 16
    blocks = _cover(size, DOWN[lanes]["BLOCK"])
    splits = 1 << (min(_cover(PROGRAMS, blocks), _cover(width, DOWN[lanes]["ROWS"])) - 1).bit_length()
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    hidden, parts = x.new_empty(tokens, width), x.new_empty(splits, tokens, size, dtype=torch.float32)
    arrived = x.new_empty(blocks, dtype=torch.int32)
    try:
        with torch.cuda.device(x.get_device()):  # Triton launches on the current one
            _hidden_kernel[(max(_cover(width, HIDDEN[lanes]["ROWS"]), blocks),)](
                x, gate, up, hidden, arrived, float(threshold), size, width, tokens, blocks, activation, lanes,
                **HIDDEN[lanes],
            )  # fmt: skip
            _down_kernel[blocks, splits](
                hidden, down_t, parts, arrived, out, size, width, tokens, splits, lanes, **DOWN[lanes]
            )
    except Exception as error:  # of the compiler, the linker, the driver: Triton has no common class
        _failures.append(error)
        warnings.warn(
            f"stocha_hf's Triton kernels cannot be built, so decoding on the GPU is dense: {error!r}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return out


def _cover(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


if triton is not None:

    @triton.jit
    def _product(x_ptr, w_ptr, rows, taken, size, tokens, LANES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
        """x [tokens, size] times the taken rows of w, float32 [LANES, rows]; and x * 0 summed up [LANES]."""
        column, token = tl.arange(0, BLOCK), tl.arange(0, LANES)
        sums = tl.zeros([rows.shape[0], BLOCK] if LANES == 1 else [LANES, rows.shape[0]], tl.float32)
        nothing = tl.zeros([LANES, BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            k = start + column
            x_mask = (token < tokens)[:, None] & (k < size)[None, :]
            x = tl.load(x_ptr + token[:, None] * size + k[None, :], x_mask, 0.0)
            nothing += x.to(tl.float32) * 0.0
            w_mask = taken[:, None] & (k < size)[None, :]
            w = tl.load(w_ptr + rows[:, None].to(tl.int64) * size + k[None, :], w_mask, 0.0)
            if LANES == 1:
                sums += w.to(tl.float32) * x.to(tl.float32)
            else:
                sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
        if LANES == 1:
            sums = tl.sum(sums, 1)[None, :]
        return sums, tl.sum(nothing, 1)

    @triton.jit
    def _hidden_kernel(  # type: ignore[no-untyped-def]
        x_ptr, gate_ptr, up_ptr, hidden_ptr, arrived_ptr, cut, size, width, tokens, blocks,
        ACTIVATION: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The hidden vectors [tokens, width] for ROWS neurons; and the second kernel's counters, set to 0."""
        dtype = hidden_ptr.dtype.element_ty
        program, token = tl.program_id(0), tl.arange(0, LANES)
        tl.store(arrived_ptr + program, 0, program < blocks)
        rows = program * ROWS + tl.arange(0, ROWS)
        gate, nothing = _product(x_ptr, gate_ptr, rows, rows < width, size, tokens, LANES, BLOCK)
        gate = gate.to(dtype).to(tl.float32)
        inside = (token < tokens)[:, None] & (rows < width)[None, :]
        active = inside & ~((gate <= cut) & (nothing == 0)[:, None])  # NaN is active
        taken = tl.max(active.to(tl.int32), 0) > 0
        up = tl.zeros([LANES, ROWS], tl.float32)
        if tl.max(taken.to(tl.int32), 0) > 0:
            up, _ = _product(x_ptr, up_ptr, rows, taken, size, tokens, LANES, BLOCK)
        up = up.to(dtype).to(tl.float32)
        value = gate
        if ACTIVATION == "relu2":
            value = gate * gate
        if ACTIVATION == "shifted_relu":
            value = gate - cut
        if ACTIVATION == "drelu":
            up = tl.where(up <= 0, 0.0, up)
        value = tl.where(gate <= cut, 0.0, value).to(dtype).to(tl.float32)
        hidden = tl.where(active, value * up, 0.0).to(dtype)
        tl.store(hidden_ptr + token[:, None] * width + rows[None, :], hidden, inside)

    @triton.jit
    def _down_kernel(  # type: ignore[no-untyped-def]
        hidden_ptr, down_ptr, part_ptr, arrived_ptr, out_ptr, size, width, tokens,
        SPLITS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """BLOCK columns of hidden times down, for a split of the neurons; the last split to finish adds all up."""
        split, token = tl.program_id(1), tl.arange(0, LANES)
        columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros([ROWS if LANES == 1 else LANES, BLOCK], tl.float32)
        share = tl.cdiv(width, SPLITS * ROWS) * ROWS
        for start in range(split * share, (split + 1) * share, ROWS):
            rows = start + tl.arange(0, ROWS)
            inside = (token < tokens)[:, None] & (rows < width)[None, :]
            hidden = tl.load(hidden_ptr + token[:, None] * width + rows[None, :], inside, 0.0)
            taken = tl.max((hidden != 0).to(tl.int32), 0) > 0
            mask = taken[:, None] & (columns < size)[None, :]
            down = tl.load(down_ptr + rows[:, None].to(tl.int64) * size + columns[None, :], mask, 0.0)
            if LANES == 1:
                sums += tl.trans(hidden).to(tl.float32) * down.to(tl.float32)
            else:
                sums = tl.dot(hidden, down, sums, input_precision="ieee")
        if LANES == 1:
            sums = tl.sum(sums, 0)[None, :]
        inside = (token < tokens)[:, None] & (columns < size)[None, :]
        tl.store(part_ptr + (split * tokens + token)[:, None] * size + columns[None, :], sums, inside)
        tl.debug_barrier()  # all threads' sums are stored before the program counts as done
        if tl.atomic_add(arrived_ptr + tl.program_id(0), 1) == SPLITS - 1:
            for t in range(tokens):
                part = (tl.arange(0, SPLITS) * tokens + t)[:, None] * size + columns[None, :]
                parts = tl.load(part_ptr + part, (columns < size)[None, :], 0.0, cache_modifier=".cg")
                tl.store(out_ptr + t * size + columns, tl.sum(parts, 0), columns < size)
