"""A config.json as the metadata of a GGUF file: everything that changes a number, or a refusal.

gguf_config.py reads metadata as a config. What is written here is read back by it and compared, key by key, so that a
setting that the file cannot hold is found before anything is written.

llama.cpp names an architecture and not an activation: its `llama` computes SiLU whatever a config says. One of its
architectures has a gated ReLU: `smallthinker`, a mixture of experts. With one expert and a router of zeros the
expert's weight is 1, and its layers are those of a Llama: biases for queries, keys and values, rotary pairs as
transformers has them, no norms of queries and keys, no factors of rotary frequencies.

    plan = plan_metadata(config, "relu", "my-model")
    plan.architecture, plan.values["smallthinker.expert_count"]   # "smallthinker", 1
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stocha_hf.checkpoints.architecture import Sizes, expected_tensors
from stocha_hf.conversion.gguf import GEMMA_PARTS, LAYER_PARTS, PARTS
from stocha_hf.conversion.gguf_config import LLAMA3, MODEL_TYPES, config_of, with_scaled_rope
from stocha_hf.errors import StochaError
from stocha_hf.spec import ARCHITECTURES

RELU = "smallthinker"
RELU_FITS = ("llama", "mistral", "qwen2")  # model_types whose layers it has
NATIVE = {model_type: arch for arch, model_type in MODEL_TYPES.items()} | {"mistral": "llama"}
ONE_EXPERT = {"expert_count": 1, "expert_used_count": 1, "expert_gating_func": 1}  # 1: softmax
_NOT_COMPARED = {"architectures", "model_type", "hidden_act", "hidden_activation"}


@dataclass(frozen=True)
class Plan:
    """What a GGUF file holds: its architecture, metadata, tensors' names in transformers -> in GGUF, rotary factors.

    The names in transformers have no `model.` before them.
    """

    architecture: str
    values: dict[str, Any]
    names: dict[str, str]
    sizes: Sizes
    factors: list[float] | None


def plan_metadata(config: Mapping[str, Any], activation: str, where: str) -> Plan:
    """Plan the file of a model of this config.json that computes `activation`: "relu" or the model's own.

    Raises StochaError for what no architecture of llama.cpp computes.
    """
    sizes = Sizes.of(config, where)
    names = {name: gguf_name(name, sizes) for name, _ in expected_tensors(sizes)}
    whole = _whole_config(config, where)
    own, factors = _own_values(whole, sizes)
    _check_read_back(own, factors, whole, sizes, where)
    native = NATIVE[sizes.model_type]
    if activation == ARCHITECTURES[sizes.model_type].act:
        return Plan(native, _named(own, native), names, sizes, factors)
    _check_relu(sizes, names, factors, where)
    own |= ONE_EXPERT | {"expert_feed_forward_length": sizes.width}
    names = {name: _of_expert(theirs) for name, theirs in names.items()}
    return Plan(RELU, _named(own, RELU), names, sizes, None)


def gguf_name(name: str, sizes: Sizes) -> str:
    """A tensor's name in the native architecture's file, given transformers' without `model.`."""
    module, _, end = name.rpartition(".")
    if not module.startswith("layers."):
        parts = {native.removeprefix("model."): part for part, native in PARTS.items()}
        return f"{parts[module]}.{end}"
    _, layer, part = module.split(".", 2)
    theirs = {native: part for part, native in (LAYER_PARTS | (GEMMA_PARTS if sizes.gemma else {})).items()}
    return f"blk.{layer}.{theirs[part]}.{end}"


def _of_expert(name: str) -> str:
    for part in ("ffn_gate", "ffn_up", "ffn_down"):
        name = name.replace(f".{part}.", f".{part}_exps.")
    return name


def _named(own: Mapping[str, Any], arch: str) -> dict[str, Any]:
    return {f"{arch}.{key}": value for key, value in own.items()}


def _whole_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config with every default of its class, as the native class reads it."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    except Exception as error:  # validation of a config raises many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StochaError(
            f"config.json of {where} cannot be read ({reason}): expected that of a whole model"
        ) from error


def _own_values(config: Mapping[str, Any], sizes: Sizes) -> tuple[dict[str, Any], list[float] | None]:
    """Metadata without the architecture's name before them, and the factors of rotary frequencies, if any."""
    own: dict[str, Any] = {
        "vocab_size": sizes.vocab,
        "context_length": _context(config, sizes),
        "embedding_length": sizes.hidden,
        "block_count": sizes.layers,
        "feed_forward_length": sizes.width,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": sizes.head_dim,
    }
    rope = config["rope_parameters"]
    if sizes.gemma:
        own["attention.sliding_window"] = config["sliding_window"]
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(key) is not None:
                own[key] = float(config[key])
    if "full_attention" in rope:
        own["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    own["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        own["rope.scaling.type"], own["rope.scaling.factor"] = rope["rope_type"], float(rope["factor"])
    if rope["rope_type"] == "yarn":
        own["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    return own, _llama3_factors(rope, sizes.head_dim) if rope["rope_type"] == "llama3" else None


def _context(config: Mapping[str, Any], sizes: Sizes) -> int:
    """The longest text that the file promises: as far as a sliding window, which is not written, changes nothing."""
    longest, window = config["max_position_embeddings"], config.get("sliding_window")
    slides = "sliding_attention" in (config.get("layer_types") or []) or sizes.model_type == "mistral"
    return longest if sizes.gemma or not slides or window is None else min(longest, window)


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """What each rotary frequency is divided by (Llama 3.1)."""
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    factors = []
    for index in range(head_dim // 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (2 * index / head_dim))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors


def _check_read_back(
    own: Mapping[str, Any], factors: Sequence[float] | None, config: Mapping[str, Any], sizes: Sizes, where: str
) -> None:
    """Raise StochaError where these metadata, read as a config, say something else than `config`."""
    from transformers import CONFIG_MAPPING

    arch = NATIVE[sizes.model_type]
    metadata = {"general.architecture": arch} | _named(own, arch)
    shapes = {gguf_name(name, sizes): shape for name, shape in expected_tensors(sizes)}
    found = with_scaled_rope(config_of(metadata, shapes, where), metadata, factors, where)
    expected = dict(config) | {"max_position_embeddings": own["context_length"]}
    expected["head_dim"], expected["num_key_value_heads"] = sizes.head_dim, sizes.kv_heads
    expected["rope_parameters"] = _said(expected["rope_parameters"])
    if sizes.gemma:
        usual = CONFIG_MAPPING[sizes.model_type].from_dict({"num_hidden_layers": sizes.layers})
        found["layer_types"] = usual.to_dict()["layer_types"]
    for key in found.keys() - _NOT_COMPARED:
        if not key.endswith("_token_id") and found[key] != (given := expected.get(key, False)):
            raise StochaError(
                f"{where} has {key} {given!r}, where llama.cpp's {arch} computes {found[key]!r}: expected a model "
                "that computes what its architecture does there"
            )


def _said(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters without those that are left open."""
    return {
        key: _said(value) if isinstance(value, Mapping) else value
        for key, value in parameters.items()
        if value is not None
    }


def _check_relu(sizes: Sizes, names: Mapping[str, str], factors: Sequence[float] | None, where: str) -> None:
    """Raise StochaError for a model that has what the one architecture with a gated ReLU lacks."""
    biased = next((name for name in names if name.endswith(("o_proj.bias", "gate_proj.bias"))), None)
    reasons = (
        (sizes.model_type not in RELU_FITS, f"is a {sizes.model_type}, whose norms it lacks"),
        (factors is not None, "has Llama 3.1's rotary factors, which it lacks"),
        (biased is not None, f"has {biased}, which it lacks"),
    )
    for found, reason in reasons:
        if found:
            raise StochaError(
                f"llama.cpp runs a gated relu in its architecture {RELU} alone, and {where} {reason}: expected a "
                f"{', '.join(RELU_FITS)} without these; run this model with transformers"
            )
