"""Hardware affinity: how far a layer's active neurons stay the same from token to token, and come together.

ReLU^2 Wins (arXiv 2402.03804) compares activations by it: neurons that were active a moment ago are in a cache, and
those that are active together can be stored and read together.

    reuse over w tokens = mean over t of |A_t & (A_{t-1} | ... | A_{t-w})| / |A_t|
    co-activation gap   = mean over i of max_{j != i} P(j active | i active), less the mean activation frequency

A_t is the set of active neurons at token t: those whose hidden entry is not 0, in the model itself or under a
selection. If neurons fired independently, the gap would be as small as the frequencies differ.

    affinity(model, windows)
    affinity(model, windows, selection=METHODS["magnitude"].select(calibration, 0.8))
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.evaluation import batches
from stocha_hf.measurement.records import Affinity, Shares
from stocha_hf.measurement.selection.applied import Selection
from stocha_hf.measurement.selection.distributions import watching

SPANS = (1, 2, 4, 8, 16)  # tokens that reuse looks back


@torch.no_grad()
def affinity(
    model: Any, windows: torch.Tensor, *, spans: Sequence[int] = SPANS, selection: Selection | None = None
) -> Affinity:
    """Measure reuse and co-activation.

    Args:
        model: A CausalLM in eval mode.
        windows: Token ids, int64 [windows, length]; reuse looks back within a window.
        spans: How many tokens to look back, each below the windows' length.
        selection: Cuts under which the model runs, or None for its own zeros.

    Raises:
        StochaError: a span is not from 1 to below the windows' length.
    """
    if not all(1 <= span < windows.shape[1] for span in spans):
        raise StochaError(f"reuse is to look back {[*spans]} tokens: expected from 1 to {windows.shape[1] - 1}")
    found = blocks(model)
    layers = [_Layer(spans) for _ in found]
    watched = [(block.linears["down_proj"], layer.add) for block, layer in zip(found, layers, strict=True)]
    with selection.applied(model) if selection else nullcontext(), watching(watched):
        for batch in batches(model, windows, "Measuring"):
            model(batch, use_cache=False, logits_to_keep=1)
    reuse = [[layer.reuse(i) for layer in layers] for i in range(len(spans))]
    return Affinity(
        spans=[*spans],
        reuse=[_shares(values) for values in reuse],
        coactivation_gap=_shares([layer.gap() for layer in layers]),
    )


def _shares(values: list[float]) -> Shares:
    return Shares(sum(values) / len(values), values)


class _Layer:
    """One layer's counts over all batches."""

    def __init__(self, spans: Sequence[int]) -> None:
        self._spans = spans
        self._reused = [0.0 for _ in spans]  # sums over tokens of the share that was active before
        self._tokens = [0 for _ in spans]
        self._together: torch.Tensor | float = 0.0  # [M, M]: at how many tokens both were active
        self._seen = 0

    def add(self, hidden: torch.Tensor) -> None:
        """Count a batch [windows, length, M]."""
        active = hidden != 0
        counts = torch.nn.functional.pad(active.int().cumsum(1), (0, 0, 1, 0))  # active at how many tokens before t
        sizes = active.sum(-1)
        for i, span in enumerate(self._spans):
            before = (counts[:, span:-1] - counts[:, : -span - 1]) > 0  # at one of the span tokens before
            now, many = active[:, span:], sizes[:, span:]
            shares = (now & before).sum(-1) / many.clamp_min(1)
            self._reused[i] += shares.sum(dtype=torch.float64).item()
            self._tokens[i] += int((many > 0).sum())
        flat = active.flatten(0, 1).float()
        self._together = self._together + flat.T @ flat
        self._seen += len(flat)

    def reuse(self, i: int) -> float:
        """Over the i-th span; 0 where nothing was active."""
        return self._reused[i] / self._tokens[i] if self._tokens[i] else 0.0

    def gap(self) -> float:
        """The co-activation gap, over the neurons that were ever active."""
        assert isinstance(self._together, torch.Tensor), "read after a forward"
        alone = self._together.diagonal()
        fired = alone > 0
        given = self._together[fired] / alone[fired, None]
        given[:, fired] = given[:, fired].fill_diagonal_(0)
        return (given.amax(1).mean() - (alone / self._seen).mean()).item() if bool(fired.any()) else 0.0
