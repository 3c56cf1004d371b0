"""Which token comes next: the most likely one, or one drawn at a temperature from the most likely ones (top-p).

Drawing needs no sort. The nucleus of top-p (Holtzman et al., arXiv 1904.09751) is all tokens above a probability,
which is found by halving; to sort 150,000 probabilities of 512 rows takes longer than a small model's step on a GPU.
Tokens are drawn by the largest of p / e with e exponential, which nothing waits for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HALVINGS = 20  # of the interval in which the nucleus' least probability lies


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen: `temperature` 0 is greedy; `top_p` below 1 leaves out the least likely tokens."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __call__(self, logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return a token for each row of logits [rows, vocabulary], as int64 [rows]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        chances = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            chances = chances * (chances >= self._least(chances))
        return (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(-1)

    def _least(self, chances: torch.Tensor) -> torch.Tensor:
        """The largest probability [rows, 1] above which tokens add up to `top_p`: a nucleus is never empty."""
        high = chances.amax(-1, keepdim=True)
        low = torch.zeros_like(high)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            enough = (chances * (chances >= middle)).sum(-1, keepdim=True) >= self.top_p
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return low
