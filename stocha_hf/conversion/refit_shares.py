"""How many zeros each layer gets so that their mean is the wanted share: most where they cost least.

What is lost by zeroing a neuron for a token is its contribution to the stream: gate times up times its column of
W_down. One limit for all layers, on that contribution relative to the stream's norm, which the next norm divides by,
gives each layer its share. Measured on the original model in one pass over a few windows; refitting comes afterwards.

    shares = allocate(layers, token_ids, 0.9)   # mean 0.9
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stocha_hf.conversion.layerwise import Layers, autocast
from stocha_hf.conversion.refit_ffn import FFN, contribution_scale

GRID = 1000  # quantiles that stand for a layer's contributions
MOST_CONTRIBUTIONS = 1_000_000  # contributions that they are taken from


def allocate(layers: Layers, tokens: torch.Tensor, target: float) -> list[float]:
    """Each layer's share of zeros, with the mean `target`; never less than plain ReLU makes, nor 1.

    `tokens` [windows, length] is one batch. Where plain ReLU makes more than `target` in the mean, its own shares.
    """
    hidden = layers.embed(tokens)
    rows = []
    for index in range(len(layers)):
        with layers.load(index) as layer:
            found, hidden = _contributions(layers, layer, index, hidden)
        rows.append(found)
    quantiles = torch.stack(rows)
    limits = quantiles.flatten().sort().values
    # the least limit whose shares reach the target, as mean share grows with the limit
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _shares(quantiles, limits[middle]).mean() >= target else (middle + 1, high)
    return _shares(quantiles, limits[low]).clamp(max=1 - 1 / GRID).tolist()


def _shares(quantiles: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    return (quantiles <= limit).double().mean(1)


@torch.no_grad()
def _contributions(layers: Layers, layer: Any, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GRID quantiles of the layer's contributions under ReLU, and the original model's stream after the layer."""
    stream, inputs = layers.attention(layer, index, hidden)
    with autocast(layers.device):
        after = stream + layers.after_ffn(layer, layer.mlp(inputs)).float()
    flat = inputs.flatten(0, 1)
    ffn = FFN(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight)
    gates = F.relu(F.linear(flat, ffn.gate)) * contribution_scale(ffn, flat)
    found = (gates / after.flatten(0, 1).norm(dim=1, keepdim=True)).flatten()
    found = found[:: max(len(found) // MOST_CONTRIBUTIONS, 1)].sort().values
    return found.cpu()[(torch.arange(GRID) + 0.5).mul(len(found) / GRID).long()], after
