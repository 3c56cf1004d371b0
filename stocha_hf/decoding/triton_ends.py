"""The ends of a decode step on a GPU: the embedding, and the head with the most likely next token.

So that no host takes part between tokens, the token, its position and the cache's length are numbers on the GPU:
`state` as in triton_attention.py. The last kernel of a step of one token writes there what the next one begins with.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stocha_hf.decoding.triton_products import product

LOW: tl.constexpr = tl.constexpr(0xFFFFFFFF)
LEAST: tl.constexpr = tl.constexpr(-(2**63))


@triton.jit
def embed_kernel(  # type: ignore[no-untyped-def]
    state_ptr, embedding_ptr, frequency_ptr, scaling, x_ptr, angle_ptr, count_ptr, counts, COUNTS: tl.constexpr,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    """The row of a program's token [SIZE]; cosines and sines of its position [2, HALF], in x's type as PyTorch's are;
    counts of 0.

    It starts when the step before is through, and the next kernel when it is: others read the state early.
    """
    token = tl.program_id(0)
    column, angle, count = tl.arange(0, COLUMNS), tl.arange(0, ANGLES), tl.arange(0, COUNTS)
    tl.store(count_ptr + count, tl.zeros([COUNTS], tl.int32), count < counts)
    row = embedding_ptr + tl.load(state_ptr + 3 + token) * SIZE
    tl.store(x_ptr + token * SIZE + column, tl.load(row + column, column < SIZE, 0.0), column < SIZE)
    turn = tl.load(frequency_ptr + angle, angle < HALF, 0.0) * (tl.load(state_ptr) + token).to(tl.float32)
    dtype = angle_ptr.dtype.element_ty
    angle_ptr += token * 2 * HALF
    tl.store(angle_ptr + angle, (tl.cos(turn) * scaling).to(dtype), angle < HALF)
    tl.store(angle_ptr + HALF + angle, (tl.sin(turn) * scaling).to(dtype), angle < HALF)


@triton.jit
def head_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, eps, head_ptr, bias_ptr, logits_ptr, best_ptr, listed_ptr, vocabulary,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr, SLOTS: tl.constexpr, LISTED: tl.constexpr,
    EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits [TOKENS, vocabulary], float32 rounded to x's type; of one token, the greatest in `best` int64 [SLOTS],
    above the complement of its row.

    So a maximum of integers finds the greatest logit, of equal ones that of the least row. LISTED: of the rows in
    `listed` int64 [vocabulary] only; -1 is none, and has a logit of -inf.
    """
    if EARLY:
        gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, to = rows < vocabulary, rows
    stored = inside
    if LISTED:
        rows = tl.load(listed_ptr + to, inside, -1)
        inside = rows >= 0
    logits, squares = product(x_ptr, norm_ptr, head_ptr, rows, inside, SIZE, TOKENS, True, EARLY, BLOCK)
    logits *= tl.rsqrt(squares / SIZE + eps)
    if BIAS:
        logits += tl.load(bias_ptr + rows, inside, 0.0).to(tl.float32)[None, :]
    logits = logits.to(x_ptr.dtype.element_ty).to(tl.float32)
    if LISTED:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    place = tl.arange(0, TOKENS)[:, None] * vocabulary + to[None, :]
    tl.store(logits_ptr + place, logits, stored[None, :])
    if TOKENS == 1:
        bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)  # -0 equals 0
        order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        key = tl.where(inside[None, :], (order << 32) | (LOW - rows[None, :].to(tl.int64)), LEAST)
        tl.atomic_max(best_ptr + tl.program_id(0) % SLOTS, tl.max(tl.max(key, 1), 0))


@triton.jit
def next_kernel(  # type: ignore[no-untyped-def]
    best_ptr, state_ptr, chosen_ptr, SLOTS: tl.constexpr, RING: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Make the most likely token the next step's, and note it in chosen, int64 [RING], by its place in the cache."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.arange(0, SLOTS)
    token = LOW - (tl.max(tl.load(best_ptr + slot), 0) & LOW)
    tl.store(best_ptr + slot, tl.full([SLOTS], LEAST, tl.int64))
    length = tl.load(state_ptr + 1) + 1
    tl.store(state_ptr, tl.load(state_ptr) + 1)
    tl.store(state_ptr + 1, length)
    tl.store(state_ptr + 3, token)
    tl.store(chosen_ptr + length % RING, token)


@triton.jit
def drafted_kernel(  # type: ignore[no-untyped-def]
    best_ptr, logits_ptr, state_ptr, chosen_ptr, count,
    SLOTS: tl.constexpr, RING: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As next_kernel, of the logits [count] of a draft; above the token stand the bits of its probability, float32.

    Both are in one number, so that a host that sees one sees the other.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    slot, one = tl.arange(0, SLOTS), tl.arange(0, 1)
    best = tl.load(best_ptr + slot)
    tl.store(best_ptr + slot, tl.full([SLOTS], LEAST, tl.int64))
    token = LOW - (tl.max(best, 0) & LOW)
    order = (best >> 32).to(tl.int32)
    value = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)
    highest = tl.max(tl.where(best == LEAST, float("-inf"), value), 0)
    total = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)[None, :]
        total += tl.exp(tl.load(logits_ptr + place, place < count, float("-inf")) - highest)
    bits = (1.0 / tl.sum(total, 1)).to(tl.int32, bitcast=True)
    length = tl.load(state_ptr + 1) + 1
    tl.store(state_ptr, tl.load(state_ptr) + 1)
    tl.store(state_ptr + 1, length)
    tl.store(state_ptr + 3, token)
    tl.store(chosen_ptr + length % RING + one, (bits.to(tl.int64) << 32) | token)
