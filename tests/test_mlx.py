"""MLX-LM and a converted folder: it stops without remote code, and with it computes the folder's own activation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import stocha_hf

mx = pytest.importorskip("mlx.core")
TOKENS = [[1, 5, 9, 17, 28, 4, 8, 30]]


def converted(where: Path, model_type: str, **options: Any) -> Path:
    layers = {"num_hidden_layers": 6} if model_type == "gemma3_text" else {}  # it asks for a whole pattern of windows
    tiny_model(model_type, **layers).save_pretrained(where / "native")
    tiny_tokenizer().save_pretrained(where / "native")
    stocha_hf.convert(where / "native", where / "out", **options)
    return where / "out"


def logits(folder: Path, **options: Any) -> torch.Tensor:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder, **options)
    return torch.tensor(model(mx.array(TOKENS)).tolist())


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"activation": "fatrelu", "threshold": [0.1, 0.4]}),
        ("mistral", {"activation": "shifted_relu", "threshold": 0.1}),
        ("qwen2", {"activation": "relu"}),
        ("qwen3", {"activation": "relu2"}),
        ("gemma2", {"activation": "drelu"}),
        ("gemma3_text", {"activation": "relu"}),
    ],
)
def test_it_computes_the_folder_s_activation_or_stops(tmp_path, model_type, options):
    folder = converted(tmp_path, model_type, **options)
    with pytest.raises(ValueError, match=r"custom module \('mlx_stocha.py'\)"):
        logits(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits
    torch.testing.assert_close(logits(folder, trust_remote_code=True), expected, rtol=1e-3, atol=1e-3)


def test_a_folder_with_the_base_activation_is_mlx_s_own(tmp_path):
    folder = converted(tmp_path, "llama", p=0.3)
    assert not (folder / "mlx_stocha.py").exists()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(TOKENS)).logits
    torch.testing.assert_close(logits(folder), expected, rtol=1e-3, atol=1e-3)


def test_an_activation_that_it_lacks_is_refused(tmp_path):
    folder = converted(tmp_path, "llama", activation="topk", k=3)
    with pytest.raises(ValueError, match="infers with topk: expected one of relu"):
        logits(folder, trust_remote_code=True)


def test_tokens_factors_of_input_cuts_are_not_read(tmp_path):
    folder = converted(tmp_path, "qwen2", activation="relu")
    expected = logits(folder, trust_remote_code=True)
    config = json.loads((folder / "config.json").read_text())
    config["stocha"]["inputs"] = {"thresholds": {"o_proj": [0.1, 0.1]}, "token_factors": True}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    added = {f"model.layers.{layer}.self_attn.o_proj_token_factor": torch.ones(33) for layer in (0, 1)}
    save_file(weights | added, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(logits(folder, trust_remote_code=True), expected)


def test_without_its_model_file_it_stops_at_them_and_runs_what_has_none(tmp_path):
    from mlx_lm.utils import load_model

    from stocha_hf.cuts import InputCuts
    from stocha_hf.modeling_stocha import StochaConfig
    from stocha_hf.patching import patch

    model = tiny_model("qwen2")
    cuts = InputCuts({"o_proj": [0.1, 0.1]}, token_factors=True)
    patch(model, StochaConfig(activation="silu", inputs=cuts))
    model.save_pretrained(tmp_path / "cut")
    tiny_tokenizer().save_pretrained(tmp_path / "cut")
    stocha_hf.convert(tmp_path / "cut", tmp_path / "same", inputs_fallback=0.5)
    with pytest.raises(ValueError, match="o_proj_token_factor"):
        load_model(tmp_path / "same")
    stocha_hf.convert(tmp_path / "cut", tmp_path / "off", inputs=0)
    load_model(tmp_path / "off")
