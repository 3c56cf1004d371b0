"""Which token comes next: the most likely one, or one drawn at a temperature from the most likely ones (top-p).

Drawing needs no sort. The nucleus of top-p (Holtzman et al., arXiv 1904.09751) is all tokens above a probability,
which is found by halving; to sort 150,000 probabilities of 512 rows takes longer than a small model's step on a GPU.
One number between 0 and 1 draws a token: the first one up to which the probabilities add up to more. So a text's
tokens follow from its own numbers, whatever is drawn beside it. A number for each token of the vocabulary would cost
as much as the probabilities do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

HALVINGS = 20  # of the interval in which the nucleus' least probability lies
BLOCK = 256  # tokens that are added up first, so that few numbers need a running sum


def numbers(keys: Sequence[int], places: Sequence[int], count: int) -> torch.Tensor:
    """Return float64 [rows, count], between 0 and 1: those of each text's next tokens, from `places` on.

    They follow from the text's key, 64 bits, and the token's place (splitmix64; Steele et al., OOPSLA 2014).
    """
    steps = np.array(places, np.uint64)[:, None] + np.arange(1, count + 1, dtype=np.uint64)
    bits: Any = np.array(keys, np.uint64)[:, None] + steps * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53)


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen: `temperature` 0 is greedy; `top_p` below 1 leaves out the least likely tokens."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __call__(self, logits: torch.Tensor, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """Return a token for each row of logits [rows, vocabulary], as int64 [rows], drawn by its number between 0 and
        1, float64 [rows]; by any without.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        chances = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            chances = chances * (chances >= self._least(chances))
        if numbers is None:
            numbers = torch.rand(len(logits), dtype=torch.float64, device=logits.device)
        return _drawn(chances, numbers[:, None])

    def _least(self, chances: torch.Tensor) -> torch.Tensor:
        """The largest probability [rows, 1] above which tokens add up to `top_p`: a nucleus is never empty."""
        high = chances.amax(-1, keepdim=True)
        low = torch.zeros_like(high)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            enough = (chances * (chances >= middle)).sum(-1, keepdim=True) >= self.top_p
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return low


def _drawn(chances: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A token for each row of chances [rows, vocabulary] by numbers [rows, 1]: first its block, then in the block."""
    size = chances.shape[1]
    whole = size - size % BLOCK
    sums = chances[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    if whole < size:
        sums = torch.cat([sums, chances[:, whole:].sum(-1, keepdim=True)], 1)
    block, left = _place(sums.double(), numbers)
    places = block * BLOCK + torch.arange(BLOCK, device=chances.device)
    inside = chances.gather(1, places.clamp(max=size - 1)) * (places < size)
    return places.gather(1, _place(inside.double(), left)[0])[:, 0]


def _place(parts: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of `parts` [rows, count] in which these shares of their sum end, and the share of that part before."""
    sums = parts.cumsum(1)
    wanted = numbers * sums[:, -1:]
    place = (sums <= wanted).sum(1, keepdim=True).clamp(max=parts.shape[1] - 1)
    part = parts.gather(1, place)
    return place, ((wanted - sums.gather(1, place)) / part + 1).clamp(0, 1 - 2**-53)
