"""Decoding with the kernels: what a stocha model does differently where stocha_hf is installed.

Patching a model calls `install`, which gives its decoder layers and Linear layers classes of this file. In training
and prefill these are the native ones. In a decode step (modeling_stocha.decodes: eval mode, no gradients, at most 8
tokens) an FFN that skips neurons is two kernels on a GPU, and nothing else changes there. On a CPU

- a Linear layer is one kernel, since PyTorch's reaches a third of the memory's speed with few tokens;
- an FFN is one kernel that reads active neurons only (StochaMLP.decode);
- a decoder layer of the Llama family with one new token a sequence and no padding is two kernels around the cache's
  update: norm, projections and rotary embedding; attention, norm and FFN. Called one by one, its thirty small
  operations take longer in Python than the weights take to read.

Anything that must be called, such as hooks or adapters, is called: then the smaller kernels remain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from stocha_hf.decoding import ops
from stocha_hf.decoding.memory import release
from stocha_hf.decoding.ops import available
from stocha_hf.modeling_stocha import ACTIVATIONS, by_neuron, decodes, is_plain

__all__ = ["KERNELS", "install", "release"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Kernels(NamedTuple):
    """What a StochaMLP decodes with; functions and no module, so that models can be copied and pickled."""

    available: Callable[[str], bool]  # of a device type
    ffn: Callable[..., torch.Tensor]


KERNELS = Kernels(available, ops.ffn)


def install(model: nn.Module) -> None:
    """Give the decoder layers and Linear layers of a patched model their classes of this file."""
    for module in model.modules():
        for kind in (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer, Linear):
            if type(module) is kind.native_class:
                module.__class__ = kind
    for mlp in (module for module in model.modules() if hasattr(module, "kernels")):
        for name in ("gate_proj", "up_proj", "down_proj"):
            if type(linear := getattr(mlp, name)) is Linear:
                linear.__class__ = nn.Linear  # type: ignore[assignment]


class Linear(nn.Linear):
    """A Linear layer that decodes with the kernel. Not for an FFN's, which has a kernel of its own."""

    native_class = nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self._parameters["weight"]
        if not self.training and x.is_cpu and decodes(x) and _is_taken(weight, x.dtype):
            return ops.linear(x, weight, self._parameters["bias"])
        return super().forward(x)


def _is_taken(weight: torch.Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernel takes this weight with an x of this dtype."""
    return (
        type(weight) is nn.Parameter
        and weight.is_cpu
        and weight.dtype == dtype
        and weight.is_contiguous()
        and (torch.compiler.is_compiling() or available())
    )


class FusedLayer(nn.Module):
    """Mixin before a native decoder layer; its class keeps the native name, which FSDP's wrapping policies ask for."""

    native_class: type[nn.Module]
    attention_class: Any
    norm_class: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the native layer's: hidden_states [batch, length, hidden_size] to the same shape."""
        if (
            not self.training
            and attention_mask is None  # each token sees all that is cached
            and past_key_values is not None
            and position_embeddings is not None
            and hidden_states.shape[1] == 1
            and hidden_states.is_cpu
            and decodes(hidden_states)
            and not torch.compiler.is_compiling()
            and available()
            and self._is_plain(hidden_states)
        ):
            return self._decode(hidden_states, past_key_values, *position_embeddings)
        return super().forward(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether nothing but the native modules' own computation would run."""
        parts: Any = self._modules
        attention: Any = parts["self_attn"]
        mlp: Any = parts["mlp"]
        norms: list[Any] = [parts["input_layernorm"], parts["post_attention_layernorm"]]
        norms += [attention._modules[name] for name in ("q_norm", "k_norm") if name in attention._modules]
        return (
            attention.__class__ is self.attention_class
            and attention.config._attn_implementation == "sdpa"
            and hasattr(mlp, "kernels")
            and not any(_is_called(module) for module in (attention, mlp, *norms))
            and all(
                norm.__class__ is self.norm_class and norm._parameters["weight"].dtype == x.dtype for norm in norms
            )
            and all(is_plain(attention._modules[name], x, Linear) for name in PROJECTIONS)
            and mlp.skips(x)
            and by_neuron(mlp._modules["down_proj"]) is not None
        )

    def _decode(self, x: torch.Tensor, cache: Any, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        parts: Any = self._modules
        attention, mlp, norm = parts["self_attn"], parts["mlp"], parts["input_layernorm"]
        q, k, v, o = (attention._modules[name]._parameters for name in PROJECTIONS)
        head_norms = [attention._modules.get(name) for name in ("q_norm", "k_norm")]
        query, key, value = ops.qkv(
            x,
            norm._parameters["weight"],
            (q, k, v),
            [head._parameters["weight"] if head is not None else None for head in head_norms],
            (cosine, sine),
            attention.head_dim,
            norm.variance_epsilon,
        )
        keys, values = cache.update(key, value, attention.layer_idx)
        norm = parts["post_attention_layernorm"]
        gate, up = (mlp._modules[name]._parameters["weight"] for name in ("gate_proj", "up_proj"))
        return ops.layer(
            x,
            (query, keys, values),
            o,
            norm._parameters["weight"],
            (gate, up, by_neuron(mlp._modules["down_proj"])),  # type: ignore[arg-type]
            mlp.running,
            ACTIVATIONS[mlp.running].cut(mlp),  # type: ignore[misc]
            mlp.coarse,
            attention.scaling,
            norm.variance_epsilon,
        )


def _is_called(module: nn.Module) -> bool:
    """Whether something hangs on a module's call, so that it must be made."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class LlamaDecoderLayer(FusedLayer, modeling_llama.LlamaDecoderLayer):
    """Llama's, fused at decode."""

    native_class = modeling_llama.LlamaDecoderLayer
    attention_class, norm_class = modeling_llama.LlamaAttention, modeling_llama.LlamaRMSNorm


class MistralDecoderLayer(FusedLayer, modeling_mistral.MistralDecoderLayer):
    """Mistral's, fused at decode."""

    native_class = modeling_mistral.MistralDecoderLayer
    attention_class, norm_class = modeling_mistral.MistralAttention, modeling_mistral.MistralRMSNorm


class Qwen2DecoderLayer(FusedLayer, modeling_qwen2.Qwen2DecoderLayer):
    """Qwen 2's, with biases of q, k and v."""

    native_class = modeling_qwen2.Qwen2DecoderLayer
    attention_class, norm_class = modeling_qwen2.Qwen2Attention, modeling_qwen2.Qwen2RMSNorm


class Qwen3DecoderLayer(FusedLayer, modeling_qwen3.Qwen3DecoderLayer):
    """Qwen 3's, with a norm of each head's q and k."""

    native_class = modeling_qwen3.Qwen3DecoderLayer
    attention_class, norm_class = modeling_qwen3.Qwen3Attention, modeling_qwen3.Qwen3RMSNorm
