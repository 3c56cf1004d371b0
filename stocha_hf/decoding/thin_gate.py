"""Gate prediction with a recall on a CPU: a copy of each gate in 2 bits says which neurons can be active.

A row has one step, and its entries are -1.5, -0.5, 0.5 or 1.5 of it: the step of the least squared error that repeated
fits find. Errors are large, so no useful bound on a pre-activation holds, and results cannot be exact. But errors of a
row's entries are independent of the input: that of the pre-activation has a standard deviation of
|error of the row|_2 |x|_2 / sqrt(H). Neurons are skipped that are below the threshold by its quantile, and the gates
of the others are computed from all bits, as without a prediction.

Why 2 bits, and not the gate's own high bits: memory gives single rows so slowly that a row's low halves take as long
as the whole row, and one step a row makes the products of the copy cheap (docs/experiments/decoding.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch

from stocha_hf.decoding.memory import use_large_pages
from stocha_hf.decoding.state import key_of_linear
from stocha_hf.decoding.structs import GateCopy, is_quantized, pointer

UNIT = 64  # columns in 16 bytes of codes: byte j has those of columns j, 16 + j, 32 + j and 48 + j
MIDDLE = 1.5  # what codes 0 to 3 count from
FITS = 4
ROWS = 2048  # at a time
READABLE = 64  # bytes behind the last row, which the kernels may load


@dataclass(frozen=True)
class ThinGate:
    """A gate in 2 bits: `codes` uint8, M rows of H / 4, filled to whole 16 bytes, and some bytes behind them; `steps`
    float32 [M], what a unit of a code is worth; `slack` float32 [M], what a row's rounding may be worth, times |x|_2.
    `key` tells whether the gate has changed since.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    slack: torch.Tensor
    key: tuple[int, int]

    @classmethod
    def of(cls, gate: Any, recall: float) -> ThinGate:
        """Return the copy of a Linear layer, quantized or not, that misses a share 1 - recall at the threshold."""
        quantile = NormalDist().inv_cdf(recall)
        codes, steps, slack = zip(*(_of_rows(rows, quantile) for rows in float_rows(gate)), strict=True)
        tail = torch.zeros(READABLE, dtype=torch.uint8)
        copy = cls(torch.cat([*codes, tail]), torch.cat(steps), torch.cat(slack), key_of_linear(gate))
        use_large_pages(copy.codes)
        return copy

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.codes.nbytes + self.steps.nbytes + self.slack.nbytes

    def structure(self) -> GateCopy:
        """Return it as the kernels take it."""
        return GateCopy(*map(pointer, (self.codes, self.steps, self.slack)))

    def most(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the gates of x [tokens, H] are at most, up to the recall, [tokens, M]: x in 8 bits, as there."""
        step = x.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        rounded = (x.float() / step).round_() * step
        columns = self.unpacked()[:, : x.shape[1]] - MIDDLE
        return rounded @ columns.T * self.steps + x.float().norm(dim=1, keepdim=True) * self.slack

    def unpacked(self) -> torch.Tensor:
        """Return the codes as floats [M, H, filled to whole units]."""
        packed = self.codes[:-READABLE].view(len(self.steps), -1, 1, UNIT // 4)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
        return (packed >> shifts & 3).flatten(1).float()


def float_rows(gate: Any) -> Iterator[torch.Tensor]:
    """Yield a Linear layer's weight as float32, some rows at a time; its rows are outputs."""
    if not is_quantized(gate):
        yield from (rows.float() for rows in gate.weight.detach().split(ROWS))
        return
    count = len(gate.scale)
    yield from (gate.rows(first, min(first + ROWS, count), torch.float32) for first in range(0, count, ROWS))


def _of_rows(rows: torch.Tensor, quantile: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    steps = rows.square().mean(1, keepdim=True).sqrt_().clamp_(min=1e-30)
    for _ in range(FITS):
        levels = _codes(rows, steps).sub_(MIDDLE)
        steps = ((levels * rows).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)).clamp_(min=1e-30)
    codes = _codes(rows, steps)
    error = ((codes - MIDDLE) * steps).sub_(rows).norm(dim=1)
    filled = torch.nn.functional.pad(codes.to(torch.uint8), (0, -rows.shape[1] % UNIT))
    a, b, c, d = filled.view(len(rows), -1, 4, UNIT // 4).unbind(2)
    packed = (a | b << 2 | c << 4 | d << 6).flatten()
    return packed, steps.squeeze(1), quantile * error / rows.shape[1] ** 0.5


def _codes(rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return (rows / steps).add_(MIDDLE).round_().clamp_(0, 2 * MIDDLE)
