"""Prompts in bfloat16 on a CPU that is slow at it: computed in float32, with the same numbers but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model

from stocha_hf.decoding import prompts
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.patching import patch

MANY = torch.arange(4, 4 + prompts.MANY)[None]
FEW = MANY[:, :-1]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A CPU that is slow at bfloat16, and the shapes of what it computed in float32."""
    shapes, computed = [], prompts._linear

    def noted(x: torch.Tensor, *others: Any) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return computed(x, *others)

    monkeypatch.setattr(prompts, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(prompts, "_linear", noted)
    return shapes


def model_of(dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    model = tiny_model("qwen2")
    patch(model, StochaConfig(activation="silu"))
    return model.to(dtype).eval()


@torch.no_grad()
def test_a_prompt_has_the_same_logits_but_for_rounding(wide: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    found = model(MANY).logits
    assert len(wide) == 7 * model.config.num_hidden_layers + 1 and found.dtype == torch.bfloat16
    monkeypatch.setattr(prompts, "multiplies_bf16", lambda: True)
    torch.testing.assert_close(found, model(MANY).logits, atol=0.02, rtol=0.02)
    assert len(wide) == 7 * model.config.num_hidden_layers + 1


@torch.no_grad()
def test_few_tokens_and_other_types_are_left_alone(wide: list[Any]) -> None:
    model_of()(FEW)
    model_of(torch.float32)(MANY)
    with torch.enable_grad():
        model_of()(MANY)
    model_of().train()(MANY)
    assert wide == []


@torch.no_grad()
def test_generate_reads_its_prompt_so_and_hooks_are_called(wide: list[Any]) -> None:
    model, seen = model_of(), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model.generate(MANY, max_new_tokens=3, do_sample=False)
    assert seen[0] == prompts.MANY and len(seen) == 3
    assert {shape[1] for shape in wide} == {prompts.MANY, *([1] if (1, 1) in wide else [])}


@pytest.mark.parametrize("bias", [False, True])
def test_weights_in_parts_are_weights_as_a_whole(bias: bool, wide: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 9, 8).bfloat16(), torch.randn(37, 8).bfloat16()
    given = (weight, torch.randn(37).bfloat16()) if bias else (weight,)
    expected = F.linear(x.float(), *(some.float() for some in given)).bfloat16()
    monkeypatch.setattr(prompts, "AT_ONCE", 80)  # 10 rows
    with torch.no_grad(), prompts.prompt(torch.zeros(2, 9)):
        found = F.linear(x, *given)
    assert len(wide) == 1 and torch.equal(found, expected)
