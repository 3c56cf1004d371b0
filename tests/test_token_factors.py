"""Tokens' own factors of thresholds: what a projection computes with them, in every way to call and keep a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_warm, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from stocha_hf.cuts import PROJECTIONS, SHARED, InputCuts
from stocha_hf.cuts_stocha import cut_inputs, cut_projections, projections, token_logs
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.models import load_model
from stocha_hf.patching import patch, unpatch
from stocha_hf.spec import ARCHITECTURES

TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60], [1, 60, 3, 3, 17, 9, 22, 5]])
pytestmark = pytest.mark.usefixtures("one_thread")


def factor_model(model_type: str = "llama", of: Any = PROJECTIONS, **fields: Any) -> Any:
    """A tiny model whose tokens' factors differ: random weights in the place of zeros."""
    model = tiny_model(model_type)
    cuts = InputCuts({name: [0.3, 0.4] for name in of}, token_factors=True, **fields)
    patch(model, StochaConfig(activation=ARCHITECTURES[model_type].act, inputs=cuts))
    noise = torch.Generator().manual_seed(3)
    for found in factors(model).values():
        found.data.copy_(torch.randn(found.shape, generator=noise) * len(found) ** -0.5)
    return model


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if name.endswith("_token_factor")}


def reference(model: Any, of: Any = PROJECTIONS) -> Any:
    """The native model, whose projections are given what is left of their inputs, at every token."""
    native = tiny_model(model.config.model_type)
    rows = zip(projections(native), projections(model), (0.3, 0.4), strict=True)
    for layer, patched, limit in rows:
        for group in SHARED:
            names = [name for name in group if name in of]
            for name in names:
                weights = getattr(*patched[name].factors)

                def cut(module: Any, args: Any, w: Any = weights, limit: float = limit) -> torch.Tensor:
                    x = args[0]
                    factor = torch.exp(torch.tanh((x @ w[:-1, None]) + w[-1]))
                    return torch.where(x.abs() > limit * factor, x, 0.0)

                layer[name].register_forward_pre_hook(cut)
    return native


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_projection_cuts_by_its_tokens_own_factors(model_type: str) -> None:
    model = factor_model(model_type)
    with torch.no_grad(), cut_inputs(model, "always"):
        found = model(TOKENS).logits
    plain = factor_model(model_type)
    for module in cut_projections(plain):
        module.factors = ()
    with torch.no_grad(), cut_inputs(plain, "always"):
        assert not torch.allclose(found, plain(TOKENS).logits, atol=1e-4)
        assert torch.allclose(found, reference(model)(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_zeros_are_factors_of_one_and_factors_stay_within_their_bounds() -> None:
    x = torch.randn(2, 5, 8)
    assert torch.equal(token_logs(x, torch.zeros(9)), torch.zeros(2, 5, 1))
    assert token_logs(x * 1e4, torch.ones(9)).abs().max() <= 1
    weights = torch.tensor([*[0.0] * 7, 0.5, -0.25])
    assert torch.allclose(token_logs(x, weights)[..., 0], torch.tanh(0.5 * x[..., 7] - 0.25))
    model = factor_model(of=("k_proj", "v_proj", "down_proj"))
    assert [*factors(model)] == [
        f"model.layers.{layer}.{part}_token_factor"
        for layer in (0, 1)
        for part in ("self_attn.k_proj", "mlp.down_proj")
    ]
    assert {module.factors[1] for module in cut_projections(model)} == {
        "k_proj_token_factor",
        "down_proj_token_factor",
    }


def test_copies_and_folders_have_them_and_unpatching_takes_them_off(tmp_path: Path) -> None:
    model = factor_model()
    with torch.no_grad(), cut_inputs(model, "always"):
        expected = model(TOKENS).logits
    other = copy.deepcopy(model)
    for found in factors(model).values():
        found.data.zero_()
    model.save_pretrained(tmp_path / "zeros")
    other.save_pretrained(tmp_path / "cut")
    for again in (other, load_model(tmp_path / "cut")):
        assert not any(found.requires_grad for found in factors(again).values())
        with torch.no_grad(), cut_inputs(again, "always"):
            assert torch.allclose(again(TOKENS).logits, expected, atol=1e-5)
    with torch.no_grad(), cut_inputs(zeros := load_model(tmp_path / "zeros"), "always"):
        assert not torch.allclose(zeros(TOKENS).logits, expected, atol=1e-4)
    unpatch(other)
    assert {*other.state_dict()} == {*tiny_model("llama").state_dict()}


def test_the_remote_class_has_them_without_stocha_hf(tmp_path: Path) -> None:
    model = factor_model(prefill=True)
    model.save_pretrained(tmp_path / "cut")
    tiny_tokenizer().save_pretrained(tmp_path / "cut")
    with torch.no_grad():
        expected = model(TOKENS).logits
    torch.save(expected, tmp_path / "expected.pt")
    done = run_warm(
        "import sys, torch; sys.modules['stocha_hf'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'cut')!r}, trust_remote_code=True)\n"
        f"found = model(torch.tensor({TOKENS.tolist()})).logits\n"
        f"print(torch.allclose(found, torch.load({str(tmp_path / 'expected.pt')!r}), atol=1e-5))\n"
    )
    assert done.stdout.split()[-1] == "True", done.stderr


def test_what_the_native_class_saves_lacks_them_and_is_refused(tmp_path: Path) -> None:
    factor_model().save_pretrained(tmp_path / "cut")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    native.save_pretrained(tmp_path / "saved")
    with pytest.raises(StochaError, match=r"q_proj_token_factor .* is missing, as where the native class saved"):
        load_model(tmp_path / "saved")
    kind = type(factor_model())  # as remote code loads it, which cannot refuse
    found = kind.from_pretrained(tmp_path / "saved")
    assert len(factors(found)) == 8 and not any(value.any() for value in factors(found).values()), "factors of 1"
    whole = kind.from_pretrained(tmp_path / "cut")
    assert all(value.any() for value in factors(whole).values())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_step_computes_what_the_modules_do(model_type: str) -> None:
    model = factor_model(model_type)
    with torch.no_grad():
        cache = model(TOKENS[:, :6]).past_key_values
        found = model(TOKENS[:, 6:7], past_key_values=cache).logits
        hooked = factor_model(model_type)
        for module in cut_projections(hooked):  # so the modules are called
            module.register_forward_hook(lambda *_: None)
        cache = hooked(TOKENS[:, :6]).past_key_values
        assert torch.allclose(found, hooked(TOKENS[:, 6:7], past_key_values=cache).logits, rtol=1e-4, atol=1e-5)
