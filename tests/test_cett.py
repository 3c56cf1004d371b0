"""CETT and PPL-p% sparsity against a naive per-neuron reference, and their bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import call_command, tiny_model

from stocha_hf import StochaConfig, patch
from stocha_hf.errors import StochaError
from stocha_hf.measurement.cett import CettCurve, at_cett, ppl_sparsity, truncated
from stocha_hf.measurement.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = torch.randint(64, (6, 40), generator=torch.Generator().manual_seed(0))


def patched(activation: str) -> Any:
    model = tiny_model(intermediate_size=96)
    patch(model, StochaConfig(activation=activation))
    return model


def hidden_vectors(model: Any) -> list[torch.Tensor]:
    """Of each layer [tokens, M], float64."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, 1)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(WINDOWS)
    for hook in hooks:
        hook.remove()
    return [hidden.double() for hidden in found]


def naive_cett(hidden: torch.Tensor, weight: torch.Tensor, threshold: float) -> float:
    """By the definition, neuron by neuron; [tokens, M] and [H, M]."""
    outputs = hidden[:, :, None] * weight.double().t()  # [tokens, M, H]: what each neuron adds
    tail = outputs * (outputs.norm(dim=-1, keepdim=True) < threshold)
    return (tail.sum(1).norm(dim=-1) / outputs.sum(1).norm(dim=-1)).mean().item()


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_thresholds_have_the_cett_that_was_asked_for(activation: str) -> None:
    model = patched(activation)
    curve, hidden = CettCurve(model, WINDOWS), hidden_vectors(model)
    for cett in (0.05, 0.2, 0.5):
        for i, threshold in enumerate(curve.thresholds(cett)):
            found = naive_cett(hidden[i], model.model.layers[i].mlp.down_proj.weight, threshold)
            assert found == pytest.approx(cett, rel=0.05)


def test_truncation_sets_small_contributions_to_zero_and_no_others() -> None:
    model = patched("silu")
    (dense, _), weight = hidden_vectors(model), model.model.layers[0].mlp.down_proj.weight
    with truncated(model, [0.3, 0.0]):
        cut, _ = hidden_vectors(model)
    small = dense.abs() * weight.norm(dim=0) < 0.3
    assert 0.1 < small.double().mean() < 0.9
    assert torch.equal(cut, dense.masked_fill(small, 0))
    assert torch.equal(hidden_vectors(model)[0], dense)  # as before, afterwards


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_at_cett_0_the_model_is_the_dense_one(activation: str) -> None:
    model = patched(activation)
    dense, found = evaluate(model, WINDOWS), at_cett(model, WINDOWS, CettCurve(model, WINDOWS), 0.0)
    assert found.perplexity == dense.perplexity
    assert found.sparsity == dense.sparsity
    assert found.thresholds == [0.0, 0.0]


def test_sparsity_rises_with_cett_in_every_layer() -> None:
    model = patched("silu")
    curve = CettCurve(model, WINDOWS)
    found = [at_cett(model, WINDOWS, curve, cett) for cett in (0.0, 0.02, 0.1, 0.3, 0.6, 0.9)]
    for layer in range(2):
        shares = [point.sparsity.per_layer[layer] for point in found]
        assert shares == sorted(set(shares)) and shares[0] == 0 and shares[-1] > 0.6


@pytest.mark.parametrize("percent", [1, 20])
def test_ppl_sparsity_is_the_most_that_its_bound_allows(percent: int) -> None:
    model = patched("relu")
    windows = greedy_windows(model)
    dense, curve = evaluate(model, windows), CettCurve(model, windows)
    found = ppl_sparsity(model, windows, curve, dense.perplexity, percent)
    bound = (1 + percent / 100) * dense.perplexity
    assert dense.perplexity < found.perplexity <= bound
    assert found.sparsity.mean > dense.sparsity.mean
    assert at_cett(model, windows, curve, found.cett + 2**-10).perplexity > bound


def greedy_windows(model: Any) -> torch.Tensor:
    """Text that the model itself predicts, so that truncating its neurons costs perplexity."""
    start = torch.randint(3, 64, (6, 1), generator=torch.Generator().manual_seed(0))
    return model.generate(start, max_new_tokens=39, min_new_tokens=39, do_sample=False, pad_token_id=0)


def test_a_layer_whose_hidden_vectors_are_zero_has_nothing_to_truncate() -> None:
    model = patched("relu")
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    found = at_cett(model, WINDOWS, CettCurve(model, WINDOWS), 0.2)
    assert found.sparsity.per_layer[1] == 1.0 and found.thresholds[1] == 0.0


def test_a_native_model_is_refused() -> None:
    with pytest.raises(StochaError, match="no stochastic layers"):
        CettCurve(tiny_model(), WINDOWS)


@pytest.mark.slow
def test_the_command_tells_the_curve_and_draws_it(checkpoint, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + i % 60}" for i in range(500)))
    options = ["--data", text, "--length", 32, "--dtype", "float32", "--mode", "relu"]
    truncate = ["--cett", 0.1, 0.3, "--ppl-increase", 2]
    source, picture = checkpoint(), tmp_path / "curve.png"
    done = call_command("stocha-eval", source, *options, *truncate, "--plot", picture, "--json")
    figures = json.loads(done.stdout)
    zeros = [figures["sparsity"]["mean"], *(point["sparsity"]["mean"] for point in figures["cett"])]
    assert zeros == sorted(set(zeros)) and [point["cett"] for point in figures["cett"]] == [0.1, 0.3]
    assert figures["ppl_sparsity"]["percent"] == 2
    assert figures["ppl_sparsity"]["perplexity"] <= 1.02 * figures["perplexity"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = call_command("stocha-eval", source, *options, "--cett", 0.3).stdout
    point = figures["cett"][1]
    expected = f"CETT 0.3: zeros {point['sparsity']['mean']:.1%}, perplexity {point['perplexity']:.3f}"
    assert expected in told
