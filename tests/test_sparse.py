"""The decode kernels against PyTorch in float64, over types, shapes and activations, and how they are built."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.kernels import bound, dense, error, matrices

from stocha_hf.decoding import build, ops
from stocha_hf.decoding.gate_prediction import CoarseGate, candidates
from stocha_hf.decoding.thin_gate import ThinGate
from stocha_hf.modeling_stocha import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 96), (33, 77), (16, 8), (100, 300), (1, 1)]  # (H, M), also no multiples of the vector width


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(ops.HIDDEN))
def test_the_ffn_is_as_exact_as_pytorch(activation: str, dtype: torch.dtype) -> None:
    assert set(ops.HIDDEN) == {name for name, row in ACTIVATIONS.items() if row.cut}
    threshold = 0.3 if ACTIVATIONS[activation].cut == "threshold" else 0.0
    for (size, width), tokens in itertools.product(SHAPES, [1, 2, 3, 5, 8]):
        given = matrices(size, width, tokens, dtype)
        exact = dense(*(tensor.double() for tensor in given), activation, threshold)
        found = ops.ffn(*given, activation, threshold)
        assert found.dtype == dtype and found.shape == given[0].shape
        assert error(found, exact) <= bound(dense(*given, activation, threshold), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_as_exact_as_pytorch(dtype: torch.dtype) -> None:
    for (size, width), tokens in itertools.product(SHAPES, [1, 2, 3, 5, 8]):
        x, weight, _, _ = matrices(size, width, tokens, dtype)
        for bias in (None, torch.randn(width).to(dtype)):
            exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            found = ops.linear(x.view(tokens, 1, size), weight, bias).view(tokens, width)
            assert error(found, exact) <= bound(F.linear(x, weight, bias), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_active_neuron_gives_zeros_and_all_active_ones_the_product(dtype: torch.dtype) -> None:
    given = matrices(64, 96, 3, dtype)
    assert torch.equal(ops.ffn(*given, "fatrelu", 1e9), torch.zeros(3, 64, dtype=dtype))
    all_active = [given[0].abs(), given[1].abs(), *given[2:]]
    torch.testing.assert_close(
        ops.ffn(*all_active, "relu", 0.0), dense(*all_active, "relu", 0.0), rtol=0.05, atol=0.02
    )
    zero_token = given[0].clone()
    zero_token[1] = 0
    assert torch.equal(ops.ffn(zero_token, *given[1:], "relu", 0.0)[1], torch.zeros(64, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_come_out_as_they_do_of_pytorch(value: float) -> None:
    for activation, dtype in itertools.product(ops.HIDDEN, DTYPES):
        given = matrices(33, 77, 2, dtype)
        given[0][0, 5] = value
        found, expected = ops.ffn(*given, activation, 0.0), dense(*given, activation, 0.0)
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert torch.equal(found.isnan(), expected.isnan())


def test_more_tokens_than_a_step_has_are_refused() -> None:
    x, gate, up, down_t = matrices(64, 96, 9)
    for call in (lambda: ops.ffn(x, gate, up, down_t, "relu", 0.0), lambda: ops.linear(x, gate, None)):
        with pytest.raises(ValueError, match="9 tokens: expected 1 to 8"):
            call()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    given = matrices(100, 300, 3, torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(ops.ffn(*given, "relu", 0.0))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_the_operators_have_fake_implementations_and_compile() -> None:
    x, gate, up, down_t = matrices(64, 96, 2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.stocha.ffn.default, (x, gate, up, down_t, "relu", 0.0), test_utils=checks)
    torch.library.opcheck(torch.ops.stocha.linear.default, (x, gate, None), test_utils=checks)
    compiled = torch.compile(
        lambda v: ops.linear(ops.ffn(v, gate, up, down_t, "relu", 0.0), gate, None), fullgraph=True
    )
    expected = ops.linear(ops.ffn(x, gate, up, down_t, "relu", 0.0), gate, None)
    assert torch.equal(compiled(x), expected)


@pytest.mark.slow
def test_without_special_instructions_the_kernels_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("-Og", *(flag for flag in build.FLAGS if not flag.startswith(("-march", "-O"))))  # -O3 takes its time
    portable = build.load(flags)
    for dtype in DTYPES:
        given = matrices(100, 300, 2, dtype)
        native = ops.ffn(*given, "fatrelu", 0.2)
        with monkeypatch.context() as patched:
            patched.setattr(ops, "kernels", lambda: portable)
            torch.testing.assert_close(ops.ffn(*given, "fatrelu", 0.2), native, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(ops.HIDDEN))
def test_a_coarse_gate_changes_no_result(activation: str, dtype: torch.dtype) -> None:
    for (size, width), tokens in itertools.product(SHAPES, [1, 2, 3, 5, 8]):
        given = matrices(size, width, tokens, dtype)
        coarse = CoarseGate.of(given[1])
        for threshold in (0.0, 0.5, 1.7) if activation in ("fatrelu", "shifted_relu") else (0.0,):
            expected = ops.ffn(*given, activation, threshold)
            assert torch.equal(ops.ffn(*given, activation, threshold, coarse), expected)
    given[0][0, 0] = float("nan")
    assert torch.equal(ops.ffn(*given, activation, 0.0, coarse).isnan(), ops.ffn(*given, activation, 0.0).isnan())


def layer(weight: torch.Tensor) -> torch.nn.Linear:
    found = torch.nn.Linear(1, 1, bias=False, device="meta")
    found.weight = torch.nn.Parameter(weight, requires_grad=False)
    return found


def test_a_coarse_gate_leaves_few_candidates_and_finds_what_it_promises() -> None:
    x, gate, up, down_t = matrices(512, 4000, 4)
    threshold = 1.3  # of products with standard deviation 1: 10% are active
    active = F.linear(x, gate) > threshold
    exact = candidates(CoarseGate.of(gate), x, threshold)
    assert bool((exact >= active).all()) and exact.float().mean() < 0.5
    coarse = ThinGate.of(layer(gate), recall=0.9)
    chosen = candidates(coarse, x, threshold)
    assert chosen.float().mean() < 2.2 * active.float().mean()
    assert (chosen & active).sum() > 0.93 * active.sum()
    # the kernel leaves out the same neurons
    for token in range(4):
        kept = F.threshold(F.linear(x[token], gate), threshold, 0.0) * chosen[token]
        found = ops.ffn(x[token : token + 1], gate, up, down_t, "fatrelu", threshold, coarse)[0]
        torch.testing.assert_close(found, (kept * F.linear(x[token], up)) @ down_t, rtol=1e-3, atol=1e-3)


def test_a_coarse_gate_of_other_weights_is_ignored() -> None:
    given = matrices(64, 96, 2)
    coarse = CoarseGate.of(given[1])
    given[1].mul_(-1)
    assert torch.equal(ops.ffn(*given, "relu", 0.0, coarse), ops.ffn(*given, "relu", 0.0))
    thin = ThinGate.of(layer(given[1]), recall=0.51)
    predicted = ops.ffn(*given, "relu", 0.0, thin)
    assert not torch.equal(predicted, ops.ffn(*given, "relu", 0.0))
    given[1].mul_(1)
    assert torch.equal(ops.ffn(*given, "relu", 0.0, thin), ops.ffn(*given, "relu", 0.0))
