"""What a GGUF file's metadata says as a config.json: everything that changes a number, exactly, or a refusal.

Five architectures of llama.cpp are native classes here; a Mistral is a `llama` there, and a Llama with its sizes
computes the same. Scaled rotary embeddings are carried over where transformers computes the same: linear, YaRN with
its usual constants, and Llama 3.1's factors, which the file holds as the tensor rope_freqs.weight.
"""

from __future__ import annotations

import importlib.metadata
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from stocha_hf.errors import StochaError
from stocha_hf.spec import ARCHITECTURES

MODEL_TYPES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"
}  # fmt: skip
UNDERSTOOD = {  # keys of an architecture's attention and rope that are read below; any other would change numbers
    *(f"attention.{key}" for key in ("head_count", "head_count_kv", "layer_norm_rms_epsilon", "key_length")),
    *("attention.value_length", "attention.causal", "attention.sliding_window", "attention.sliding_window_pattern"),
    *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scale_linear"),
}
COUNTS = (
    *("embedding_length", "feed_forward_length", "block_count", "context_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length"),
)
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, which scale attention by hidden_size / heads
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of every Llama since 3.1
LLAMA3_CONTEXT = 8192
INSTEAD = "convert the model's safetensors instead"


def config_of(metadata: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], where: str) -> dict[str, Any]:
    """The config.json of a GGUF file of these metadata and tensors' shapes, without scaled rotary embeddings.

    Raises StochaError for another architecture, and for settings that the native class does not have.
    """
    arch = metadata.get("general.architecture")
    if arch not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise StochaError(f"{where} has the architecture {arch!r}: expected a dense gated model of {known}")
    own = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    rows = [*tensors.get("token_embd.weight", ()), None][0]
    for key in own:
        if key.startswith(("attention.", "rope.")) and key not in UNDERSTOOD:
            raise StochaError(f"{where} has {arch}.{key}, which {MODEL_TYPES[arch]} cannot express: {INSTEAD}")
    hidden, width, layers, context, heads, kv_heads, head_dim, vocabulary = _counts(own, rows, where)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise StochaError(f"{where} has {arch}.{key} {own[key]} and heads of {head_dim}: {INSTEAD}")
    if own.get("attention.causal", True) is not True or own.get("expert_count"):
        raise StochaError(f"{where} is a mixture of experts or no causal model: expected a dense causal one")
    row = ARCHITECTURES[MODEL_TYPES[arch]]
    config: dict[str, Any] = {
        "architectures": [row.causal_lm],
        "model_type": MODEL_TYPES[arch],
        # without it, transformers takes the tokenizer for one of Mistral's with an old mistake, and says so
        "transformers_version": importlib.metadata.version("transformers"),
        row.act_key: row.act,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": _float(own.get("attention.layer_norm_rms_epsilon"), "rms_norm_eps", where),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _float(own.get("rope.freq_base", 1e4), "rope", where),
        },
    }
    if MODEL_TYPES[arch] != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if arch == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if arch not in LARGEST and not _reaches(own.get("attention.sliding_window", context), context):
        raise StochaError(f"{where} has sliding-window attention, which a {arch} model has not: {INSTEAD}")
    config |= {
        f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return config | (_gemma(arch, own, config, where) if arch in LARGEST else {})


def _counts(own: Mapping[str, Any], rows: int | None, where: str) -> list[int]:
    """The values of COUNTS, and the rows of the embedding."""
    counts: dict[str, Any] = {key: own.get(key) for key in COUNTS} | {"the rows of token_embd.weight": rows}
    counts["attention.head_count_kv"] = own.get("attention.head_count_kv", counts["attention.head_count"])
    counts["attention.key_length"] = own.get("attention.key_length", _quotient(own))
    for key, value in counts.items():
        if type(value) is not int or value < 1:
            raise StochaError(f"{where} has {value!r} for {key}: expected a whole number of at least 1")
    return [*counts.values()]


def _gemma(arch: str, own: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    found: dict[str, Any] = {
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == LARGEST[arch] else config["head_dim"]
    }
    if "attention.sliding_window" in own:
        found["sliding_window"] = own["attention.sliding_window"]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in own:
            found[key] = _float(own[key], key, where)
    if arch == "gemma3":
        local = _float(own.get("rope.freq_base_swa", 1e4), "rope.freq_base_swa", where)
        found["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    if "attention.sliding_window_pattern" in own and own["attention.sliding_window_pattern"] != {"gemma3": 6}.get(
        arch, 2
    ):
        raise StochaError(f"{where} has another pattern of sliding windows than {arch}: {INSTEAD}")
    return found


def with_scaled_rope(
    config: dict[str, Any], metadata: Mapping[str, Any], factors: Sequence[float] | None, where: str
) -> dict[str, Any]:
    """`config` with the scaling of its rotary embeddings, if any; `factors` are those of rope_freqs.weight.

    Raises StochaError for a scaling that transformers would not compute alike.
    """
    arch = metadata["general.architecture"]
    own = {key.removeprefix(f"{arch}.rope."): value for key, value in metadata.items() if f"{arch}.rope." in key}
    factor = own.get("scaling.factor", 1.0)
    kind = own.get("scaling.type", "none" if factor in (0, 1.0) else "linear")  # llama.cpp's default
    if own.get("scale_linear", 1.0) != 1.0:
        kind, factor = "linear", own["scale_linear"]
    context = own.get("scaling.original_context_length")
    scaling: dict[str, Any] = {}
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": _float(factor, "rope.scaling.factor", where)}
        if kind == "yarn":
            if type(context) is not int or context < 1:
                raise StochaError(f"{where} has YaRN without an original context length: {INSTEAD}")
            scaling["original_max_position_embeddings"] = context
    elif kind != "none":
        raise StochaError(f"{where} has rotary embeddings of the scaling {kind!r}: {INSTEAD}")
    parameters = config["rope_parameters"]
    if factors is not None and set(factors) != {1.0}:
        found = _llama3(parameters.get("rope_theta"), config["head_dim"], factors, context or LLAMA3_CONTEXT)
        if found is None or scaling:
            raise StochaError(
                f"{where} has rotary embeddings scaled by rope_freqs.weight in another way than Llama 3.1: {INSTEAD}"
            )
        scaling = found
    if "full_attention" in parameters:
        return config | {"rope_parameters": parameters | {"full_attention": parameters["full_attention"] | scaling}}
    return config | {"rope_parameters": parameters | scaling}


def _llama3(base: float | None, head_dim: int, factors: Sequence[float], context: int) -> dict[str, Any] | None:
    """The parameters with which Llama 3.1's rule gives these factors, None where it gives others."""
    factor = round(max(factors), 4)
    if base is None or len(factors) != head_dim // 2 or factor <= 1:
        return None
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    for index, given in enumerate(factors):
        turns = context / (2 * math.pi * base ** (2 * index / head_dim))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(given, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            return None
    return {"rope_type": "llama3", "factor": factor, **LLAMA3, "original_max_position_embeddings": context}


def _reaches(window: Any, context: int) -> bool:
    return isinstance(window, int) and window >= context


def _quotient(own: Mapping[str, Any]) -> int | None:
    """The size of a head where the metadata leave it open."""
    hidden, heads = own.get("embedding_length"), own.get("attention.head_count")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None


def _float(value: Any, what: str, where: str) -> float:
    """A float32 of the metadata as the decimal number that it was written from."""
    if type(value) not in (int, float) or not 0 < value < 2**127:
        raise StochaError(f"{where} has {what} {value!r}: expected a positive number")
    shorter = (float(f"{value:.{digits}g}") for digits in range(6, 9))
    return next((short for short in shorter if struct.pack("<f", short) == struct.pack("<f", value)), float(value))
