"""The activations: identities, statistics and gradients of StochA, and the definitions of the other rows of the table.

StochA is random, so its tests are properties. Bounds on frequencies are six standard deviations of the binomial,
computed in the test: a true failure rate of 2e-9 a check, and the seeds are fixed besides.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import first_is_fast, tiny_model
from torch import nn

from stocha_hf.modeling_stocha import (
    ACTIVATIONS,
    FUNCTIONS,
    POSITIVE_SIDES,
    StochaConfig,
    hidden_vector,
    stocha_mlps,
)
from stocha_hf.patching import patch

SIZE = (64, 2048)


class Ffn(nn.Module):
    """The part of a StochaMLP that the activation functions read."""

    def __init__(self, p: float = 0.3, positive: str = "silu", threshold: float = 0.0, k: int = 1) -> None:
        super().__init__()
        self.base = "silu"
        self.p, self.positive, self.threshold, self.k = p, positive, threshold, k


def run(name: str, gate: torch.Tensor, up: torch.Tensor | None = None, **state: object) -> torch.Tensor:
    ffn = Ffn(**state)  # type: ignore
    ffn.running = name
    return hidden_vector(gate, torch.ones_like(gate) if up is None else up, ffn)  # type: ignore


@pytest.fixture
def gate() -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_p0_with_relu_side_is_relu_and_p1_with_silu_side_is_silu_to_the_bit(gate, dtype):
    gate = torch.cat([gate, torch.tensor([0.0, -0.0, math.inf, -6e4, 1e-30, math.nan] * 64).view(64, 6)], -1).to(dtype)
    for name in ("stocha", "mean"):
        relu, silu = run(name, gate, p=0.0, positive="relu"), run(name, gate, p=1.0, positive="silu")
        torch.testing.assert_close(relu, F.relu(gate), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(silu, F.silu(gate), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("p", [0.001, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hit_rate_on_the_negative_side_is_p(gate, p, dtype):
    negative = -gate.abs().clamp(min=0.1).to(dtype)
    torch.manual_seed(2)
    hits = sum((run("stocha", negative, p=p) != 0).sum().item() for _ in range(4))
    n = 4 * negative.numel()
    assert abs(hits - n * p) < 6 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize(("positive", "expected"), [("silu", F.silu), ("relu", F.relu)])
def test_positive_side_is_the_chosen_function_and_negative_side_is_silu_or_zero(gate, positive, expected):
    hidden = run("stocha", gate, positive=positive)
    below = gate < 0
    assert torch.equal(hidden[~below], expected(gate[~below]))
    assert torch.all((hidden == 0) | (hidden == F.silu(gate)) | ~below)


def test_drawn_side_uses_the_same_draw_on_both_sides():
    torch.manual_seed(3)
    positive = torch.full(SIZE, 2.0)
    hidden = run("stocha", positive, p=0.5, positive="drawn")
    is_silu = hidden == F.silu(positive)
    assert torch.equal(hidden[~is_silu], positive[~is_silu])
    assert abs(is_silu.sum().item() - positive.numel() / 2) < 6 * math.sqrt(positive.numel() / 4)


@pytest.mark.parametrize("positive", first_is_fast(POSITIVE_SIDES))
def test_expectation_equals_mean(positive):
    """The average of n draws is within six standard errors of `mean`, element by element.

    A draw is silu(x) or relu(x), so its standard deviation is at most |silu(x) - relu(x)| / 2.
    """
    gate = torch.linspace(-6, 6, 401, dtype=torch.float64)
    torch.manual_seed(4)
    draws = 20_000
    average = run("stocha", gate.expand(draws, -1), positive=positive).mean(0)
    error = 6 * (F.silu(gate) - F.relu(gate)).abs() / 2 / math.sqrt(draws)
    assert torch.all((average - run("mean", gate, positive=positive)).abs() <= error + 1e-12)


def test_draws_are_independent_over_tokens_and_neurons():
    """Hits of neighbouring elements agree as often as independent ones do: p^2 + (1-p)^2."""
    torch.manual_seed(5)
    hits = run("stocha", torch.full(SIZE, -1.0), p=0.3) != 0
    for left, right in ((hits[:, 1:], hits[:, :-1]), (hits[1:], hits[:-1])):
        agree, rate = (left == right).float().mean().item(), 0.3**2 + 0.7**2
        assert abs(agree - rate) < 6 * math.sqrt(rate * (1 - rate) / left.numel()) * math.sqrt(3)  # pairs overlap


def test_layers_and_steps_draw_different_noise_and_a_seed_repeats_it():
    model = tiny_model(num_hidden_layers=2)
    patch(model, StochaConfig(p=0.5))
    model.train()
    tokens = torch.arange(3, 63).view(2, 30)
    hits: list[torch.Tensor] = []
    negative = torch.full((2, 30, 48), -1.0)
    for mlp in stocha_mlps(model):  # the same negative gate in every layer and step, so that only the draw differs
        mlp.gate_proj.register_forward_hook(lambda *_: negative)
        mlp.up_proj.register_forward_hook(lambda *_: torch.ones_like(negative))
        mlp.down_proj.register_forward_pre_hook(lambda _, args: hits.append(args[0] != 0))
    runs = []
    for _ in range(2):
        torch.manual_seed(6)
        hits.clear()
        runs.append([model(tokens).logits, model(tokens).logits, *hits])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    masks = runs[0][2:]
    assert len(masks) == 4
    for i, mask in enumerate(masks):
        for other in masks[i + 1 :]:  # two layers, two steps: all four masks are independent draws
            agree = (mask == other).float().mean().item()
            assert abs(agree - 0.5) < 6 * math.sqrt(0.25 / mask.numel())


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS])
def test_gradient_equals_the_numerical_one(name):
    """gradcheck in float64, away from the kinks; the seed makes StochA one fixed function meanwhile."""
    torch.manual_seed(7)
    gate = torch.randn(3, 5, dtype=torch.float64)
    gate = (gate + 0.1 * gate.sign()).requires_grad_()
    up = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def function(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(8)
        return run(name, gate, up, p=0.5, threshold=0.05, k=3)

    assert torch.autograd.gradcheck(function, (gate, up))


def test_gradient_on_the_negative_side_is_the_base_activations_where_it_was_drawn_else_zero(gate):
    negative = (-gate.abs()).double().requires_grad_()
    torch.manual_seed(9)
    hidden = run("stocha", negative, p=0.4)
    hidden.sum().backward()
    sigmoid = torch.sigmoid(negative)
    analytic = sigmoid * (1 + negative * (1 - sigmoid))
    torch.testing.assert_close(negative.grad, torch.where(hidden != 0, analytic, torch.zeros_like(analytic)))


def test_definitions_of_the_other_rows(gate):
    up = gate.flip(0)
    relu = gate.clamp(min=0)
    expected = {
        "silu": gate * torch.sigmoid(gate) * up,
        "gelu_pytorch_tanh": F.gelu(gate, approximate="tanh") * up,
        "relu": relu * up,
        "relu2": relu * relu * up,
        "drelu": relu * up.clamp(min=0),
        "fatrelu": torch.where(gate > 0.5, gate, 0) * up,
        "shifted_relu": (gate - 0.5).clamp(min=0) * up,
    }
    for name, value in expected.items():
        torch.testing.assert_close(run(name, gate, up, threshold=0.5), value)
    kept = run("topk", gate, k=100) != 0
    assert torch.all(kept.sum(-1) == 100)
    assert torch.all(torch.where(kept, gate, math.inf).amin(-1) >= torch.where(kept, -math.inf, gate).amax(-1))
    assert set(expected) | {"topk", "stocha", "mean"} == set(ACTIVATIONS) == set(FUNCTIONS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"p": -0.1}, "p is -0.1: expected a probability"),
        ({"p": 1.5}, "p is 1.5"),
        ({"p": math.nan}, "p is nan"),
        ({"p": "0.3"}, "p is '0.3'"),
        ({"activation": "swiglu"}, "activation is 'swiglu': expected one of stocha, mean"),
        ({"inference": "stocha"}, "inference is 'stocha': expected a deterministic activation"),
        ({"positive": "gelu"}, "positive is 'gelu': expected one of silu, relu, drawn"),
        ({"base": "tanh"}, "base is 'tanh'"),
        ({"activation": "topk"}, "k is None: expected a number of neurons"),
        ({"activation": "topk", "k": 0}, "k is 0"),
        ({"threshold": [0.1, math.inf]}, "threshold is"),
    ],
)
def test_config_refuses_in_one_sentence(given, words):
    with pytest.raises(ValueError, match=words) as refusal:
        StochaConfig(**given)
    assert "\n" not in str(refusal.value)


def test_config_round_trips_and_refuses_unknown_keys():
    config = StochaConfig(activation="topk", k=5, threshold=[0.1, 0.2]).resolve("silu")
    assert StochaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"\['pp'\]: expected no other keys"):
        StochaConfig.from_dict({"pp": 0.3})
