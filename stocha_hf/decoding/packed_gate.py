"""Gate prediction on a GPU: a copy of each gate in 4 bits says which neurons can be active, at a quarter of the bytes.

A row has one step, chosen for the least squared error among a few: entries beyond seven steps are cut off. So an entry
can be off by much, and no useful bound on a pre-activation holds. But errors of a row's entries are independent of the
input: that of the pre-activation has a standard deviation of |error of the row|_2 |x|_2 / sqrt(H), and neurons are
skipped that are below the threshold by its quantile. The gates of the others are computed again from all bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch

from stocha_hf.decoding.state import key_of

LIMIT = 7  # steps to each side
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of a row's greatest entry that the limit stands for
ROWS = 4096  # at a time


@dataclass(frozen=True)
class PackedGate:
    """A gate in 4 bits: `codes` int32 [M, H / 8] as triton_prediction.py reads them; `steps` float32 [M], what a unit
    of a code is worth; `slack` float32 [M], what a row's rounding may be worth, times |x|_2. `key` tells whether the
    gate has changed since.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    slack: torch.Tensor
    key: tuple[int, int]

    @classmethod
    def of(cls, gate: torch.Tensor, recall: float) -> PackedGate:
        """Return the copy of a gate [M, H], H a multiple of 8, that misses a share 1 - recall at the threshold."""
        parts = [_of_rows(rows.detach().float(), NormalDist().inv_cdf(recall)) for rows in gate.split(ROWS)]
        codes, steps, slack = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(codes, steps, slack, key_of(gate))

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.codes.nbytes + self.steps.nbytes + self.slack.nbytes


def _of_rows(rows: torch.Tensor, quantile: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    greatest = rows.abs().amax(1).clamp(min=1e-30) / LIMIT
    best = torch.full_like(greatest, float("inf"))
    steps = greatest.clone()
    for share in SHARES:
        error = (_rounded(rows, share * greatest) * (share * greatest)[:, None] - rows).square().sum(1)
        steps = torch.where(error < best, share * greatest, steps)
        best = torch.minimum(error, best)
    codes = torch.zeros(len(rows), rows.shape[1] // 8, dtype=torch.int32, device=rows.device)
    for place, eighth in enumerate((_rounded(rows, steps) + 8).to(torch.int32).chunk(8, 1)):
        codes |= eighth << 4 * place
    return codes, steps, quantile * (best / rows.shape[1]).sqrt()


def _rounded(rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """In steps, a whole number between the limits."""
    return (rows / steps[:, None]).round_().clamp_(-LIMIT, LIMIT)
