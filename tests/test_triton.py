"""The Triton kernels against PyTorch in float64, and models that decode with them.

They need a GPU with Triton. On a CPU with Triton installed, TRITON_INTERPRET=1 runs those of the kernels alone.

A kernel is compiled anew for each dtype, activation, tile (2 and 3 tokens, or more), and for sizes that 16 or a block
of columns divides: seconds each, in float32, whose products are unrolled multiply-adds, up to half a minute. So each
activation meets one shape, each shape one activation, and several processes compile CASES before the first test.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_model
from helpers.kernels import bound, dense, error, matrices
from helpers.triton import compiling

from stocha_hf.decoding import ops, triton_ffn
from stocha_hf.modeling_stocha import StochaConfig, stocha_mlps
from stocha_hf.patching import patch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = pytest.mark.skipif(not CUDA or triton_ffn.triton is None, reason="no GPU with Triton")
needs_triton = pytest.mark.skipif(
    triton_ffn.triton is None or not (CUDA or INTERPRETED), reason="no GPU with Triton, and no TRITON_INTERPRET=1"
)
# The interpreter cuts float32 off to bfloat16 where the GPU rounds
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
ONE = (64, 96)  # (H, M)
SHAPES = [(16, 8), (1, 1), *([] if INTERPRETED else [(576, 1536), (1024, 700), (2056, 3000)])]
Case = tuple[str, tuple[int, int], int]  # activation, shape, tokens
CASES: dict[str, list[Case]] = {
    **{activation: [(activation, ONE, tokens) for tokens in (1, 2, 3)] for activation in ops.HIDDEN},
    "all numbers of tokens": [("relu", (33, 77), tokens) for tokens in range(1, 9)],
    "shapes": [("fatrelu", shape, tokens) for shape in SHAPES for tokens in (1, 2)],
    "many tokens": [("relu", shape, 8) for shape in (ONE, *SHAPES[2:])],
}
COMPILERS = 8  # processes


def given(size: int, width: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in matrices(size, width, tokens, dtype)]


def kernel(tensors: list[torch.Tensor], activation: str, threshold: float) -> torch.Tensor:
    out = triton_ffn.ffn(*tensors, activation, threshold)
    assert out is not None
    return out


def run_cases(cases: Iterable[Case], dtype: torch.dtype) -> None:
    """Compile what they need, in a process of its own."""
    for activation, shape, tokens in cases:
        kernel(given(*shape, tokens, dtype), activation, 0.0)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    if not CUDA or triton_ffn.triton is None:
        return
    every = [case for cases in CASES.values() for case in cases]
    by_kernel = {(activation, shape, min(tokens, 2) + (tokens > 3)) for activation, shape, tokens in every}
    cases = [(activation, shape, {1: 1, 2: 2, 3: 8}[kind]) for activation, shape, kind in sorted(by_kernel)]
    jobs = sorted(itertools.product(cases, DTYPES), key=lambda job: job[1] != torch.float32)  # the longest first
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(run_cases, [[case] for case, _ in jobs], [dtype for _, dtype in jobs]))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_as_exact_as_pytorch(name: str, dtype: torch.dtype) -> None:
    for activation, (size, width), tokens in CASES[name]:
        threshold = {"fatrelu": 3.5, "shifted_relu": 0.3}.get(activation, 0.0)
        tensors = given(size, width, tokens, dtype)
        if activation == "fatrelu":  # it jumps at the threshold: whole numbers, which no rounding moves across it
            tensors[:2] = tensors[0].sign(), tensors[1].sign()
        exact = dense(*(tensor.double() for tensor in tensors), activation, threshold)
        found = kernel(tensors, activation, threshold)
        assert found.dtype == dtype and found.shape == tensors[0].shape
        allowed = bound(dense(*tensors, activation, threshold), exact)
        # float32 sums of one accumulator, where cuBLAS has several
        assert error(found, exact) <= allowed + size**0.5 * 2**-26, (size, width, tokens)


@needs_triton
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_active_neuron_gives_zeros_and_all_active_ones_the_product(dtype: torch.dtype, tokens: int) -> None:
    tensors = given(64, 96, tokens, dtype)
    assert torch.equal(kernel(tensors, "fatrelu", 1e9), torch.zeros_like(tensors[0]))
    all_active = [tensors[0].abs(), tensors[1].abs(), *tensors[2:]]
    exact = dense(*(tensor.double() for tensor in all_active), "relu", 0.0)
    assert error(kernel(all_active, "relu", 0.0), exact) <= bound(dense(*all_active, "relu", 0.0), exact)
    tensors[0][-1] = 0
    assert torch.equal(kernel(tensors, "relu", 0.0)[-1], torch.zeros(64, dtype=dtype, device=DEVICE))


@needs_triton
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_come_out_as_they_do_of_pytorch(value: float) -> None:
    for activation in ops.HIDDEN:
        for tokens in (1, 2):
            tensors = given(*ONE, tokens)
            tensors[0][0, 5] = value
            found, expected = kernel(tensors, activation, 0.0), dense(*tensors, activation, 0.0)
            assert torch.equal(found.isfinite(), expected.isfinite())
            assert torch.equal(found.isnan(), expected.isnan())


@needs_triton
def test_the_same_input_gives_the_same_bits_and_skipped_rows_are_not_read() -> None:
    for tokens in (1, 4, 8):
        tensors = given(100, 3000 if CUDA else 300, tokens, torch.float16)
        found = [kernel(tensors, "fatrelu", 1.0) for _ in range(20 if CUDA else 2)]
        assert all(torch.equal(found[0], other) for other in found[1:])
        inactive = ~(torch.nn.functional.linear(tensors[0], tensors[1]) > 0.9).any(0)
        tensors[2][inactive] = tensors[3][inactive] = float("nan")
        assert torch.equal(kernel(tensors, "fatrelu", 1.0), found[0])


@pytest.mark.slow
@pytest.mark.skipif(
    triton_ffn.triton is None or INTERPRETED or CUDA, reason="no Triton, interpreted, or a GPU is there"
)
@pytest.mark.parametrize("size", [576, 1024])  # the tiles of the first kernel divide the second
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernels_compile_for_an_h100_that_is_not_there(
    size: int, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = triton_ffn.triton_one_token if tokens == 1 else triton_ffn.triton_tokens
    compiled = compiling([module], monkeypatch)
    on_an_h100 = (3 if dtype == torch.float32 else 4, True)
    monkeypatch.setattr(triton_ffn.triton_tokens, "_options", lambda *_: on_an_h100)
    x, weights = torch.empty(tokens, size, dtype=dtype), torch.empty(1536, size, dtype=dtype)
    module.launch(x, weights, weights, weights, torch.empty_like(x), "fatrelu", 1.0)
    assert len(compiled) == 2
    assert all(kernel.metadata.shared <= 227 * 2**10 for kernel in compiled), "what a program of an H100 has"


@needs_gpu
def test_a_cuda_graph_replays_on_new_inputs_and_thresholds_stay() -> None:
    for tokens in (1, 8):
        tensors = given(64, 4096, tokens, torch.bfloat16)
        kernel(tensors, "fatrelu", 1.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel(tensors, "fatrelu", 1.0)
        for _ in range(5):
            tensors[0].normal_()
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, kernel(tensors, "fatrelu", 1.0))


@pytest.mark.slow
@needs_gpu
@pytest.mark.usefixtures("fresh_compiler")
def test_the_operator_compiles() -> None:
    tensors = given(64, 96, 2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.stocha.ffn.default, (*tensors, "relu", 0.0), test_utils=checks)
    compiled = torch.compile(lambda x: 2 * ops.ffn(x, *tensors[1:], "relu", 0.0), fullgraph=True)
    assert torch.equal(compiled(tensors[0]), 2 * kernel(tensors, "relu", 0.0))


def relu_model(model_type: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(model_type).to(DEVICE, dtype)
    patch(model, StochaConfig(activation="relu"))
    return model.eval()


TOKENS = torch.tensor([[5, 9, 13, 21, 34, 8, 55, 40, 3, 17], [11, 7, 62, 30, 4, 19, 23, 50, 44, 12]], device=DEVICE)


def decoded(model: Any, tokens: torch.Tensor, prompt: int = 6) -> torch.Tensor:
    """Logits of the tokens after the prompt, fed one at a time."""
    cache = model(tokens[:, :prompt], use_cache=True).past_key_values
    steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, tokens.shape[1])]
    return torch.cat(steps, 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each call of the kernels: its tokens."""
    made: list[int] = []
    inner = triton_ffn.ffn

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor | None:
        made.append(x.numel() // x.shape[-1])
        return inner(x, *rest)

    monkeypatch.setattr(triton_ffn, "ffn", counted)
    return made


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
@torch.no_grad()
def test_a_model_decodes_to_the_dense_logits(model_type: str, dtype: torch.dtype, calls: list[int]) -> None:
    model = relu_model(model_type, dtype)
    with torch.enable_grad():  # the dense path
        expected = model(TOKENS).logits[:, 6:].detach()
    assert not calls
    found = decoded(model, TOKENS)
    assert calls == [2] * 4 * len(stocha_mlps(model))
    assert stocha_mlps(model)[0].decode_state.transposed is not None, "copied in prefill"
    close = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    assert (found - expected).norm() <= close * expected.norm()
    with torch.autocast("cuda", torch.bfloat16):
        before = len(calls)
        decoded(model, TOKENS)
        assert len(calls) == before


@needs_gpu
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_a_static_cache_and_a_compiled_step_generate_the_same(calls: list[int]) -> None:
    model = relu_model()
    options: Any = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    expected = model.generate(TOKENS, **options)
    assert calls
    calls.clear()
    found = model.generate(TOKENS, cache_implementation="static", **options)
    assert torch.equal(found, expected) and calls, "compiled with the kernels as an operator"


@needs_gpu
def test_training_after_decoding_steps_a_fused_optimizer() -> None:
    model = relu_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        model.train()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decoded(model.eval(), TOKENS)


def test_where_triton_fails_one_warning_names_the_cause_and_decoding_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no linker")

    monkeypatch.setattr(triton_ffn, "triton_tokens", SimpleNamespace(launch=broken), raising=False)
    monkeypatch.setattr(triton_ffn, "triton", "installed")
    monkeypatch.setattr(triton_ffn, "_failures", [])
    tensors = given(64, 96, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = ops._ffn_on_gpu(*tensors, "relu", 0.0)
            assert torch.equal(found, dense(*tensors, "relu", 0.0))
    assert ["no linker" in str(warning.message) for warning in caught] == [True]
    assert not ops.available("cuda")


def test_without_triton_decoding_on_a_gpu_is_dense_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ffn, "triton", None)
    tensors = given(64, 96, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops._ffn_on_gpu(*tensors, "relu", 0.0), dense(*tensors, "relu", 0.0))
    assert not ops.available("cuda")
