"""Tokens' own factors of thresholds in the CPU's kernels: against float64, and whole steps against the modules."""

from __future__ import annotations

import copy
import itertools
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import first_is_fast
from test_both_layouts import small_matrices_too  # noqa: F401 - a fixture
from test_cut_kernels import FORMATS, SHAPES, Weights, cut_model, error, steps  # noqa: F401 - a fixture
from test_lossless import OPTIONS, PROMPT, drafts  # noqa: F401 - a fixture

from stocha_hf.cuts import ATTENTION, PROJECTIONS
from stocha_hf.cuts_stocha import cut_projections, token_logs
from stocha_hf.decoding import ops
from stocha_hf.decoding.both_layouts import keep_both_layouts
from stocha_hf.decoding.lossless import lossless
from stocha_hf.decoding.structs import KERNEL_ACTIVATIONS, Ffn, GateCopy
from stocha_hf.quantization_stocha import Quantization, exchange

pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = 0.6


def some_factors(inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Of which tokens make factors between 0.4 and 2.7."""
    return (2 * torch.randn(inputs + 1) * inputs**-0.5).to(dtype)


def cut(x: torch.Tensor, limit: float, weights: torch.Tensor) -> torch.Tensor:
    factor = token_logs(x.float(), weights).exp()
    return torch.where(x.abs().float() <= limit * factor, 0, x)


def with_factors(found: Any, weights: torch.Tensor) -> Any:
    found.factors = weights.data_ptr()
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_products_in_both_layouts(kind: Any) -> None:
    torch.manual_seed(0)
    for (inputs, outputs), tokens in itertools.product(SHAPES, [1, 2, 5, 8]):
        for rows_are_inputs in (True, False):
            shape = (inputs, outputs) if rows_are_inputs else (outputs, inputs)
            weights = Weights(*shape, kind, inputs**-0.5)
            x, factors = torch.randn(tokens, inputs).to(weights.dtype), some_factors(inputs, weights.dtype)
            found = ops.run_linear(x, with_factors(weights.matrix(None, rows_are_inputs, LIMIT), factors))
            exact = weights.exact if rows_are_inputs else weights.exact.T
            expected = cut(x, LIMIT, factors).double() @ exact
            assert error(found, expected) < weights.tolerance, (inputs, outputs, tokens, rows_are_inputs)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_ffn_cuts_by_them_and_threads_do_not_matter(activation: str, kind: Any) -> None:
    torch.manual_seed(0)
    for tokens, transposed in itertools.product([1, 3, 8], [(True, True, True), (0, 1, 1), (1, 0, 0), (0, 0, 0)]):
        shapes, limits = [(64, 300), (64, 300), (300, 64)], (0.3, 0.3, 0.05)
        gate, up, down = (
            Weights(*(shape if first else reversed(shape)), kind, shape[0] ** -0.5)
            for shape, first in zip(shapes, transposed, strict=True)
        )
        dtype = gate.dtype
        factors = [some_factors(64, dtype), some_factors(300, dtype)]
        parts = zip((gate, up, down), transposed, limits, (0, 0, 1), strict=True)
        matrices = [
            with_factors(part.matrix(None, bool(first), limit), factors[at]) for part, first, limit, at in parts
        ]
        x, structure = torch.randn(tokens, 64).to(dtype), Ffn(*matrices, GateCopy(), KERNEL_ACTIVATIONS[activation], 0)
        found = ops.run_ffn(x, structure)
        exact = [
            part.exact if first else part.exact.T for part, first in zip((gate, up, down), transposed, strict=True)
        ]
        act = F.silu if activation == "silu" else F.relu
        taken = cut(x, 0.3, factors[0]).double()
        hidden = act(taken @ exact[0]) * (taken @ exact[1])
        expected = cut(hidden, 0.05, factors[1]) @ exact[2]
        assert error(found, expected) < 4 * gate.tolerance, (tokens, transposed)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ops.run_ffn(x, structure), found), (tokens, transposed, threads)
        torch.set_num_threads(1)


def factor_model(
    model_type: str, of: Any = PROJECTIONS, activation: str = "silu", bits: Any = None, **fields: Any
) -> Any:
    """Its factors are random, so that those of tokens differ."""
    model = cut_model(model_type, of, activation, bits, token_factors=True, **fields)
    noise = torch.Generator().manual_seed(3)
    for name, found in model.named_parameters():
        if name.endswith("_token_factor"):
            found.data.copy_(2 * torch.randn(found.shape, generator=noise) * len(found) ** -0.5)
    return model


MODELS = [
    ("llama", "relu", ("k_proj", "v_proj", "down_proj")),
    ("qwen2", "silu", PROJECTIONS),
    ("gemma2", "gelu_pytorch_tanh", ["o_proj", "up_proj"]),
    ("qwen3", "relu", PROJECTIONS),
    ("mistral", "silu", ATTENTION),
    ("gemma3_text", "gelu_pytorch_tanh", PROJECTIONS),
]


@pytest.mark.parametrize(
    ("model_type", "activation", "of", "bits"),
    [
        *((*model, None) for model in MODELS),
        *first_is_fast((*model, bits) for bits in (4, 8) for model in MODELS[1:4]),
    ],
)
@torch.no_grad()
def test_whole_steps_cut_as_the_modules_do(
    model_type: str,
    activation: str,
    of: Any,
    bits: int | None,
    steps: list[int],  # noqa: F811
) -> None:
    model = factor_model(model_type, of, activation, bits)
    called = copy.deepcopy(model)
    called.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)  # so all modules are called
    plain = copy.deepcopy(model)
    for module in cut_projections(plain):
        module.factors = ()
    text = torch.randint(4, 64, (3, 22), generator=torch.Generator().manual_seed(1))

    def logits(one: Any, sequences: int, several: int) -> torch.Tensor:
        cache = one(text[:sequences, :10], use_cache=True).past_key_values
        parts = [text[:sequences, i : i + several] for i in range(10, 22, several)]
        return torch.cat([one(part, past_key_values=cache).logits for part in parts], 1)

    for sequences, several, where in ((1, 1, "decode"), (3, 1, "decode"), (1, 4, "always"), (2, 2, "always")):
        with model.cut_inputs(where), called.cut_inputs(where), plain.cut_inputs(where):
            steps.clear()
            found, without = logits(model, sequences, several), logits(plain, sequences, several)
            assert len(steps) == 2 * 12 // several
            expected = logits(called, sequences, several)
            assert len(steps) == 2 * 12 // several
        off = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        moved = (found - without).norm(dim=-1) / expected.norm(dim=-1)
        assert off.median() < (0.1 if bits else 0.001) * moved.median(), (sequences, several, where)
        assert off.max() < 0.0001 or bits, "of codes, sums of other blocks move an entry over a threshold now and then"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_whole_steps_in_16_bits(dtype: torch.dtype, steps: list[int]) -> None:  # noqa: F811
    model = factor_model("qwen2").to(dtype)
    called = copy.deepcopy(model)
    called.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)  # so all modules are called
    cache, other = (one(PROMPT, use_cache=True).past_key_values for one in (model, called))
    off = []
    for token in range(4, 24):
        given = torch.tensor([[token]])
        found = model(given, past_key_values=cache).logits.float()
        expected = called(given, past_key_values=other).logits.float()
        off.append(float((found - expected).norm() / expected.norm()))
    assert len(steps) == 20
    assert statistics.median(off) < 0.04, "sums of another order move an entry over a threshold now and then"


@pytest.mark.parametrize("bits", [None, 4])
@torch.no_grad()
def test_factors_that_change_are_seen(bits: Any, steps: list[int]) -> None:  # noqa: F811
    model = factor_model("llama", bits=bits)
    cache = model(PROMPT, use_cache=True).past_key_values

    def logits() -> torch.Tensor:
        return model(torch.tensor([[9]]), past_key_values=copy.deepcopy(cache)).logits

    seen = [logits()]
    kept = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("_token_factor")}
    assert len(kept) == 8
    owner = model.model.layers[0].mlp
    owner.gate_proj_token_factor.data.mul_(-1)
    seen.append(logits())
    owner.gate_proj_token_factor = torch.nn.Parameter(owner.gate_proj_token_factor.data * -5, requires_grad=False)
    seen.append(logits())
    owner.gate_proj.factors = ()
    seen.append(logits())
    assert all(not torch.equal(*pair) for pair in itertools.combinations(seen, 2))
    owner.gate_proj.factors = (owner, "gate_proj_token_factor")
    model.load_state_dict(kept, strict=False)
    assert torch.equal(logits(), seen[0])
    assert len(steps) == 5
    owner.gate_proj_token_factor.data = owner.gate_proj_token_factor.data.double()
    logits()
    assert len(steps) == 5, "of another type: modules are called"


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.usefixtures("small_matrices_too")
def test_lossless_decoding_drafts_with_them(model_type: str, both: bool, drafts: list[int]) -> None:  # noqa: F811
    model = factor_model(model_type, bits=None if both else 4)
    if both:
        exchange(model, Quantization(transposed=()), fill=True)
        assert keep_both_layouts(model) == 2 * 6
    with model.cut_inputs("never"):
        expected = model.generate(PROMPT, **OPTIONS)
    drafts.clear()
    found = model.generate(PROMPT, custom_generate=lossless, **OPTIONS)
    assert torch.equal(found, expected)
    assert -1 in drafts and max(drafts) > 2, "drafted, and verified together"
