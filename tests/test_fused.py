"""The fused StochA against its definition in float64, with the same coins: values, gradients, what it keeps.

On a machine with a GPU these tests run there, on the Triton kernels; elsewhere on the PyTorch operations.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from stocha_hf.decoding import noise
from stocha_hf.modeling_stocha import POSITIVE_SIDES, coin_hash, coin_keys, hidden_vector

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASES = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}
# of one rounding of the value and two of the gradients
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-7, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def ffn(p: float = 0.4, positive: str = "silu", base: str = "silu") -> SimpleNamespace:
    return SimpleNamespace(p=p, positive=positive, base=base, running="stocha")


def stocha(gate: torch.Tensor, up: torch.Tensor, rule: SimpleNamespace) -> torch.Tensor:
    fused = noise.stocha(gate, up, rule.p, rule.base, rule.positive)
    assert fused is not None
    return fused


def inputs(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    gate, up, grad = (torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for _ in range(3))
    return [(2 * gate).clamp(-4, 4).requires_grad_(), up.requires_grad_(), grad]


def forward_and_backward(function, gate, up, grad):
    hidden = function(gate, up)
    return hidden.detach(), *torch.autograd.grad(hidden, (gate, up), grad)


def definition(gate, up, rule):
    """StochA(gate) * up with the coins that stocha draws from the generator's present state, from first principles."""
    width = gate.shape[-1]
    keys = coin_keys(gate)
    bits = coin_hash(keys[:-width].view(*gate.shape[:-1], 1), keys[-width:])
    drawn = (bits.double() + 2**31) / 2**32 < rule.p
    drawn = {"silu": drawn | (gate >= 0), "relu": drawn & (gate < 0), "drawn": drawn}[rule.positive]
    return torch.where(drawn, BASES[rule.base](gate), F.relu(gate)) * up


@pytest.mark.parametrize("positive", POSITIVE_SIDES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 37, 129), (257, 1536)])
def test_values_and_gradients_are_those_of_the_definition(shape, dtype, base, positive):
    rule, (gate, up, grad) = ffn(0.4, positive, base), inputs(dtype, *shape)
    torch.manual_seed(2)
    fused = forward_and_backward(lambda gate, up: stocha(gate, up, rule), gate, up, grad)
    torch.manual_seed(2)
    exact = forward_and_backward(
        lambda gate, up: definition(gate, up, rule), *(t.detach().double().requires_grad_() for t in (gate, up)), grad
    )
    for given, expected in zip(fused, exact, strict=True):
        assert given.dtype == dtype and given.shape == shape
        assert (given.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
        assert torch.all((given == 0) >= (expected == 0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("p", "positive", "act"), [(1.0, "silu", F.silu), (0.0, "relu", F.relu)])
def test_silu_and_relu_are_special_cases_to_the_bit(dtype, p, positive, act):
    gate, up, grad = inputs(dtype, 64, 512)
    fused = forward_and_backward(lambda gate, up: stocha(gate, up, ffn(p, positive)), gate, up, grad)
    native = forward_and_backward(lambda gate, up: act(gate) * up, gate, up, grad)
    assert all(torch.equal(*pair) for pair in zip(fused, native, strict=True))


@pytest.mark.parametrize("positive", POSITIVE_SIDES)
def test_infinities_and_nan_come_out_as_from_the_chosen_function(positive):
    gate = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0] * 64, device=DEVICE).view(64, 6)
    hidden = stocha(gate, torch.ones_like(gate), ffn(0.5, positive))
    assert hidden[:, :2].isnan().all() and (hidden[:, 2] == math.inf).all() and (hidden[:, 4:] == 0).all()
    assert torch.all(hidden[:, 3].isnan() | (hidden[:, 3] == 0))  # SiLU's own value there, or ReLU's


@pytest.mark.parametrize("p", [0.001, 0.3, 0.97])
def test_coins_fall_with_probability_p_and_pairwise_independently(p):
    """Rows, columns and diagonals of a large mask, and a second call: within six standard deviations."""
    gate = torch.full((512, 2048), -1.0, device=DEVICE)
    torch.manual_seed(3)
    hits, again = ((stocha(gate, torch.ones_like(gate), ffn(p)) != 0).double() for _ in range(2))
    n, variance = hits.numel(), p * (1 - p)
    assert abs(hits.sum().item() - n * p) < 6 * math.sqrt(n * variance)
    for other in (again, hits.roll(1, 0), hits.roll(1, 1), hits.roll(256, 1), hits.roll((7, 64), (0, 1))):
        assert abs(((hits - p) * (other - p)).sum().item()) < 6 * variance * math.sqrt(n)
    # four coins at the corners of a rectangle, the one pattern that tabulation without a hash would leave
    corners = (hits - p) * (hits.roll(1, 0) - p) * (hits.roll(1, 1) - p) * (hits.roll((1, 1), (0, 1)) - p)
    assert abs(corners.sum().item()) < 6 * variance**2 * math.sqrt(n)


def test_it_keeps_gate_and_up_and_at_most_a_byte_per_element():
    gate, up, _ = inputs(torch.bfloat16, 64, 512)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stocha(gate, up, ffn())
    extra = [t for t in kept if t.data_ptr() not in (gate.data_ptr(), up.data_ptr())]
    assert len(kept) == 3 and sum(t.nbytes for t in extra) <= gate.numel()


def test_other_layouts_and_mixed_types():
    gate, up, grad = inputs(torch.float32, 40, 24)
    results = []
    for layout in (lambda t: t, lambda t: t.t().contiguous().t()):
        torch.manual_seed(4)
        results.append(forward_and_backward(lambda g, u: stocha(layout(g), layout(u), ffn()), gate, up, layout(grad)))  # noqa: B023
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    mixed = up.detach().bfloat16().requires_grad_()
    hidden, grad_gate, grad_up = forward_and_backward(lambda g, u: stocha(g, u, ffn(1.0)), gate, mixed, grad)
    native = forward_and_backward(lambda g, u: F.silu(g) * u, gate, mixed, grad)
    assert (hidden.dtype, grad_gate.dtype, grad_up.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert all(torch.equal(*pair) for pair in zip((hidden, grad_gate, grad_up), native, strict=True))


def test_another_base_activation_and_transforms_run_by_the_definition():
    gate, up, _ = inputs(torch.float32, 8, 64)
    assert noise.stocha(gate, up, 1.0, "relu2", "silu") is None
    assert torch.func.vmap(lambda g, u: torch.tensor(noise.stocha(g, u, 0.3, "silu", "silu") is None))(gate, up).all()


@pytest.mark.parametrize("positive", POSITIVE_SIDES)
@pytest.mark.parametrize("base", BASES)
def test_the_gradient_can_be_differentiated_again(base, positive):
    """Against the definition's own double backward, with the same coins."""
    rule, (gate, up, grad) = ffn(0.4, positive, base), inputs(torch.float64, 5, 40)
    seconds = []
    for function in (stocha, hidden_vector):
        torch.manual_seed(6)
        firsts = torch.autograd.grad(function(gate, up, rule), (gate, up), grad, create_graph=True)
        seconds.append(torch.autograd.grad(sum((first**2).sum() for first in firsts), (gate, up)))
    for given, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(given, expected)


@pytest.mark.slow
def test_compiled_it_draws_the_same_coins_in_backward_also_under_checkpointing():
    """Fullgraph, and the forward's mask is the gradients' mask; what it keeps is gate, up and the keys."""
    rules = [ffn(torch.tensor(0.5, dtype=torch.float64), positive) for positive in POSITIVE_SIDES]

    def function(gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
        """All in one graph, which compiles in the time of one of them."""
        hidden = []
        for rule in rules:
            hidden.append(hidden_vector(gate, up, rule))
            hidden.append(torch.utils.checkpoint.checkpoint(hidden_vector, gate, up, rule, use_reentrant=False))
        return hidden

    gate, up, _ = inputs(torch.float32, 64, 512)
    gate = (-0.1 - gate.detach().abs().clamp(max=1)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = torch.compile(function, fullgraph=True)(gate, up)
    assert sum(t.nbytes for t in kept) <= 2 * gate.nbytes + 64 * 1024
    masks = [output != 0 for output in outputs]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(masks, 2))
    for output, mask in zip(outputs, masks, strict=True):
        assert abs(mask.sum().item() - mask.numel() / 2) < 3 * math.sqrt(mask.numel())
        for gradient in torch.autograd.grad(output.sum(), (gate, up), retain_graph=True):
            assert torch.equal(gradient != 0, mask)
