"""Shares of inputs to leave out, allotted over all layers by what each cut does to the model's predictions.

Blocks are not alike, and the error of a block's own output does not tell how much the next token cares. So each input
is cut alone, at a few shares, and the divergence of the predictions is measured: a curve of loss against bytes for
every input of every block. Their sum, at a given total of bytes, is least where all curves have the same slope, a
Lagrange multiplier that bisection finds. The sum ignores that cuts act together; docs/experiments/selection.md tells
what that gives.

Projections that read the same vector (query, key and value; gate and up) are cut together. Costs 24 forward passes a
block, so a GPU is the place for it. What the blocks before it compute is the same in all of them, and is kept.

    shares = output_shares(model, windows, input_distributions(model, windows), 0.4)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stocha_hf.cuts import PROJECTIONS, SHARED
from stocha_hf.measurement.blocks import Block, blocks, in_float32
from stocha_hf.measurement.selection.distributions import Distribution
from stocha_hf.measurement.selection.learned import COMPARED_TOKENS, UNCUT, predictions
from stocha_hf.measurement.selection.thresholds import cutting, spread
from stocha_hf.progress import Progress

LEVELS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)  # shares at which a curve is measured
STEP = 0.01  # of a share, to which it is interpolated
MEASURED_TOKENS = 8192  # of text that the curves are measured on, at most
PASS = 8192  # tokens in a pass


def output_shares(
    model: Any,
    windows: torch.Tensor,
    seen: list[dict[str, Distribution]],
    share: float,
    names: Sequence[str] = PROJECTIONS,
) -> list[dict[str, float]]:
    """Allot the inputs that are left out over the whole model.

    Args:
        model: A causal language model.
        windows: Token ids, int64 [windows, length]; as many of them as hold MEASURED_TOKENS tokens are used.
        seen: The distributions of its projections' inputs.
        share: Of the weights of these projections, that are not to be read: 0 to the last of LEVELS.
        names: The projections that leave inputs out, and of whose weights this is the share.

    Returns:
        For each block the share of each of these projections' inputs that is left out.
    """
    if not share:
        return [dict.fromkeys(names, 0.0) for _ in seen]
    return allotted(output_curves(model, windows, seen, names), share)


@dataclass(frozen=True)
class OutputCurve:
    """What cutting one input of a block alone does to the predictions.

    `losses` are at 0 and at LEVELS; `names` are the projections that read the input, `size` their weights.
    """

    block: int
    names: tuple[str, ...]
    size: int
    losses: list[float]


@torch.no_grad()
def output_curves(
    model: Any, windows: torch.Tensor, seen: list[dict[str, Distribution]], names: Sequence[str] = PROJECTIONS
) -> list[OutputCurve]:
    """Measure every input's curve, for any number of `allotted` shares; arguments as of `output_shares`.

    The model is float32 meanwhile, if its projections are in full precision: in bfloat16, rounding alone changes the
    predictions more than a small cut of one input does. As in decoding, a window's first part is not cut.
    """
    some = spread(windows, MEASURED_TOKENS).to(next(model.parameters()).device)
    uncut = some.shape[1] // UNCUT
    groups = [tuple(name for name in shared if name in names) for shared in SHARED]
    found = blocks(model)
    places = [(i, block, group) for i, block in enumerate(found) for group in groups if group]
    passes = some.split(max(PASS // some.shape[1], 1))
    curves = []
    with _precise(model, found), Progress(total=len(places) * len(LEVELS), desc="Allotting", unit="cut") as bar:
        kept = [_recorded(model, found, rows) for rows in passes]
        for i, block, group in places:
            losses = [0.0]
            for level in LEVELS:
                with cutting(block, {name: seen[i][name].radius(level) for name in group}, uncut):
                    losses.append(
                        sum(
                            _divergence(model, rows, found[:i], *of, uncut)
                            for rows, of in zip(passes, kept, strict=True)
                        )
                    )
                bar.update()
            size = sum(block.linears[name].weight.numel() for name in group)
            curves.append(OutputCurve(i, group, size, losses))
    return curves


def allotted(curves: Sequence[OutputCurve], share: float) -> list[dict[str, float]]:
    """Return for each block the share of each projection's inputs that is left out, where curves' slopes are equal."""
    found: list[dict[str, float]] = [{} for _ in range(1 + max(curve.block for curve in curves))]
    given = equal_slopes([curve.losses for curve in curves], [curve.size for curve in curves], share)
    for curve, of_this in zip(curves, given, strict=True):
        found[curve.block] |= dict.fromkeys(curve.names, of_this)
    return found


def equal_slopes(curves: list[list[float]], sizes: Sequence[int], share: float) -> list[float]:
    """Return the share of each curve that saves `share` of all `sizes` with the least sum of losses.

    `curves` are losses at 0 and at LEVELS. Between these the square root is interpolated, since a divergence grows
    like the square of the error. What two neighbouring multipliers give is mixed to save just so much.
    """
    grid = np.arange(0, LEVELS[-1] + STEP / 2, STEP)
    rising = [np.maximum.accumulate(np.maximum(curve, 0.0)) for curve in curves]
    losses = np.stack([np.interp(grid, (0.0, *LEVELS), np.sqrt(curve)) ** 2 for curve in rising])
    weights = np.asarray(sizes) / sum(sizes)

    def at(multiplier: float) -> np.ndarray:
        return grid[(losses - multiplier * np.outer(weights, grid)).argmin(1)]

    low, high = 0.0, 1.0
    while at(high) @ weights < min(share, grid[-1]) - 1e-9:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) @ weights < share else (low, middle)
    less, more = at(low), at(high)
    part = (share - less @ weights) / max((more - less) @ weights, 1e-12)
    return [float(value) for value in less + min(max(part, 0.0), 1.0) * (more - less)]


@contextmanager
def _precise(model: Any, found: list[Block]) -> Iterator[None]:
    """Inside, the model is float32, unless its projections are quantized."""
    plain = all(type(linear) is nn.Linear for block in found for linear in block.linears.values())
    with in_float32(model) if plain else nullcontext():
        yield


def _recorded(model: Any, found: list[Block], rows: torch.Tensor) -> tuple[list[Any], torch.Tensor]:
    """What each block returns for some rows, and the last hidden states."""
    outputs: list[Any] = []
    hooks = [
        block.module.register_forward_hook(lambda *of: outputs.append(of[-1]), prepend=True)  # others see it again
        for block in found
    ]
    try:
        return outputs, model.base_model(rows, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replayed(found: list[Block], outputs: list[Any]) -> Iterator[None]:
    """Inside, these blocks return the outputs without computing them."""
    before = [block.module.__dict__.get("forward") for block in found]
    for block, output in zip(found, outputs, strict=False):
        block.module.forward = lambda *args, output=output, **kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(found, before, strict=True):
            del block.module.forward
            if forward is not None:
                block.module.forward = forward


def _divergence(
    model: Any, rows: torch.Tensor, before: list[Block], outputs: list[Any], expected: torch.Tensor, uncut: int
) -> float:
    """KL from the predictions of the expected last hidden states to those of the model as it is, a sum over tokens.

    The blocks `before` are as they were when they gave the first of the `outputs`; the first tokens do not count.
    """
    with _replayed(before, outputs):
        found = model.base_model(rows, use_cache=False).last_hidden_state
    total = torch.zeros((), device=rows.device)
    parts = (each[:, uncut:].flatten(0, 1).split(COMPARED_TOKENS) for each in (found, expected))
    for one, other in zip(*parts, strict=True):
        total += F.kl_div(predictions(model, one), predictions(model, other), reduction="sum", log_target=True)
    return total.item()
