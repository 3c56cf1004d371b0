"""GGUF files for the tests: a native model's tensors and sizes, written as llama.cpp's converter writes them.

write_gguf(tmp_path / "model.gguf", tiny_model("llama", vocab_size=32))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from stocha_hf.conversion.gguf import GEMMA_PARTS, LAYER_PARTS, PARTS
from stocha_hf.conversion.gguf_config import MODEL_TYPES

ARCHS = {model_type: arch for arch, model_type in MODEL_TYPES.items()}


def letters(writer: gguf.GGUFWriter) -> None:
    """32 tokens of byte-level BPE."""
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(97 + i) for i in range(26)] + ["ab", "cd"] + [f"<{i}>" for i in range(4)])
    writer.add_token_scores([-float(i) for i in range(32)])  # as SentencePiece has; transformers asks for them
    writer.add_token_types([1] * 28 + [3] * 4)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(28)
    writer.add_eos_token_id(29)


def pieces(writer: gguf.GGUFWriter) -> None:
    """32 tokens as SentencePiece has them, with scores and without merges; whether BOS begins is not said."""
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *"adehnt", "\u2581t", "he", "\u2581the", "\u2581a", "nd", "\u2581and"]
    tokens += [f"<{i}>" for i in range(len(tokens), 32)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(32)])
    writer.add_token_types([2, 3, 3] + [1] * 29)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write_gguf(
    path: Path,
    model: Any,
    *,
    quantized: gguf.GGMLQuantizationType | None = None,
    change: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
    vocabulary: Callable[[gguf.GGUFWriter], object] = letters,
    more: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Write a native model as llama.cpp's converter does; returns its tensors by GGUF name."""
    config, arch = model.config, ARCHS[model.config.model_type]
    writer = gguf.GGUFWriter(path, arch, **options)
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters.get("full_attention", parameters)["rope_theta"])
    vocabulary(writer)
    more(writer)
    tensors = gguf_tensors(model, arch)
    change(tensors)
    for name, value in tensors.items():
        if quantized is not None and value.ndim == 2:
            packed = gguf.quantize(value, quantized)
            writer.add_tensor(name, packed, raw_dtype=quantized)
            tensors[name] = gguf.dequantize(packed, quantized)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def gguf_tensors(model: Any, arch: str) -> dict[str, np.ndarray]:
    config, gemma = model.config, arch.startswith("gemma")
    ours = {native: name for name, native in PARTS.items()}
    layer_names = {native: name for name, native in (LAYER_PARTS | (GEMMA_PARTS if gemma else {})).items()}
    found = {}
    for name, value in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        part, end = name.rsplit(".", 1)
        if part.startswith("model.layers."):
            _, _, layer, part = part.split(".", 3)
            full = f"blk.{layer}.{layer_names[part]}.{end}"
        else:
            full = f"{ours[part]}.{end}"
        array = value.detach().float().numpy().copy()
        if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)  # as llama.cpp's converter permutes them
        if gemma and part.endswith("norm"):
            array = array + 1
        found[full] = array
    return found
