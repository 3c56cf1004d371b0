"""Projections that cut their inputs, by the kernels: against float64, and whole steps against the modules."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import first_is_fast, tiny_model
from helpers.packing import packed

from stocha_hf import InputCuts, StochaConfig
from stocha_hf.cuts import ATTENTION, PROJECTIONS
from stocha_hf.decoding import ops, step
from stocha_hf.decoding.structs import KERNEL_ACTIVATIONS, Ffn, GateCopy, matrix
from stocha_hf.modeling_stocha import StochaMLP
from stocha_hf.patching import patch
from stocha_hf.quantization_stocha import Quantization, exchange

SHAPES = [(64, 96), (77, 33), (300, 530), (1, 1), (160, 32)]  # inputs, outputs
THRESHOLDS = (0.0, 0.6, 1e9)  # that cut none, some and all
FORMATS = [torch.bfloat16, torch.float16, torch.float32, 8, 4]
PROMPT = torch.tensor([[5, 9, 13, 21, 34, 8, 55, 40, 11, 7]])
pytestmark = pytest.mark.usefixtures("one_thread")


class Weights:
    """Random ones of a format, [rows, columns], and what they stand for."""

    def __init__(self, rows: int, columns: int, kind: Any, size: float) -> None:
        if isinstance(kind, int):
            self.kept: Any = packed(rows, columns, kind)
            self.exact, self.dtype, self.tolerance = self.kept.exact, torch.float32, 0.02
        else:
            self.kept = (torch.randn(rows, columns) * size).to(kind)
            self.exact, self.dtype, self.tolerance = self.kept.double(), kind, 4 * torch.finfo(kind).eps + 1e-6

    def matrix(self, bias: Any = None, rows_are_inputs: bool = True, threshold: float = 0.0) -> Any:
        if not isinstance(self.kept, torch.Tensor):
            return self.kept.matrix(bias, rows_are_inputs, threshold)
        found = matrix(self.kept, bias, rows_are_inputs)
        found.threshold = threshold
        return found


def cut(x: torch.Tensor, threshold: float) -> torch.Tensor:
    return torch.where(x.abs() <= torch.tensor(threshold, dtype=x.dtype), 0, x)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-3)).item()


@pytest.mark.parametrize("kind", FORMATS)
def test_products_in_both_layouts(kind: Any) -> None:
    torch.manual_seed(0)
    for (inputs, outputs), tokens, threshold in itertools.product(SHAPES, [1, 2, 5, 8], THRESHOLDS):
        for rows_are_inputs in (True, False):
            shape = (inputs, outputs) if rows_are_inputs else (outputs, inputs)
            weights = Weights(*shape, kind, inputs**-0.5)
            x, bias = torch.randn(tokens, inputs).to(weights.dtype), torch.randn(outputs).to(weights.dtype)
            limit = torch.tensor(threshold, dtype=torch.float32).to(weights.dtype).item()
            found = ops.run_linear(x, weights.matrix(bias, rows_are_inputs, min(limit, 6e4)))
            exact = weights.exact if rows_are_inputs else weights.exact.T
            expected = cut(x, min(limit, 6e4)).double() @ exact + bias.double()
            assert error(found, expected) < weights.tolerance, (inputs, outputs, tokens, threshold, rows_are_inputs)


def test_sums_of_rows_longer_than_a_pass_and_of_odd_numbers_of_blocks() -> None:
    torch.manual_seed(0)
    for (inputs, outputs), tokens in itertools.product([(101, 700), (33, 5300), (64, 5120)], [1, 2, 4, 8]):
        weights, x = Weights(inputs, outputs, 4, 1), torch.randn(tokens, inputs)
        for threshold in (0.0, 0.6):
            found = ops.run_linear(x, weights.matrix(None, True, threshold))
            exact = cut(x, threshold).double() @ weights.exact
            assert error(found, exact) < weights.tolerance, (inputs, outputs, tokens)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_ffn_cuts_its_input_and_its_hidden_vector(activation: str, kind: Any) -> None:
    torch.manual_seed(0)
    for tokens, threshold, transposed in itertools.product(
        [1, 3, 8], (0.0, 0.3), [(True, True, True), (0, 1, 1), (1, 0, 0)]
    ):
        shapes = [(64, 300), (64, 300), (300, 64)]
        gate, up, down = (
            Weights(*(shape if first else reversed(shape)), kind, shape[0] ** -0.5)
            for shape, first in zip(shapes, transposed, strict=True)
        )
        limits = [torch.tensor(limit).to(gate.dtype).item() for limit in (threshold, 2 * threshold, threshold / 3)]
        parts = zip((gate, up, down), transposed, limits, strict=True)
        matrices = [part.matrix(None, bool(first), limit) for part, first, limit in parts]
        x = torch.randn(tokens, 64).to(gate.dtype)
        found = ops.run_ffn(x, Ffn(*matrices, GateCopy(), KERNEL_ACTIVATIONS[activation], 0.0))
        exact = [
            part.exact if first else part.exact.T for part, first in zip((gate, up, down), transposed, strict=True)
        ]
        act = F.silu if activation == "silu" else F.relu
        hidden = act(cut(x, limits[0]).double() @ exact[0]) * (cut(x, limits[1]).double() @ exact[1])
        assert error(found, cut(hidden, limits[2]) @ exact[2]) < 4 * gate.tolerance, (tokens, threshold, transposed)


def cut_model(model_type: str, of: Any, activation: str, bits: int | None = None, **fields: Any) -> Any:
    model = tiny_model(model_type, max_position_embeddings=512)
    thresholds = {name: [0.05, 0.1] if name == "down_proj" else [0.3, 0.4] for name in of}
    patch(model, StochaConfig(activation=activation, inputs=InputCuts(thresholds, **fields)))
    if bits:
        exchange(model, Quantization(bits=bits, transposed=tuple({"down_proj", *of})), fill=True)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    taken, run = [], step.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = run(*args, **kwargs)
        taken.extend([1] * (found is not None))
        return found

    monkeypatch.setattr(step, "run", counted)
    return taken


def slowly(monkeypatch: pytest.MonkeyPatch, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function where no module has a kernel."""
    with monkeypatch.context() as patched:
        patched.setattr(StochaMLP, "runtime", None)
        return function(*args, **kwargs)


MODELS = [
    ("llama", "relu", ATTENTION),
    ("qwen2", "silu", PROJECTIONS),
    ("gemma2", "gelu_pytorch_tanh", ["o_proj", "up_proj"]),
    ("qwen3", "relu", PROJECTIONS),
]


@pytest.mark.parametrize(
    ("model_type", "activation", "of", "bits"),
    [
        *((*model, None) for model in MODELS),
        *first_is_fast((*model, bits) for bits in (4, 8) for model in MODELS),
    ],
)
@torch.no_grad()
def test_whole_steps_cut_as_the_modules_do(
    model_type: str, activation: str, of: Any, bits: int | None, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cut_model(model_type, of, activation, bits)
    options = {"max_new_tokens": 25, "do_sample": False}
    text = slowly(monkeypatch, model.generate, PROMPT, **options)
    fast = model.generate(PROMPT, **options)
    assert len(steps) == 24
    if bits is None:
        assert torch.equal(fast, text)
    text = torch.randint(4, 64, (1, 22), generator=torch.Generator().manual_seed(1))

    def logits(several: int) -> torch.Tensor:
        cache = model(text[:, :10], use_cache=True).past_key_values
        return torch.cat(
            [model(text[:, i : i + several], past_key_values=cache).logits for i in range(10, 22, several)], 1
        )

    for several, where in itertools.product((1, 4), ("decode", "always", "never")):
        with model.cut_inputs(where):
            found, expected = logits(several), slowly(monkeypatch, logits, several)
        whole = where == "never" or (where == "decode" and several > 1)
        rounding = 0.0001 if bits is None else 0.05 if whole else 0.15  # which moves entries over thresholds
        assert (found - expected).norm() < rounding * expected.norm(), (several, where)
        with model.cut_inputs("never"):
            assert ((found - logits(several)).norm() < 1e-4 * expected.norm()) == whole
