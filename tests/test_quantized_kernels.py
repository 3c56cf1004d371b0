"""Kernels of 8- and 4-bit weights against float64: random shapes, all activations, 1 to 8 tokens.

Products are of an x in 255 steps a group, so an error of about 0.4% of a result is rounding; a wrong index gives 100%.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.packing import VARIANTS, Packed, packed

from stocha_hf.decoding import build, ops
from stocha_hf.decoding.gate_prediction import candidates
from stocha_hf.decoding.memory import use_large_pages, use_own_large_pages
from stocha_hf.decoding.structs import DTYPES, KERNEL_ACTIVATIONS, Ffn, GateCopy, Matrix, pointer
from stocha_hf.decoding.thin_gate import ThinGate

SHAPES = [(64, 96), (33, 77), (300, 530), (1, 1), (160, 32), (576, 40)]  # columns, rows
ROUNDING = 0.012  # of x, and of hidden vectors
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=VARIANTS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = build.load((*build.FLAGS, *request.param)) if request.param else build.kernels()
    monkeypatch.setattr(ops, "kernels", lambda: found)
    return found


def thin(gate: Packed, recall: float) -> ThinGate:
    def rows(first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        return gate.exact[first:last].to(dtype)

    return ThinGate.of(SimpleNamespace(quantized_format=1, codes=gate.codes, scale=gate.scale, rows=rows), recall)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-3)).item()


@pytest.mark.parametrize("bits", [8, 4, "planes"])
def test_products_equal_those_of_the_weights(library: Any, bits: int | str) -> None:
    torch.manual_seed(0)
    for (columns, rows), tokens in itertools.product(SHAPES, [1, 2, 3, 4, 7, 8]):
        weights = packed(rows, columns, bits)
        x, bias = torch.randn(tokens, columns), torch.randn(rows)
        found = ops.run_linear(x, weights.matrix(bias))
        exact = x.double() @ weights.exact.T + bias.double()
        assert error(found, exact) < ROUNDING, (columns, rows, tokens)


@pytest.mark.parametrize("bits", [8, 4, "planes"])
def test_a_token_has_the_same_numbers_in_any_company(library: Any, bits: int | str) -> None:
    torch.manual_seed(0)
    for columns, rows in [*SHAPES, (896, 150)]:
        weights, x = packed(rows, columns, bits), torch.randn(8, columns)
        alone = torch.cat([ops.run_linear(x[t : t + 1], weights.matrix()) for t in range(8)])
        for tokens in (2, 3, 5, 8):
            assert torch.equal(ops.run_linear(x[:tokens], weights.matrix()), alone[:tokens]), (columns, rows, tokens)


@pytest.mark.parametrize("rows_are_inputs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_so_it_has_with_plain_weights(library: Any, dtype: torch.dtype, rows_are_inputs: bool) -> None:
    torch.manual_seed(0)
    for columns, rows in [*SHAPES, (896, 150)]:
        weight = torch.randn(rows, columns).to(dtype)
        x = torch.randn(8, rows if rows_are_inputs else columns).to(dtype)
        matrix = Matrix(pointer(weight), None, None, rows, columns, DTYPES[dtype], rows_are_inputs)
        alone = torch.cat([ops.run_linear(x[t : t + 1], matrix) for t in range(8)])
        for tokens in (2, 3, 5, 8):
            assert torch.equal(ops.run_linear(x[:tokens], matrix), alone[:tokens]), (columns, rows, tokens)


def hidden_vector(gate: torch.Tensor, up: torch.Tensor, activation: str, threshold: float) -> torch.Tensor:
    if activation in ops.HIDDEN:
        return ops.HIDDEN[activation](gate, up, threshold)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_the_ffn_equals_that_of_the_weights(library: Any, activation: str, bits: int) -> None:
    torch.manual_seed(0)
    thresholds = (-1e9, 0.2, 1e9) if activation in ("fatrelu", "shifted_relu") else (0.0,)
    for (size, width), tokens, threshold in itertools.product(SHAPES[:4], [1, 3, 8], thresholds):
        if activation == "shifted_relu" and threshold < 0:
            continue
        gate, up, down = (packed(width, size, bits) for _ in range(3))
        x = torch.randn(tokens, size)
        gates = x.double() @ gate.exact.T
        matrices = (gate.matrix(), up.matrix(), down.matrix(rows_are_inputs=True))
        weights = Ffn(*matrices, GateCopy(), KERNEL_ACTIVATIONS[activation], threshold)
        found = ops.run_ffn(x, weights)
        exact = hidden_vector(gates, x.double() @ up.exact.T, activation, threshold) @ down.exact
        if threshold > 1e8:
            assert not found.any()
        else:
            assert error(found, exact) < 4 * ROUNDING, (size, width, tokens, threshold)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation", sorted(ops.HIDDEN))
def test_a_thin_gate_leaves_out_what_it_says(library: Any, activation: str, bits: int) -> None:
    torch.manual_seed(0)
    threshold = 0.3 if activation in ("fatrelu", "shifted_relu") else 0.0
    for (size, width), tokens in itertools.product(SHAPES[:3], [1, 2]):
        gate, up, down = (packed(width, size, bits) for _ in range(3))
        x = torch.randn(tokens, size)
        copy = thin(gate, recall=0.6)
        chosen = candidates(copy, x, threshold).any(0)
        gates = x.double() @ gate.exact.T
        assert not chosen.all() and (chosen & (gates > threshold)).any()
        matrices = (gate.matrix(), up.matrix(), down.matrix(rows_are_inputs=True))
        found = ops.run_ffn(x, Ffn(*matrices, copy.structure(), KERNEL_ACTIVATIONS[activation], threshold))
        hidden = hidden_vector(gates, x.double() @ up.exact.T, activation, threshold)
        assert error(found, (hidden * chosen) @ down.exact) < 4 * ROUNDING, (size, width, tokens)
    x, rule = torch.randn(3, size), (KERNEL_ACTIVATIONS[activation], threshold)
    full, predicted = (ops.run_ffn(x, Ffn(*matrices, told, *rule)) for told in (GateCopy(), copy.structure()))
    assert torch.equal(full, predicted)  # three tokens read the whole gate


def test_a_thin_gate_finds_what_it_promises() -> None:
    torch.manual_seed(0)
    gate, x, threshold = packed(4000, 512, 4), torch.randn(4, 512), 0.65
    active = x @ gate.exact.float().T > threshold
    shares, recalls = [], []
    for recall in (0.6, 0.9, 0.999):
        chosen = candidates(thin(gate, recall), x, threshold)
        shares.append(chosen.float().mean() / active.float().mean())
        recalls.append((chosen & active).sum() / active.sum())
    assert recalls[0] > 0.8 and recalls[1] > 0.96 and recalls[2] > 0.9995
    assert 1 < shares[0] < shares[1] < shares[2] < 4


def test_results_do_not_depend_on_the_number_of_threads(library: Any) -> None:
    torch.manual_seed(0)
    gate, up, down = (packed(300, 320, 4) for _ in range(3))
    matrices = (gate.matrix(), up.matrix(), down.matrix(rows_are_inputs=True))
    weights = Ffn(*matrices, GateCopy(), KERNEL_ACTIVATIONS["relu"], 0.0)
    x, threads, found = torch.randn(2, 320), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.cat([ops.run_ffn(x, weights), ops.run_linear(x[:, :300], matrices[2])], 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("bits", [8, 4, "planes"])
def test_dequantized_rows(library: Any, bits: int | str) -> None:
    weights = packed(9, 70, bits)
    out = torch.empty(4, 70)
    library.stocha_dequantize(ctypes.byref(weights.matrix()), 3, 7, 70, DTYPES[out.dtype], out.data_ptr(), 2)
    torch.testing.assert_close(out.double(), weights.exact[3:7], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_do_not_come_out_finite(library: Any, value: float) -> None:
    weights = packed(40, 64, 4)
    x = torch.randn(2, 64)
    x[1, 5] = value
    found = ops.run_linear(x, weights.matrix())
    assert found[0].isfinite().all() and not found[1].isfinite().any()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages")
def test_larger_pages_are_asked_for_around_a_large_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    system = SimpleNamespace(madvise=lambda start, size, advice: asked.append((start.value, size.value, advice)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: system)
    whole = torch.arange(2**20, dtype=torch.int32)
    for part in (whole[:10], whole[1000 : 2**19 + 1000], whole):
        use_large_pages(part)
    assert [advice for *_, advice in asked] == [25, 25]  # MADV_COLLAPSE, and none for the small one
    for part, (start, size, _) in zip((whole[1000 : 2**19 + 1000], whole), asked, strict=True):
        assert start % 2**21 == size % 2**21 == 0
        assert start <= part.data_ptr() and part.data_ptr() + part.nbytes <= start + size


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages")
def test_rows_that_are_read_here_and_there_are_copied_out_of_files(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 2**13)
    first, small = (torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) for size in (2**21, 2**10))
    before, own = first.data_ptr(), torch.arange(2**20, dtype=torch.int32)
    held = first.data
    shared = torch.zeros(2**20, dtype=torch.int32).share_memory_()  # other processes may read it
    for tensor in (first, small, own, shared):
        at = tensor.data_ptr()
        use_own_large_pages(tensor)
        assert (tensor.data_ptr() == at) == (tensor is not first)
    assert torch.equal(first, held) and held.data_ptr() == before
    at = first.data_ptr()
    with torch.inference_mode():
        use_own_large_pages(first)
    assert first.data_ptr() == at and not first.is_inference()
