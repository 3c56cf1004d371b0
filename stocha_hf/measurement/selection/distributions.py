"""How a module's inputs are distributed on given text: quantiles, medians and modes from one pass.

Values are counted in bins of equal width in the float's bits, about 0.4% of the value each: bfloat16 numbers, each
with a bin of its own, are counted exactly, however many there are, in one megabyte a distribution.

    seen = input_distributions(model, windows)  # a mapping of projections' names for each block
    seen[3]["down_proj"].radius(0.4)            # 40% of the inputs are at most so large
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.evaluation import batches

SHIFT = 15  # of a float32's bits: 8 of the exponent and 8 of the mantissa stay
HALF = 2 ** (31 - SHIFT)  # bins of either sign
SHARED = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}  # inputs that are one
MODE_BINS = 400  # between the 0.5% and the 99.5% quantile, of which the fullest is the mode
BISECTIONS = 40


class Distribution:
    """Counts of values, in bins of their float32 bits, in order from the most negative to the largest."""

    def __init__(self) -> None:
        self._counts: torch.Tensor | int = 0  # int64 with what is added: float32 counts no further than 2^24
        self._cumulative: np.ndarray | None = None

    def add(self, values: torch.Tensor) -> None:
        """Count the values of a tensor of any shape and float dtype."""
        bits = values.detach().float().flatten().view(torch.int32)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT  # as the floats are ordered
        self._counts = self._counts + torch.bincount(ordered + HALF, minlength=2 * HALF)
        self._cumulative = None

    def below(self, value: float) -> float:
        """The share of values that are at most `value`, interpolated within its bin."""
        return float(np.interp(value, EDGES, self._shares()))

    def quantile(self, share: float) -> float:
        """The value that `share` of the values are at most."""
        shares = self._shares()
        first = int(np.searchsorted(shares, 0.0, side="right"))  # bins before are empty
        after = min(max(int(np.searchsorted(shares, share)), first), len(EDGES) - 1)
        low, high = shares[after - 1], shares[after]
        part = (share - low) / (high - low) if high > low else 0.0
        return float(EDGES[after - 1] + part * (EDGES[after] - EDGES[after - 1]))

    def radius(self, share: float, centre: float = 0.0) -> float:
        """The distance from `centre` within which `share` of the values are; 0 for 0."""
        if share <= 0:
            return 0.0
        low, high = 0.0, max(abs(self.quantile(0.0) - centre), abs(self.quantile(1.0) - centre))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            within = self.below(centre + middle) - self.below(centre - middle)
            low, high = (middle, high) if within < share else (low, middle)
        return high

    def median(self) -> float:
        """The value that half of the values are at most."""
        return self.quantile(0.5)

    def mode(self) -> float:
        """The middle of the fullest of MODE_BINS equal bins, the thinnest tails left out."""
        edges = np.linspace(self.quantile(0.005), self.quantile(0.995), MODE_BINS + 1)
        fullest = int(np.argmax(np.diff([self.below(edge) for edge in edges])))
        return float((edges[fullest] + edges[fullest + 1]) / 2)

    def _shares(self) -> np.ndarray:
        """The share of values up to each edge, for which nothing may be counted twice."""
        if self._cumulative is None:
            assert isinstance(self._counts, torch.Tensor), "read after values were added"
            counts = self._counts.cpu().numpy()
            self._cumulative = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
        return self._cumulative


def _edges() -> np.ndarray:
    """The lower edge of every bin and the upper one of the last; the largest float stands for what is beyond it."""
    keys = (np.arange(HALF + 1, dtype=np.int64) << SHIFT).astype(np.uint32)
    keys = np.minimum(keys, np.float32(np.finfo(np.float32).max).view(np.uint32))
    positive = keys.view(np.float32).astype(np.float64)
    return np.concatenate([-positive[:0:-1], positive])


EDGES = _edges()


def input_distributions(model: nn.Module, windows: torch.Tensor) -> list[dict[str, Distribution]]:
    """The distribution of every projection's inputs on token ids [windows, length]: one mapping a block.

    q, k and v read the same input and share a distribution; so do gate and up.
    """
    found: list[dict[str, Distribution]] = []
    watched: list[tuple[nn.Module, Distribution]] = []
    for block in blocks(model):
        row: dict[str, Distribution] = {}
        for name in ("q_proj", "o_proj", "gate_proj", "down_proj"):
            seen = Distribution()
            row |= dict.fromkeys(SHARED.get(name, (name,)), seen)
            watched.append((block.linears[name], seen))
        found.append(row)
    observe(model, windows, [(module, seen.add) for module, seen in watched])
    return found


@torch.no_grad()
def observe(
    model: nn.Module,
    windows: torch.Tensor,
    watched: Sequence[tuple[nn.Module, Callable[[torch.Tensor], object]]],
    outputs: bool = False,
) -> None:
    """Run a model on token ids [windows, length] and show each module's inputs (or outputs) to its function."""
    with watching(watched, outputs):
        for batch in batches(model, windows, "Calibrating"):
            model(batch, use_cache=False, logits_to_keep=1)


@contextmanager
def watching(
    watched: Sequence[tuple[nn.Module, Callable[[torch.Tensor], object]]], outputs: bool = False
) -> Iterator[None]:
    """Inside, each module's first input (or its output) is shown to its function."""
    hooks = []
    for module, show in watched:
        if outputs:
            hooks.append(module.register_forward_hook(lambda m, args, out, show=show: _nothing(show(out))))
        else:
            hooks.append(module.register_forward_pre_hook(lambda m, args, show=show: _nothing(show(args[0]))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _nothing(_: object) -> None:
    """What a hook returns that changes nothing."""
