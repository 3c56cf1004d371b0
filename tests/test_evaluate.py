"""Perplexity and zeros against their definitions."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from stocha_hf import StochaConfig, patch
from stocha_hf.data import text_windows
from stocha_hf.errors import StochaError
from stocha_hf.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_perplexity_and_zeros_are_those_of_their_definitions() -> None:
    model = tiny_model()
    patch(model, StochaConfig(activation="relu"))
    windows = torch.randint(64, (7, 20), generator=torch.Generator().manual_seed(0))
    hidden: list[torch.Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        for layer in model.model.layers
    ]
    losses = torch.stack([model(window[None], labels=window[None]).loss for window in windows])
    for hook in hooks:
        hook.remove()
    zeros = torch.stack([(part == 0).double().mean() for part in hidden]).view(7, 2).mean(0)
    found = evaluate(model, windows)
    assert found["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert found["tokens"] == 140
    assert found["sparsity"]["per_layer"] == pytest.approx(zeros.tolist())
    assert found["sparsity"]["mean"] == pytest.approx(zeros.mean().item())


def test_text_windows_hold_the_text_in_order(tmp_path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "w4 w5 w6 w7 w8"}\n{"text": "w9 w10 w11 w12"}\n')
    assert text_windows(str(path), tmp_path, 2).tolist() == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert text_windows(str(path), tmp_path, 2, most=2).tolist() == [[4, 5], [8, 9]]
    with pytest.raises(StochaError, match="9 tokens: expected at least one window of 10"):
        text_windows(str(path), tmp_path, 10)
