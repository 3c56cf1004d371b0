"""Thresholds for each input, learned, and folded into weights that compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from transformers import AutoModelForCausalLM

from stocha_hf.cuts_stocha import cut_inputs
from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.evaluation import compare, evaluate
from stocha_hf.measurement.selection.input_cuts import calibrate_inputs
from stocha_hf.measurement.selection.input_scales import SHARED, inputs_of, scale_inputs
from stocha_hf.measurement.selection.learned import learn_input_cuts
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.patching import patch
from stocha_hf.spec import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = torch.randint(3, 64, (8, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_scaled_inputs_leave_the_model_as_it_was(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    before = model(WINDOWS[:2]).logits
    seen = {}
    for block in blocks(model):
        for names in SHARED:
            factors = torch.rand(inputs_of(block, names)) + 0.5
            weight = block.linears[names[-1]].weight.detach().clone()
            scale_inputs(block, names, factors)
            seen[names] = (weight - block.linears[names[-1]].weight).abs().max()
    assert all(change > 1e-3 for change in seen.values())
    torch.testing.assert_close(model(WINDOWS[:2]).logits, before, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_learned_is_refused_before_a_weight_changes() -> None:
    model = tiny_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for windows, share, words in (
        (WINDOWS, 1.0, "is 1.0: expected a share between 0 and 1"),
        (WINDOWS[:0], 0.5, "there are no windows"),
        (WINDOWS + 10_000, 0.5, "has the token"),
    ):
        with pytest.raises(StochaError, match=words):
            learn_input_cuts(model, windows, share)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    patch(model, StochaConfig(activation="silu", inputs=calibrate_inputs(model, WINDOWS, 0.5)))
    with pytest.raises(StochaError, match="cuts its inputs already"):
        learn_input_cuts(model, WINDOWS, 0.5)


def test_learned_thresholds_read_what_was_asked_for_and_predict_better_than_one_share_for_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original, learned, uniform = tiny_model(), tiny_model(), tiny_model()
    cuts = learn_input_cuts(learned.eval(), WINDOWS, 0.5, steps=20)
    torch.testing.assert_close(learned(WINDOWS[:2]).logits, original.eval()(WINDOWS[:2]).logits, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in learned.parameters())
    patch(learned, StochaConfig(activation="silu", inputs=cuts))
    patch(uniform, StochaConfig(activation="silu", inputs=calibrate_inputs(uniform.eval(), WINDOWS, 0.5)))
    found = {}
    for name, model in (("learned", learned), ("uniform", uniform)):
        with cut_inputs(model, "always"):
            found[name] = evaluate(model.eval(), WINDOWS).bytes_read.share, compare(model, original, WINDOWS).kl
    assert found["learned"][0] == pytest.approx(found["uniform"][0], abs=0.02)
    assert found["learned"][1] < 0.9 * found["uniform"][1]
    learned.save_pretrained(tmp_path)  # natively it is the original
    native = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(native(WINDOWS[:2]).logits, original(WINDOWS[:2]).logits, rtol=1e-4, atol=1e-5)
