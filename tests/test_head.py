"""The head in two planes: a step that wants the greatest logit reads the low plane of few rows, and finds the same."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from helpers.packing import VARIANTS, Packed, packed

from stocha_hf import convert, load_model
from stocha_hf.conversion.quantize import layout
from stocha_hf.cuts import PROJECTIONS, InputCuts
from stocha_hf.decoding import build, loop, step
from stocha_hf.decoding.structs import ABOUT, ALL, DTYPES, GREATEST, Call, Model, matrix, pointer
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

    def logits(
        self,
        wanted: int,
        listed: torch.Tensor | None = None,
        threads: int = 1,
        sums: torch.Tensor | None = None,
        below: float = 1.0,
    ) -> torch.Tensor:
        tokens = len(self.x)
        ids, starts = torch.arange(tokens), torch.zeros(1, dtype=torch.int64)
        found = torch.full((tokens, len(self.bias) if listed is None else len(listed)), torch.nan)
        told = (None, 0) if listed is None else (listed.data_ptr(), len(listed))
        pointers = (ids.data_ptr(), ids.data_ptr(), starts.data_ptr())
        call = Call(*pointers, 1, tokens, tokens, found.data_ptr(), 0, *told, wanted, pointer(sums), 1 / below)
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


def peaked(library: Any, tokens: int, dtype: torch.dtype, peak: float) -> Head:
    """A head whose rows 7 and 1500 lie along the first token's x: logits of `peak` and 0.9 of it, others are small."""
    weights = packed(2003, 96, 8)
    head = Head(library, weights, tokens, dtype)
    x = head.x[0].float()
    for row, logit in ((7, peak), (1500, 0.9 * peak)):
        weights.codes[row] = (127 * x / x.abs().max()).round().char()
        weights.scale[row] = logit * x.abs().max() / 127 / x.norm() / 96**0.5
    head.weights = weights.in_planes()
    head.model.head = head.weights.matrix(head.bias)
    return head


@pytest.mark.parametrize("dtype", TYPES)
def test_a_sum_lies_on_the_side_of_the_limit_where_that_of_all_logits_does(library: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = {(whole, doubt): 0 for whole in (False, True) for doubt in (False, True)}
    for peak, tokens in itertools.product((4, 7, 8, 9, 12, 30), (1, 3)):
        head, sums = peaked(library, tokens, dtype, peak), torch.empty(tokens)
        every = head.logits(ALL, sums=sums)
        exact = (every.double() - every.double().amax(1, keepdim=True)).exp().sum(1)
        torch.testing.assert_close(sums.double(), exact, rtol=2e-6, atol=0)
        for below, threads in itertools.product((0.01, 0.3, 0.6, 0.9), (1, 2, 3)):
            told = torch.full((tokens,), torch.nan)
            found = head.logits(GREATEST, threads=threads, sums=told, below=below)
            doubts, computed = 1 / told < below, found > -torch.inf
            assert torch.equal(doubts, 1 / exact < below) and torch.equal(found.argmax(1), every.argmax(1))
            assert torch.equal(found[computed], every[computed]), "of those that are computed, the same bits"
            if whole := bool(computed.all()):
                torch.testing.assert_close(told.double(), exact, rtol=2e-6, atol=0)
            counts[whole, bool(doubts[0])] += tokens == 1
    assert min(counts.values()) > 0


def test_a_sum_of_logits_that_are_not_finite_or_far_apart(library: Any) -> None:
    torch.manual_seed(0)
    for kind in ("nan", "masked", "far", "zero"):
        head = peaked(library, 2, torch.float32, 3e4 if kind == "far" else 8)
        if kind == "nan":
            head.x[1, 3] = torch.nan
        if kind == "masked":
            head.bias[:1000] = -torch.inf
        if kind == "zero":
            head.weights.scale[:] = 0
            head.bias.zero_()
        every = head.logits(ALL)
        probability = (every.amax(1) - every.logsumexp(1)).exp()
        for wanted, threads, below in itertools.product((ALL, GREATEST), (1, 2, 3), (1e-3, 0.5)):
            told = torch.empty(2)
            head.logits(wanted, threads=threads, sums=told, below=below)
            judged = step.few_logits(told)
            found = (judged.amax(1) - judged.logsumexp(1)).exp()
            assert torch.equal(found < below, probability < below) and torch.equal(found.isnan(), probability.isnan())
            if wanted == ALL:
                torch.testing.assert_close(found, probability, rtol=1e-5, atol=0, equal_nan=True)


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


@torch.no_grad()
def test_steps_in_doubt_are_those_that_all_logits_tell(wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("qwen2", vocab_size=3000, tie_word_embeddings=False, max_position_embeddings=512)
    model.lm_head.weight *= 25  # or no token would be likely
    cuts = InputCuts({name: [0.3, 0.3] for name in PROJECTIONS}, fallback=0.5)
    patch(model, StochaConfig(activation="silu", inputs=cuts))
    exchange(model.to(torch.bfloat16).eval(), Quantization(bits=4), fill=True)
    run, doubts = step.run, []

    def generated() -> torch.Tensor:
        model.cutting.steps = model.cutting.repeated = 0
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 100, "eos_token_id": 3000, "pad_token_id": 0}
        found = model.generate(PROMPT.repeat(2, 1) + torch.tensor([[0], [1]]), **options)
        doubts.append((model.cutting.steps, model.cutting.repeated))
        return found

    def by_all(*args: Any, sums: torch.Tensor | None = None, **kwargs: Any) -> Any:
        logits = run(*args, **kwargs | {"wanted": ALL})
        if sums is not None:
            sums[:] = (logits[:, -1] - logits[:, -1].amax(1, keepdim=True)).exp().sum(1)
        return logits

    found = generated()
    assert set(wanted) == {GREATEST}
    monkeypatch.setattr(step, "run", by_all)
    assert torch.equal(found, generated())
    assert doubts[0] == doubts[1] and 10 < doubts[0][1] < 180 and doubts[0][0] == 198


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
