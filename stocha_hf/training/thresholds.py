"""FATReLU thresholds of a model, one per layer: chosen to meet a share of zeros, moved while training, applied.

fatrelu_thresholds is ProSparse's last step, the threshold shift (Song et al., arXiv 2402.13516), but with one
threshold per layer, chosen to meet a share of zeros. Shares are those under the model's input cuts, if it has any,
whether it was left in train() or eval(). moved_thresholds is for training under them: called again and
again, it keeps the share where the schedule wants it, and lets training spread the zeros over the layers.

    apply_thresholds(model, fatrelu_thresholds(model, batches, 0.8))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import StochaMLP, stocha_mode
from stocha_hf.models import cutting_everywhere, patched_layers
from stocha_hf.training.entry import change_entry

BINS = 2**17  # of a layer's histogram: non-negative float32 values by all but their lowest 14 bits, so 0.2% wide
SHIFT = 14


def fatrelu_thresholds(model: nn.Module, batches: Sequence[Mapping[str, Any]], target: float) -> list[float]:
    """One threshold per layer, with which the share of zeros over `batches` is `target` under fatrelu, or what plain
    ReLU makes where that is more.

    Every layer is given the same share, except one that plain ReLU takes beyond it: its threshold is 0, and the others
    get less. A threshold changes what the layers after it see, so passes over all batches are repeated, all layers at
    once, until the share that the thresholds in force make is within 0.001 of target; at most layers + 1 times, since
    layer n's input is final after n passes. `batches` are the model's inputs, whose every position counts, padding
    too; ranks that are to agree must be given the same ones.

    ProSparse, arXiv 2402.13516, shifts all layers by one hand-set threshold. Raises StochaError for a target
    of 1 or more.
    """
    if target >= 1:
        raise StochaError(f"the sparsity target is {target}: expected a share of zeros below 1")
    layers = patched_layers(model)
    before = [layer.threshold for layer in layers]
    thresholds = [0.0] * len(layers)
    try:
        for _ in range(len(layers) + 1):
            _set(layers, thresholds)
            shares = _shares_up_to(model, layers, batches)
            if abs(sum(_zeros(shares, thresholds)) / len(layers) - target) < 0.001:
                break
            before_pass, thresholds = thresholds, _meeting(shares, target)
            if thresholds == before_pass:
                break
    finally:
        _set(layers, before)
    return thresholds


def moved_thresholds(model: nn.Module, batches: Sequence[Mapping[str, Any]], target: float) -> list[float]:
    """The thresholds in force, one per layer, moved towards a mean share of zeros of `target` over `batches`.

    Every layer's share of entries that are not zero is scaled by the same factor, but to no more than plain ReLU
    leaves. So training decides how zeros are spread over layers: where it makes a layer fire more, the others pay.
    One pass over the batches: a threshold changes what the layers after it see, which the next move sees.
    """
    layers = patched_layers(model)
    now = [layer.threshold for layer in layers]
    shares = _shares_up_to(model, layers, batches)
    active = 1 - torch.tensor(_zeros(shares, now), dtype=torch.float64)
    most = 1 - torch.stack([share[0] for share in shares])
    low, high = 0.0, 1 / max(active.min().item(), 1e-9)
    for _ in range(60):
        factor = (low + high) / 2
        enough = torch.minimum(active * factor, most).mean() > 1 - target
        low, high = (low, factor) if enough else (factor, high)
    wanted = 1 - torch.minimum(active * high, most)
    return _of_bins([int(torch.searchsorted(share, level)) for share, level in zip(shares, wanted, strict=True)])


def apply_thresholds(model: nn.Module, thresholds: Sequence[float]) -> None:
    """Make fatrelu with these thresholds, one per layer, what `model` trains and infers with, also once it is saved.

    config.json then holds them under `stocha`, and hidden_act "relu" for the native class. Raises StochaError when
    their number is not that of the layers.
    """
    change_entry(model, activation="fatrelu", inference="fatrelu", threshold=list(thresholds))


def _set(layers: list[StochaMLP], thresholds: Sequence[float]) -> None:
    for layer, threshold in zip(layers, thresholds, strict=True):
        layer.threshold = threshold


def _shares_up_to(
    model: nn.Module, layers: list[StochaMLP], batches: Sequence[Mapping[str, Any]]
) -> list[torch.Tensor]:
    """For each layer under fatrelu, the share of gate pre-activations in or below each bin, float64 [BINS], CPU."""
    counts = [torch.zeros(BINS, dtype=torch.int64) for _ in layers]

    def count(layer: int, gate: torch.Tensor) -> None:
        bins = gate.detach().float().contiguous().view(torch.int32) >> SHIFT  # from -BINS to BINS - 1
        # negative values have bins of their own: to a single one, a GPU would add them one by one
        counted = torch.bincount(bins.flatten() + BINS, minlength=2 * BINS).cpu()
        counts[layer] += counted[BINS:]
        counts[layer][0] += counted[:BINS].sum()

    hooks = [
        layer.gate_proj.register_forward_hook(lambda module, args, gate, i=i: count(i, gate))
        for i, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad(), stocha_mode(model, "fatrelu"), cutting_everywhere(model):
            for batch in batches:
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [count.cumsum(0).double() / count.sum() for count in counts]


def _meeting(shares: list[torch.Tensor], target: float) -> list[float]:
    """Thresholds whose shares average to target, as equal as thresholds of 0 or more allow; all 0 where plain ReLU
    makes as many zeros.
    """
    plain = [share[0].item() for share in shares]
    if sum(plain) >= target * len(plain):
        return [0.0] * len(plain)
    level, beyond = target, [False] * len(plain)
    while any(own > level and not out for own, out in zip(plain, beyond, strict=True)):
        beyond = [own > level for own in plain]
        taken = sum(own for own, out in zip(plain, beyond, strict=True) if out)
        level = (target * len(plain) - taken) / beyond.count(False)
    bins = [0 if out else int(torch.searchsorted(share, level)) for share, out in zip(shares, beyond, strict=True)]
    return _of_bins(bins)


def _zeros(shares: list[torch.Tensor], thresholds: Sequence[float]) -> list[float]:
    """The share of zeros of each layer at its threshold."""
    bins = (torch.tensor(thresholds).view(torch.int32) >> SHIFT).tolist()
    return [share[i].item() for share, i in zip(shares, bins, strict=True)]


def _of_bins(bins: list[int]) -> list[float]:
    """The lower ends of bins: the very values for bfloat16, which has no other in a bin."""
    return (torch.tensor(bins, dtype=torch.int32) << SHIFT).view(torch.float32).tolist()
