"""What vLLM's transformers backend asks of a folder's code, checked without vLLM.

The backend builds the base model that `auto_map` names with its parameters on the meta device, puts classes of its own
in the place of linear layers, loads the tensors by their names, and computes with an attention function of its own,
whose extra arguments every layer has to hand on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import stocha_hf

TOKENS = torch.tensor([[1, 5, 9, 17, 28, 4, 8, 30]])


class Replaced(nn.Module):
    """A linear layer that is no nn.Linear, as vLLM's are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(linear.weight.shape))
        if linear.bias is not None:
            self.bias = nn.Parameter(torch.empty(linear.bias.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, getattr(self, "bias", None))


def on_meta(
    module: nn.Module, name: str, value: nn.Parameter | None, register: Any = nn.Module.register_parameter
) -> None:
    register(module, name, value if value is None else nn.Parameter(value.to("meta")))


def replace_linears(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Replaced(child))
        else:
            replace_linears(child)


def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **extra: Any) -> Any:
    """Causal attention that counts its calls in the extra argument, by layer."""
    extra["attention_instances"][module.layer_idx] += 1
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return found.transpose(1, 2), None


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_backend_s_steps_give_the_folder_s_own_activation(tmp_path, monkeypatch, model_type):
    tiny_model(model_type).save_pretrained(tmp_path / "native")
    tiny_tokenizer().save_pretrained(tmp_path / "native")
    folder = tmp_path / "fat"
    stocha_hf.convert(tmp_path / "native", folder, activation="fatrelu", threshold=0.3)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "counting", attention)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config._attn_implementation = "counting"
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", on_meta)
        model = AutoModel.from_config(config, trust_remote_code=True)
    assert type(model).__name__.startswith("Stocha") and type(model).is_backend_compatible()
    assert model.config.base_model_tp_plan and model.config.base_model_pp_plan
    replace_linears(model)
    tensors = load_file(folder / "model.safetensors")
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    assert {name for name, _ in model.named_parameters()} == state.keys()
    model.load_state_dict(state, strict=False, assign=True)
    model.eval()
    calls, where = dict.fromkeys(range(2), 0), torch.arange(TOKENS.shape[1])[None]
    with torch.no_grad():
        found = model(TOKENS, position_ids=where, use_cache=False, attention_instances=calls, return_dict=False)[0]
        expected = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(TOKENS).last_hidden_state
        plain = AutoModel.from_pretrained(folder).eval()(TOKENS).last_hidden_state
    assert calls == {0: 1, 1: 1}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)  # native classes leave the threshold out
