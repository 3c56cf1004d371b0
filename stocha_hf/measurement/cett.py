"""Sparsity beyond exact zeros: what a model computes without its neurons of small output, on any activation.

Neuron i of a feed-forward layer adds n_i(x) = hidden_i * W_down[:, i] to the layer's output FFN(x), the sum of them
all. The cumulative errors of tail truncation of a threshold eps (ReLU^2 Wins, arXiv 2402.03804) are

    CETT(eps) = || sum of the n_i with ||n_i|| < eps ||  /  || FFN(x) ||

A given CETT gives each layer its own eps, the largest whose CETT, averaged over tokens, does not exceed it. PPL-p%
sparsity (Sparsing Law, arXiv 2411.02335, algorithm 1) is the share of neurons truncated at the largest CETT, the same
in all layers, whose perplexity is at most p% above the dense one's. As in that paper's published code, the thresholds
come from the dense model's hidden vectors, and sparsity and perplexity are then measured with the truncated entries
set to zero, so that later layers see what earlier ones lost; exact zeros count as truncated.

    curve = CettCurve(model, windows)  # one pass, whatever is asked for afterwards
    at_cett(model, windows, curve, 0.2)  # Truncation(cett=0.2, perplexity=12.9, sparsity=..., thresholds=[...])
    ppl_sparsity(model, windows, curve, dense=12.4, percent=1)

Where the published code searches eps anew for every CETT, CettCurve measures the CETT of POINTS thresholds a layer
once and interpolates between them, so that a bisection over CETT costs one forward pass a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from stocha_hf.measurement.blocks import weight_of
from stocha_hf.measurement.evaluation import batches, evaluate
from stocha_hf.measurement.records import Truncation
from stocha_hf.models import cutting_everywhere, patched_layers
from stocha_hf.progress import Progress

WINDOWS = 8  # that thresholds are taken from: evenly spaced ones of those measured
POINTS = 48  # thresholds of a layer's curve
HALVING = 5  # each point leaves 2^(-1/HALVING) of the neurons that the point before left; the last one none
SAMPLED_SIZES = 2**18  # sizes of contributions, whose quantiles the points are
FLOAT32_TOKENS = 1024  # tokens whose hidden vectors are float32 at a time
STEPS = 10  # of the bisection: the CETT is found to 2^-STEPS


class CettCurve:
    """CETT against threshold for each layer of a patched model, on token ids [windows, length].

    A layer's bias is left out: it is not a neuron's contribution. Raises StochaError for a model without
    patched layers.
    """

    @torch.no_grad()
    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        layers: list[Any] = patched_layers(model)
        self._curves = [_LayerCurve(weight_of(layer.down_proj)) for layer in layers]
        hooks = [
            layer.down_proj.register_forward_pre_hook(lambda module, args, curve=curve: curve.add(args[0]))
            for layer, curve in zip(layers, self._curves, strict=True)
        ]
        try:
            with cutting_everywhere(model):
                for batch in batches(model, windows[:: max(len(windows) // WINDOWS, 1)][:WINDOWS], "Measuring CETT"):
                    model(batch, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()

    def thresholds(self, cett: float) -> list[float]:
        """Each layer's largest threshold of ||n_i|| whose CETT is at most `cett`; 0, truncating nothing, for 0."""
        return [curve.threshold(cett) for curve in self._curves]


class _LayerCurve:
    """The mean CETT over tokens of one layer, whose down_proj has `weight` [H, M], at POINTS thresholds."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._norms = weight.float().norm(dim=0)
        self._points: list[float] = []
        self._sums = torch.zeros(POINTS, dtype=torch.float64)
        self._tokens = 0

    def add(self, hidden: torch.Tensor) -> None:
        """Count the tokens of hidden [..., M]."""
        weight = self._weight.float()
        for part in hidden.flatten(0, -2).split(FLOAT32_TOKENS):
            part = part.float()
            sizes = part.abs() * self._norms
            self._points = self._points or _spread(sizes)
            whole = F.linear(part, weight).norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            tails = (F.linear(part.where(sizes < point, 0), weight).norm(dim=-1) for point in self._points)
            self._sums += torch.stack([(tail / whole).sum() for tail in tails]).double().cpu()
            self._tokens += len(part)

    def threshold(self, cett: float) -> float:
        rising = (self._sums / self._tokens).cummax(0).values  # contributions can cancel, so it may fall a little
        return float(np.interp(cett, rising.numpy(), self._points))


def _spread(sizes: torch.Tensor) -> list[float]:
    """POINTS thresholds from 0 to beyond the largest size, closer together in share where more is truncated."""
    chosen = torch.randint(sizes.numel(), (SAMPLED_SIZES,), generator=torch.Generator().manual_seed(0))
    sample = sizes.flatten()[chosen.to(sizes.device)]
    ordered = sample[sample > 0].sort().values.cpu()
    if len(ordered) == 0:
        return [0.0] * POINTS
    kept = torch.tensor([2 ** (-i / HALVING) for i in range(1, POINTS - 1)])
    inner = ordered[((1 - kept) * len(ordered)).long()].tolist()
    return [0.0, *inner, 1.001 * sizes.max().item()]


@contextmanager
def truncated(model: Any, thresholds: Sequence[float]) -> Iterator[None]:
    """Inside, the hidden entries of a patched model with ||n_i|| below their layer's threshold are 0."""
    layers: list[Any] = patched_layers(model)
    hooks = []
    for layer, threshold in zip(layers, thresholds, strict=True):
        limit = threshold / weight_of(layer.down_proj).float().norm(dim=0)  # [M], of |hidden|
        hooks.append(layer.down_proj.register_forward_pre_hook(lambda module, args, limit=limit: _cut(args, limit)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cut(args: tuple[torch.Tensor, ...], limit: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return args[0].masked_fill(args[0].abs() < limit, 0), *args[1:]


def at_cett(model: Any, windows: torch.Tensor, curve: CettCurve, cett: float) -> Truncation:
    """Measure a model truncated at one CETT.

    Args:
        model: The patched model that `curve` was measured on.
        windows: Token ids, int64 [windows, length].
        curve: Its thresholds.
        cett: From 0, which truncates nothing, to 1.

    Raises:
        StochaError: as `evaluate` does.
    """
    thresholds = curve.thresholds(cett)
    with truncated(model, thresholds):
        found = evaluate(model, windows)
    return Truncation(cett, found.perplexity, found.sparsity, thresholds)


def ppl_sparsity(model: Any, windows: torch.Tensor, curve: CettCurve, dense: float, percent: float) -> Truncation:
    """Find the largest CETT whose perplexity is at most `percent` % above `dense`, and measure the model there.

    Found by bisection, to 2^-STEPS. Where perplexity does not rise with CETT throughout, it is one such crossing.

    Args:
        model: The patched model that `curve` was measured on.
        windows: Token ids, int64 [windows, length].
        curve: Its thresholds.
        dense: Its perplexity on the windows when nothing is truncated.
        percent: Above 0.

    Raises:
        StochaError: as `evaluate` does.
    """
    low, high, best = 0.0, 1.0, None
    for _ in Progress(range(STEPS), desc=f"Looking for PPL-{percent:g}%", unit="step"):
        middle = (low + high) / 2
        found = at_cett(model, windows, curve, middle)
        if found.perplexity <= dense * (1 + percent / 100):
            low, best = middle, found
        else:
            high = middle
    return best or at_cett(model, windows, curve, 0.0)


def truncations(
    model: Any, windows: torch.Tensor, dense: float, cetts: Sequence[float], percent: float | None
) -> dict[str, Any]:
    """Return what stocha-eval tells of a truncated model: `cett`, a list, and `ppl_sparsity`, each if it is asked for.

    `dense` is as in `ppl_sparsity`.
    """
    if not cetts and percent is None:
        return {}
    figures: dict[str, Any] = {}
    curve = CettCurve(model, windows)
    if cetts:
        figures["cett"] = [at_cett(model, windows, curve, cett).to_dict() for cett in cetts]
    if percent is not None:
        found = ppl_sparsity(model, windows, curve, dense, percent)
        figures["ppl_sparsity"] = {"percent": percent} | found.to_dict()
    return figures
