"""Predictivity and hardware affinity against their definitions, on a ReLU model and on a truncated SiLU model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_model

from stocha_hf import StochaConfig, patch
from stocha_hf.errors import StochaError
from stocha_hf.measurement.affinity import affinity
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.predictivity import predictivity
from stocha_hf.measurement.selection.calibration import Calibration
from stocha_hf.measurement.selection.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))


def relu_model() -> Any:
    model = tiny_model()
    patch(model, StochaConfig(activation="relu"))
    return model


def active_sets(model: Any, selection: Any = None) -> list[list[list[set[int]]]]:
    """By block, window and token."""
    found: list[torch.Tensor] = []
    with selection.applied(model) if selection else torch.no_grad():
        hooks = [
            block.linears["down_proj"].register_forward_pre_hook(lambda module, args: found.append(args[0] != 0))
            for block in blocks(model)
        ]
        model(WINDOWS)
        for hook in hooks:
            hook.remove()
    return [[[set(t.nonzero().flatten().tolist()) for t in window] for window in layer] for layer in found]


@pytest.mark.parametrize("truncated", [False, True])
def test_affinity_is_its_definition(truncated: bool) -> None:
    model = tiny_model() if truncated else relu_model()
    selection = METHODS["magnitude"].select(Calibration(model, WINDOWS), 0.8) if truncated else None
    found = affinity(model, WINDOWS, spans=(1, 3), selection=selection)
    for index, layer in enumerate(active_sets(model, selection)):
        for i, span in enumerate((1, 3)):
            shares = [
                len(now & set().union(*window[t - span : t])) / len(now)
                for window in layer
                for t, now in enumerate(window)
                if t >= span and now
            ]
            assert found.reuse[i].per_layer[index] == pytest.approx(sum(shares) / len(shares))
        tokens = [token for window in layer for token in window]
        gaps = []
        for neuron in range(48):
            holding = [token for token in tokens if neuron in token]
            if holding:
                gaps.append(max(sum(j in t for t in holding) / len(holding) for j in range(48) if j != neuron))
        frequency = sum(map(len, tokens)) / (48 * len(tokens))
        assert found.coactivation_gap.per_layer[index] == pytest.approx(sum(gaps) / len(gaps) - frequency, abs=1e-5)
    assert found.reuse[0].mean < found.reuse[1].mean


def test_predictors_learn_which_neurons_are_active() -> None:
    model = relu_model()
    found = predictivity(model, WINDOWS, WINDOWS, rank=48, passes=60)
    share = sum(len(token) for window in active_sets(model)[1] for token in window) / (6 * 24 * 48)
    assert found.sparsity.per_layer[1] == pytest.approx(1 - share)
    assert found.recall.mean > 0.65 and abs(found.predicted_sparsity.mean - found.sparsity.mean) < 0.1
    selection = METHODS["magnitude"].select(Calibration(model, WINDOWS), 0.8)
    untrained = predictivity(model, WINDOWS, WINDOWS, rank=48, passes=0, selection=selection)
    assert untrained.recall.mean < 0.7 and untrained.sparsity.mean == pytest.approx(0.8, abs=0.01)


def test_a_dense_model_has_nothing_to_predict() -> None:
    with pytest.raises(StochaError, match="layer 0 has 100% active neurons"):
        predictivity(tiny_model(), WINDOWS, WINDOWS)
    with pytest.raises(StochaError, match="expected from 1 to 23"):
        affinity(tiny_model(), WINDOWS, spans=(1, 24))
