"""Both layouts of projections that cut their inputs: steps with cuts read copies, a row an input, other steps not."""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import pytest
import torch
from helpers.packing import VARIANTS
from test_lossless import OPTIONS, PROMPT, cut_model, drafts  # noqa: F401 - a fixture

from stocha_hf.conversion.convert import convert
from stocha_hf.decoding import both_layouts, build
from stocha_hf.decoding.both_layouts import InputRows, input_rows, keep_both_layouts
from stocha_hf.decoding.lossless import lossless
from stocha_hf.errors import StochaError
from stocha_hf.models import load_model
from stocha_hf.quantization_stocha import Quantization, QuantizedLinear, dequantize, exchange, quantize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(both_layouts, "LARGE", 1)


def model_of(model_type: str = "qwen2", **options: Any) -> Any:
    """With a row an output in all matrices of 4 bits; v_proj has 8."""
    model = cut_model(model_type, **options)
    exchange(model, Quantization(transposed=()), fill=True)
    return model


def linear(outputs: int, inputs: int) -> Any:
    native = torch.nn.Linear(inputs, outputs, bias=False)
    module = QuantizedLinear(native, Quantization(transposed=()), "q_proj")
    module.fill(native.weight)
    return module


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (96, 40), (33, 7), (40, 200)])
def test_a_copy_has_the_weights_rounded_once_more(flags: tuple[str, ...], outputs: int, inputs: int) -> None:
    module = linear(outputs, inputs)
    made = InputRows(module, build.load((*build.FLAGS, *flags)))
    weight = module.dequantized()
    found = dequantize(made.codes, made.scale, 4, outputs).t()
    codes, scale = quantize(weight.t(), 4)
    best = (dequantize(codes, scale, 4, outputs).t() - weight).norm()
    assert (found - weight).norm() <= 1.25 * best + 1e-6, "near to the least error that 4 bits can have"


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "mistral"])
def test_the_text_is_that_of_the_same_model_without_cuts(model_type: str, drafts: list[int]) -> None:  # noqa: F811
    model = model_of(model_type)
    with model.cut_inputs("never"):
        expected = model.generate(PROMPT, **OPTIONS)
    before = model.get_memory_footprint()
    assert keep_both_layouts(model) == 2 * 6
    copies = [made for module in model.modules() if (made := input_rows(module)) is not None]
    assert model.get_memory_footprint() - before == sum(made.nbytes for made in copies) > 0
    with model.cut_inputs("never"):
        assert torch.equal(model.generate(PROMPT, **OPTIONS), expected), "steps without cuts read the folder's own"
    drafts.clear()
    found = model.generate(PROMPT, custom_generate=lossless, **OPTIONS)
    assert torch.equal(found, expected)
    assert -1 in drafts and max(drafts) > 2, "drafted, and verified together"


def test_steps_with_cuts_read_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    with torch.inference_mode():
        cache = model(PROMPT, use_cache=True).past_key_values
        caches = [copy.deepcopy(cache) for _ in range(4)]
        step = torch.tensor([[3]])
        before = model(step, past_key_values=caches[0]).logits
        keep_both_layouts(model)
        after = model(step, past_key_values=caches[1]).logits
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, before, atol=0.2 * float(before.abs().max()), rtol=0)
        for module in model.modules():
            if (made := input_rows(module)) is not None:
                made.scale.zero_()
        assert not torch.equal(model(step, past_key_values=caches[2]).logits, after)
        model.train()
        model.eval()
        assert torch.equal(model(step, past_key_values=caches[3]).logits, before), "train() drops the copies"


def test_a_copy_of_codes_that_have_changed_is_not_read() -> None:
    model = model_of()
    keep_both_layouts(model)
    module = model.model.layers[0].mlp.up_proj
    assert input_rows(module) is not None
    module.codes.add_(1)
    assert input_rows(module) is None


def test_copies_stay_behind_when_a_model_is_copied() -> None:
    model = model_of()
    keep_both_layouts(model)
    assert input_rows(copy.deepcopy(model).model.layers[0].mlp.up_proj) is None


def test_what_has_no_such_projection_is_refused() -> None:
    for model in (cut_model(), cut_model(bits=4), cut_model(bits=8)):
        with pytest.raises(StochaError, match="--rows outputs"):
            keep_both_layouts(model)


def test_a_folder_is_laid_out_for_it(checkpoint: Any, text: Any, tmp_path: Any) -> None:
    convert(checkpoint(), tmp_path / "cut", inputs=0.75, calibrate=str(text), activation="silu")
    convert(tmp_path / "cut", tmp_path / "small", bits=4, rows="outputs")
    model = load_model(str(tmp_path / "small"))
    assert not model.model.layers[0].mlp.down_proj.transposed
    assert keep_both_layouts(model) > 0
    for given in ({"rows": "inputs", "bits": 4}, {"rows": "outputs"}):
        with pytest.raises(StochaError, match="expected 'outputs', with bits"):
            convert(tmp_path / "cut", tmp_path / "refused", **given)


def test_the_structure_points_to_the_copy() -> None:
    module = linear(64, 32)
    made = InputRows(module, build.kernels())
    found = made.like(both_layouts.matrix_of(module))
    assert (found.rows, found.columns, found.rows_are_inputs) == (32, 64, 1)
    assert found.weights == ctypes.c_void_p(made.codes.data_ptr()).value
