"""What a run trained on since its last log: losses and tokens, summed on the device, so that no step waits for one.

totals.add(losses, error, seen)                  # at every step
logs |= totals.read(accelerator)                 # when something is logged: this waits
"""

from __future__ import annotations

import time
from typing import Any

import torch

from stocha_hf.training.losses import Losses


class Totals:
    """Sums over the steps since the last read, of one rank.

    Args:
        device: where the losses are.
    """

    def __init__(self, device: torch.device) -> None:
        self._losses = torch.zeros(3, device=device)  # nll, kl and the layers' error, each times tokens
        self._tokens = torch.zeros(2, dtype=torch.int64, device=device)  # with a loss; all
        self._last_read = time.monotonic()

    def add(self, losses: Losses, error: torch.Tensor, seen: torch.Tensor) -> None:
        """Count a step: its losses, the error of its layers times its tokens, and all its tokens."""
        self._losses += torch.stack([losses.nll, losses.kl, error.detach()])
        self._tokens += torch.stack([losses.tokens, seen])

    def read(self, accelerator: Any) -> dict[str, Any]:
        """Return all ranks' means a token, their tokens (`seen`) and tokens per second, and begin anew."""
        nll, kl, error = accelerator.reduce(self._losses, reduction="sum").tolist()
        tokens, seen = accelerator.reduce(self._tokens, reduction="sum").tolist()
        self._losses.zero_()
        self._tokens.zero_()
        before, self._last_read = self._last_read, time.monotonic()
        counted = max(tokens, 1)
        return {
            "seen": seen,
            "tokens_per_second": round(seen / (self._last_read - before), 1),
            "lm_loss": nll / counted,
            "kl": kl / counted,
            "hidden_error": error / counted,
        }
