"""Tiny models of every architecture, made from their configs, and a throw-away tokenizer."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from stocha_hf.modeling_stocha import ARCHITECTURES

CONFIGS = {  # model_type -> config class and what it needs beyond the sizes below
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8}),
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(model_type: str = "llama", **overrides: Any) -> Any:
    """A native CausalLM of two layers in eval mode; fixed random weights, large enough for activations to matter."""
    class_name, extra = CONFIGS[model_type]
    config = getattr(transformers, class_name)(**{**SIZES, "initializer_range": 0.3, **extra, **overrides})
    torch.manual_seed(0)
    return getattr(transformers, ARCHITECTURES[model_type].causal_lm)(config).eval()


def tiny_tokenizer() -> Any:
    """One token per word w4..w63, with the specials that the tiny configs name and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 64)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
    tokenizer.chat_template = "{% for message in messages %}w4 {{ message['content'] }} {% endfor %}w5"
    return tokenizer
