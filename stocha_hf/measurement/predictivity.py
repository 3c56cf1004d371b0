"""Predictivity: how well a small network foretells which neurons of a feed-forward layer will be active.

ReLU^2 Wins (arXiv 2402.03804) and ProSparse (arXiv 2402.13516) judge a sparse model by it, since a step that knows
the active neurons beforehand reads nothing else. Each layer has a predictor of its own, hidden_size -> rank -> M with
a ReLU between, trained on the layer's inputs by binary cross-entropy on "this neuron is active". On other text,

    recall             = sum(predicted & active) / sum(active)
    predicted sparsity = 1 - mean(predicted)

A neuron is active where the hidden vector has an entry other than 0: that of a ReLU model, or of any model whose
hidden vectors a selection cuts.

    predictivity(model, train_windows, test_windows, rank=256)
    predictivity(model, train_windows, test_windows, rank=256, selection=METHODS["magnitude"].select(calibration, 0.8))
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import Block, blocks
from stocha_hf.measurement.evaluation import batches
from stocha_hf.measurement.records import Predictivity, Shares
from stocha_hf.measurement.selection.applied import Selection
from stocha_hf.measurement.selection.distributions import watching
from stocha_hf.progress import Progress

LAYERS = 4  # whose inputs and activity are held at a time
BATCH = 1024  # tokens
RATE = 1e-3


def predictivity(
    model: Any,
    train: torch.Tensor,
    test: torch.Tensor,
    *,
    rank: int = 256,
    passes: int = 4,
    selection: Selection | None = None,
    seed: int = 0,
) -> Predictivity:
    """Train a predictor for each layer and measure it on other text.

    Args:
        model: A CausalLM in eval mode.
        train: Token ids, int64 [windows, length], that predictors learn from.
        test: Others, that they are measured on.
        rank: Width of a predictor's middle layer.
        passes: How often each token of `train` is learned from.
        selection: Cuts under which the model runs, or None for its own zeros.
        seed: Of the predictors' first weights and of the order of tokens.

    Returns:
        Recall, predicted and true sparsity, layer by layer.

    Raises:
        StochaError: a layer has no active neuron, or only active ones, so that there is nothing to foretell.
    """
    rows: list[tuple[float, float, float]] = []
    found = blocks(model)
    with Progress(total=len(found), desc="Predicting", unit="layer") as bar:
        for first in range(0, len(found), LAYERS):
            group = range(first, min(first + LAYERS, len(found)))
            seen, unseen = (_activity(model, windows, group, selection) for windows in (train, test))
            for index, learned, judged in zip(group, seen, unseen, strict=True):
                rows.append(_judged(_trained(learned, index, rank, passes, seed + index), judged))
                bar.update()
    recall, predicted, sparsity = ([row[i] for row in rows] for i in range(3))
    return Predictivity(rank, *(Shares(sum(values) / len(rows), values) for values in (recall, predicted, sparsity)))


@torch.no_grad()
def _activity(
    model: Any, windows: torch.Tensor, group: Sequence[int], selection: Selection | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer of a group: the FFN's inputs [tokens, hidden_size], and which neurons are active [tokens, M]."""
    inputs: list[list[torch.Tensor]] = [[] for _ in group]
    active: list[list[torch.Tensor]] = [[] for _ in group]
    chosen: list[Block] = [blocks(model)[index] for index in group]
    # inputs before a selection's cuts, whose hooks come after these; hidden vectors behind them
    before = [(block.linears["gate_proj"], kept.append) for block, kept in zip(chosen, inputs, strict=True)]
    after = [
        (block.linears["down_proj"], lambda hidden, kept=kept: kept.append(hidden != 0))
        for block, kept in zip(chosen, active, strict=True)
    ]
    with watching(before), selection.applied(model) if selection else nullcontext(), watching(after):
        for batch in batches(model, windows, "Reading"):
            model(batch, use_cache=False, logits_to_keep=1)
    return [(_joined(x), _joined(y)) for x, y in zip(inputs, active, strict=True)]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten(0, 1) for part in parts])


def _trained(learned: tuple[torch.Tensor, torch.Tensor], index: int, rank: int, passes: int, seed: int) -> nn.Module:
    inputs, active = learned
    frequency = active.double().mean().item()
    if not 0 < frequency < 1:
        raise StochaError(
            f"layer {index} has {frequency:.0%} active neurons: expected some that are not and some that are; "
            "predictivity is of sparse models, or of others with a selection"
        )
    device = inputs.device
    generator = torch.Generator().manual_seed(seed)
    first, last = nn.Linear(inputs.shape[1], rank), nn.Linear(rank, active.shape[1])
    for linear in (first, last):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(linear.bias)
    predictor = nn.Sequential(first, nn.ReLU(), last).to(device)
    optimizer = torch.optim.Adam(predictor.parameters(), RATE)
    scale = inputs.float().square().mean().sqrt().clamp_min(1e-9)  # the same for all inputs: folded in at the end
    with torch.enable_grad():
        for _ in range(passes):
            for rows in torch.randperm(len(inputs), generator=generator).to(device).split(BATCH):
                logits = predictor(inputs[rows].float() / scale)
                loss = F.binary_cross_entropy_with_logits(logits, active[rows].float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    first.weight.data /= scale
    return predictor


@torch.no_grad()
def _judged(predictor: nn.Module, judged: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float, float]:
    """Recall, predicted sparsity and sparsity."""
    right = predicted = 0
    inputs, active = judged
    for x, y in zip(inputs.split(BATCH), active.split(BATCH), strict=True):
        said = predictor(x.float()) > 0
        right += int((said & y).sum())
        predicted += int(said.sum())
    return right / max(int(active.sum()), 1), 1 - predicted / active.numel(), 1 - active.double().mean().item()
