"""A transformers cache of one sequence as the place where whole decode steps on a GPU keep keys and values.

The step reads a layer's rows by address, and takes one length for all layers. See cache.py for what a cache shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from stocha_hf.decoding.cache import rows_in, takes
from stocha_hf.decoding.gpu_plan import GpuPlan
from stocha_hf.decoding.gpu_step import GpuStep


class GpuRows:
    """A cache's layers for the steps of a plan."""

    def __init__(self, plan: GpuPlan, cache: Any) -> None:
        self.plan, self.rows = plan, rows_in(cache, len(plan.weights.layers))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of a cache do not take them along

    def prepare(self, steps: Iterable[GpuStep], new: int, is_padded: bool) -> int | None:
        """Make room for new tokens, which the steps are to write; return how many the cache holds.

        None where it would keep them in its own way.
        """
        if not all(row.takes(new, is_padded) for row in self.rows):
            return None
        for row in self.rows:
            row.prepare(new, 0)
        lengths = {row.end for row in self.rows}
        if len(lengths) > 1:
            return None
        for step in steps:
            self._lend(step)
        return lengths.pop()

    def again(self, step: GpuStep, token: torch.Tensor, position: int, length: int, start: int) -> torch.Tensor:
        """Let another step compute a token [1] that one has computed, at its place; return logits [1, vocabulary]."""
        self._lend(step)
        step.set(position, length, start)
        step.tokens.copy_(token)
        step.replay()
        return step.logits

    def _lend(self, step: GpuStep) -> None:
        step.use([row.keys[0] for row in self.rows], [row.values[0] for row in self.rows])

    def finish(self, new: int) -> None:
        """Let the cache have the tokens that steps wrote."""
        for row in self.rows:
            row.advance(new)
            row.show()


def rows_of(plan: GpuPlan, cache: Any) -> GpuRows | None:
    """Return the rows of a cache that holds tokens of one sequence, None where a step cannot read or write it."""
    layers = cache.layers[: len(plan.weights.layers)]
    if not takes(cache) or len(layers) < len(plan.weights.layers):
        return None
    if not all(layer.is_initialized and _fits(plan, layer.keys) and _fits(plan, layer.values) for layer in layers):
        return None
    found = cache.__dict__.get("gpu_rows")
    if found is None or found.plan is not plan:
        found = cache.__dict__["gpu_rows"] = GpuRows(plan, cache)
    return found


def _fits(plan: GpuPlan, part: Any) -> bool:
    weights = plan.weights
    is_like = part.device == weights.head.device and part.dtype == plan.dtype and part.stride(2) == weights.head_dim
    return is_like and (len(part), part.shape[1], part.shape[3]) == (1, weights.key_heads, weights.head_dim)
