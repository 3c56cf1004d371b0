"""Linear and decoder layers as a CPU decode step runs them.

- A Linear layer is one kernel, since PyTorch's reaches a third of the memory's speed with few tokens.
- A decoder layer of the Llama family with one new token a sequence and no padding is two kernels around the cache's
  update: norm, projections and rotary embedding; attention, norm and FFN. Called one by one, its thirty small
  operations take longer in Python than the weights take to read.

A model's modules have these classes only inside a step (runtime.step), so that whatever looks at them between steps,
such as a quantizer or a sharding policy, sees the native ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from stocha_hf.decoding import ops
from stocha_hf.decoding.conditions import decodes, is_called, is_plain
from stocha_hf.decoding.ffn import skipping, zero_up_to
from stocha_hf.decoding.ops import available
from stocha_hf.decoding.state import neuron_major

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Linear(nn.Linear):
    """A Linear layer that decodes with the kernel. Not for an FFN's, which has a kernel of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters.get("weight")
        here = x.is_cpu and not torch.compiler.is_compiling() and decodes(x)
        if here and type(weight) is nn.Parameter and _is_taken(weight, x.dtype):
            return ops.linear(x, weight, self._parameters.get("bias"))
        return super().forward(x)


def _is_taken(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes this weight with an x of this dtype."""
    return weight.is_cpu and weight.dtype == dtype and weight.is_contiguous() and available()


class FusedLayer(nn.Module):
    """Mixin before a native decoder layer."""

    attention_class: Any
    norm_class: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the native layer's: hidden_states [batch, length, hidden_size] to the same shape."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the former since transformers 5.24
        embeddings = kwargs.get("position_embeddings")
        if (
            not torch.compiler.is_compiling()
            and not args
            and kwargs.get("attention_mask") is None  # each token sees all that is cached
            and cache is not None
            and embeddings is not None
            and hidden_states.shape[1] == 1
            and hidden_states.is_cpu
            and decodes(hidden_states)
            and available()
            and self._is_plain(hidden_states)
        ):
            return self._decode(hidden_states, cache, *embeddings)
        return super().forward(hidden_states, *args, **kwargs)

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
            and "decode_state" in mlp.__dict__
            and not any(is_called(module) for module in (attention, mlp, *norms))
            and all(
                norm.__class__ is self.norm_class and norm._parameters["weight"].dtype == x.dtype for norm in norms
            )
            and all(is_plain(attention._modules[name], x, Linear) for name in PROJECTIONS)
            and skipping(mlp, x)
            and neuron_major(mlp) is not None
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
            (gate, up, mlp.decode_state.down_t),
            mlp.running,
            zero_up_to(mlp),
            mlp.decode_state.coarse,
            attention.scaling,
            norm.variance_epsilon,
        )


class LlamaDecoderLayer(FusedLayer, modeling_llama.LlamaDecoderLayer):
    """Llama's."""

    attention_class, norm_class = modeling_llama.LlamaAttention, modeling_llama.LlamaRMSNorm


class MistralDecoderLayer(FusedLayer, modeling_mistral.MistralDecoderLayer):
    """Mistral's."""

    attention_class, norm_class = modeling_mistral.MistralAttention, modeling_mistral.MistralRMSNorm


class Qwen2DecoderLayer(FusedLayer, modeling_qwen2.Qwen2DecoderLayer):
    """Qwen 2's, with biases of q, k and v."""

    attention_class, norm_class = modeling_qwen2.Qwen2Attention, modeling_qwen2.Qwen2RMSNorm


class Qwen3DecoderLayer(FusedLayer, modeling_qwen3.Qwen3DecoderLayer):
    """Qwen 3's, with a norm of each head's q and k."""

    attention_class, norm_class = modeling_qwen3.Qwen3Attention, modeling_qwen3.Qwen3RMSNorm


IN_A_STEP: dict[type[nn.Module], type[nn.Module]] = {  # the native class: the class during a step
    nn.Linear: Linear,
    modeling_llama.LlamaDecoderLayer: LlamaDecoderLayer,
    modeling_mistral.MistralDecoderLayer: MistralDecoderLayer,
    modeling_qwen2.Qwen2DecoderLayer: Qwen2DecoderLayer,
    modeling_qwen3.Qwen3DecoderLayer: Qwen3DecoderLayer,
}
