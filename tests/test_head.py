"""The head in two planes: a step that wants the greatest logit reads the low plane of few rows, and finds the same."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from helpers.packing import VARIANTS, Packed, packed

from stocha_hf import convert, load_model
from stocha_hf.conversion.quantize import layout
from stocha_hf.decoding import build, loop, step
from stocha_hf.decoding.structs import ABOUT, ALL, DTYPES, GREATEST, Call, Model, matrix
from stocha_hf.modeling_stocha import ARCHITECTURES, StochaConfig
from stocha_hf.patching import patch
from stocha_hf.quantization import Quantization
from stocha_hf.quantization_stocha import dequantize, exchange, joined, pack, split

pytestmark = pytest.mark.usefixtures("one_thread")
TYPES = (torch.float32, torch.bfloat16)
PROMPT = torch.tensor([[5, 9, 13, 21, 34, 8, 55, 40, 11, 7]])


@pytest.fixture(params=VARIANTS)
def library(request: pytest.FixtureRequest) -> Any:
    return build.load((*build.FLAGS, *request.param)) if request.param else build.kernels()


class Head:
    """A model without layers: the logits are those of normed embeddings."""

    def __init__(self, library: Any, weights: Packed, tokens: int, dtype: torch.dtype = torch.float32) -> None:
        self.library, self.weights, self.dtype = library, weights, dtype
        rows, columns = weights.exact.shape
        self.x, norm = torch.randn(tokens, columns, dtype=dtype), torch.ones(columns, dtype=dtype)
        self.bias = 0.1 * torch.randn(rows).to(dtype)
        self.kept = norm
        parts = (matrix(self.x), weights.matrix(self.bias), norm.data_ptr(), DTYPES[dtype])
        self.model = Model(None, 0, *parts, columns, 1, 1, columns, 0, 1e-6, 1.0, 0.0)

    def logits(self, wanted: int, listed: torch.Tensor | None = None, threads: int = 1) -> torch.Tensor:
        tokens = len(self.x)
        ids, starts = torch.arange(tokens), torch.zeros(1, dtype=torch.int64)
        found = torch.full((tokens, len(self.bias) if listed is None else len(listed)), torch.nan)
        told = (None, 0) if listed is None else (listed.data_ptr(), len(listed))
        pointers = (ids.data_ptr(), ids.data_ptr(), starts.data_ptr())
        call = Call(*pointers, 1, tokens, tokens, found.data_ptr(), 0, *told, wanted)
        self.library.stocha_step(ctypes.byref(self.model), ctypes.byref(call), threads)
        return found

    def exact(self) -> torch.Tensor:
        x = self.x.float()
        normed = (x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()).to(self.dtype)
        return normed.double() @ self.weights.exact.T + self.bias.double()


def test_planes_are_the_halves_of_each_code() -> None:
    codes = torch.randint(-127, 128, (5, 64), dtype=torch.int8)
    planes, whole = split(codes), codes.int() + 128
    assert planes.dtype == torch.uint8 and planes.shape == (2, 5, 32)
    assert torch.equal(planes[0], pack(whole // 16, 4)) and torch.equal(planes[1], pack(whole % 16, 4))
    assert torch.equal(joined(planes), codes) and torch.equal(joined(planes[:, 1:3]), codes[1:3])
    scale = torch.rand(5, 2).half()
    assert torch.equal(dequantize(planes, scale, 8, 50), dequantize(codes, scale, 8, 50))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [64, 77, 576])
def test_the_greatest_logit_is_that_of_all_and_few_are_computed(
    library: Any, columns: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for tokens in (1, 2, 3, 8):
        head = Head(library, packed(2003, columns, "planes"), tokens, dtype)
        every, exact = head.logits(ALL), head.exact()
        assert (every.double() - exact).norm() / exact.norm() < 0.012
        found = head.logits(GREATEST)
        assert torch.equal(found.argmax(1), every.argmax(1)) and torch.equal(found.amax(1), every.amax(1))
        computed = found > -torch.inf
        assert torch.equal(found[computed], every[computed]), "of those that are computed, the same bits"
        assert computed.all(0).sum() < 0.02 * tokens * 2003 and torch.equal(computed.all(0), computed.any(0))
        for threads in (2, 3):
            several = head.logits(GREATEST, threads=threads)
            assert torch.equal(several.argmax(1), every.argmax(1)) and torch.equal(several.amax(1), every.amax(1))


def test_about_is_within_the_deviation_that_the_low_halves_have(library: Any) -> None:
    torch.manual_seed(0)
    head = Head(library, packed(2003, 96, "planes"), 3)
    every, listed = head.logits(ALL), torch.arange(0, 2003, 3)
    x = head.x * (head.x.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    squares = x.view(3, 3, 32).square().sum(2) @ head.weights.scale.float().square().T
    error = (head.logits(ABOUT) - every) / (255 / 12 * squares).sqrt()
    assert 0.9 < error.std() < 1.1 and error.abs().max() < 7
    assert torch.equal(head.logits(ABOUT, listed), head.logits(ABOUT)[:, listed])
    assert torch.equal(head.logits(ALL, listed), every[:, listed])


def test_of_equal_logits_the_first_one_wins_and_near_ones_are_told_apart(library: Any) -> None:
    torch.manual_seed(0)
    for dtype in TYPES:
        weights = packed(400, 64, 8)
        head = Head(library, weights.in_planes(), 2, dtype)
        best = int(head.logits(ALL)[0].argmax())
        for row in (399, 3, 77):
            weights.codes[row], weights.scale[row] = weights.codes[best], weights.scale[best]
        weights.codes[5], weights.scale[5] = weights.codes[best], weights.scale[best]
        weights.codes[5, 0] += 1 if weights.codes[5, 0] < 127 else -1
        head.weights = weights.in_planes()
        head.bias.zero_()
        head.model.head = head.weights.matrix(head.bias)
        every = head.logits(ALL)
        for threads in (1, 2):
            found = head.logits(GREATEST, threads=threads)
            assert torch.equal(found.argmax(1), every.argmax(1)) and found.argmax(1)[0] in (3, 5)
            assert torch.equal(found == found.amax(1, keepdim=True), every == every.amax(1, keepdim=True))


def test_rows_that_are_all_alike_or_zero_or_not_finite_are_all_computed(library: Any) -> None:
    torch.manual_seed(0)
    for kind in ("alike", "zero", "nan"):
        head = Head(library, packed(203, 64, "planes"), 2)
        head.bias.zero_()
        codes, scale = head.weights.codes, head.weights.scale
        codes[:], scale[:] = codes[:, :1].clone(), 0 if kind == "zero" else scale[:1].clone()
        if kind == "nan":
            head.x[1, 3] = torch.nan
        found, every = head.logits(GREATEST, threads=2), head.logits(ALL)
        assert torch.equal(found.nan_to_num(7), every.nan_to_num(7)) and found[1].isnan().all() == (kind == "nan")


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What of the logits was wanted of each step."""
    found, run = [], step.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(kwargs.get("wanted", ALL))
        return run(*args, **kwargs)

    monkeypatch.setattr(step, "run", counted)
    return found


def model_of(model_type: str, **overrides: Any) -> Any:
    """A tiny model in bfloat16 and 4 bits, its head in planes."""
    model = tiny_model(model_type, max_position_embeddings=512, **overrides)
    patch(model, StochaConfig(activation=ARCHITECTURES[model_type].act))
    model.generation_config.eos_token_id = None
    exchange(model.to(torch.bfloat16), Quantization(bits=4), fill=True)
    return model.eval()


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_200_greedy_tokens_are_those_of_all_logits(
    model_type: str, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = model_type == "gemma2"
    model, options = model_of(model_type, vocab_size=3000, tie_word_embeddings=tied), {"max_new_tokens": 200}
    given = PROMPT.repeat(2, 1) + torch.tensor([[0], [1]]) if tied else PROMPT
    found = model.generate(given, do_sample=False, **options)
    assert wanted == [GREATEST] * 199 and len(set(found[0].tolist())) > 5
    monkeypatch.setattr(loop, "GREATEST", ALL)
    assert torch.equal(found, model.generate(given, do_sample=False, **options)) and wanted[199:] == [ALL] * 199


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"repetition_penalty": 1.2},
        {"return_dict_in_generate": True, "output_logits": True},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
)
def test_what_needs_more_than_the_greatest_logit_gets_all(options: dict[str, Any], wanted: list[int]) -> None:
    model_of("llama").generate(PROMPT, **{"do_sample": False, "max_new_tokens": 5} | options)
    assert wanted == [ALL] * 4


def test_folders_without_planes_work_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "planes", bits=4)
    monkeypatch.setattr("stocha_hf.conversion.quantize.layout", lambda *args: replace(layout(*args), format=1))
    convert(tmp_path / "source", tmp_path / "before", bits=4)
    models = [load_model(str(tmp_path / name)) for name in ("planes", "before")]
    heads = [model.lm_head for model in models]
    assert [(head.codes.dim(), head.quantized_format) for head in heads] == [(3, 2), (2, 1)]
    assert models[0].model.layers[0].mlp.up_proj.quantized_format == 1, "which older kernels read"
    assert torch.equal(joined(heads[0].codes), heads[1].codes)
    torch.testing.assert_close(models[0](PROMPT).logits, models[1](PROMPT).logits, rtol=1e-5, atol=1e-6)
    models[1].save_pretrained(tmp_path / "saved")
    assert load_model(str(tmp_path / "saved")).config.quantization_config.format == 1
