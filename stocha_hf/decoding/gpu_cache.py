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
from stocha_hf.decoding.step import tokens_of


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

    def again(
        self, step: GpuStep, text: torch.Tensor, most: int, position: int, start: int, written: int, left: int = 0
    ) -> torch.Tensor:
        """Let steps without cuts compute the last tokens again; return the logits of the last, [1, vocabulary].

        Args:
            step: What has computed the last token, and goes on after it.
            text: int64 [1, length], which that token ends.
            most: Tokens to compute at most, fewer where the cache cannot forget so many.
            position: The last token's.
            start: The first place that is no padding.
            written: Tokens that the cache holds and does not count yet.
            left: Tokens that it is to have room for behind them.
        """
        self._advance(written)
        held = self.rows[0].end
        count = min(most, held - start, *(row.most(text.shape[1]) for row in self.rows))
        sizes = [2**i for i in range(count.bit_length()) if count & 2**i]  # so that no step writes beyond the text
        steps: list[Any] = [self.plan.step(size, cuts=False) for size in sizes]
        for row in self.rows:
            row.rewind(count)
        length = self.prepare([step, *steps], count + left, start > 0)
        assert length is not None, "the cache took these tokens before"
        for used, part in zip(steps, text[0, -count:].split(sizes), strict=True):
            used.set(position + length - held + 1, length, start)
            used.tokens.copy_(part)
            used.replay()
            length += len(part)
        self._advance(count)
        for row in self.rows:
            row.rewind(written)
        return steps[-1].logits[-1:]

    def _lend(self, step: GpuStep) -> None:
        step.use([row.keys[0] for row in self.rows], [row.values[0] for row in self.rows])

    def finish(self, new: int) -> None:
        """Let the cache have the tokens that steps wrote."""
        self._advance(new)
        for row in self.rows:
            row.show()

    def _advance(self, new: int) -> None:
        for row in self.rows:
            row.advance(new)


def repeats(plan: GpuPlan, cutting: Any) -> bool:
    """Return whether there are the steps that `again` takes for a model with this Cutting, None for one without."""
    sizes = [] if cutting is None else [2**i for i in range(tokens_of(cutting).bit_length())]
    return all(plan.step(size, cuts=False) is not None for size in sizes)


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
