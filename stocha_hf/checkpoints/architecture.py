"""The tensors that a config.json asks for, by name and shape, without torch.

transformers fills a tensor that it does not find with random numbers and leaves out one that it does not know, each
with a warning at most. So every source is compared with this table before anything is written. The table restates what
the native classes build; a test compares the two for all architectures.

    check_tensors({"model.embed_tokens.weight": [64, 32], ...}, config, "my-model")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from stocha_hf.checkpoints.quantized import matrix_shapes, read_quantization
from stocha_hf.cuts import TOKEN_FACTOR, InputCuts
from stocha_hf.errors import StochaError

# What a config class takes for a key that config.json leaves out; num_key_value_heads and head_dim may also be null.
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN = _LLAMA | {"intermediate_size": 22016, "vocab_size": 151936, "num_key_value_heads": 32}
_GEMMA = _LLAMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"vocab_size": 262208},
}
NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_OWN = re.compile(r"(?:model\.)?((?:embed_tokens|layers|norm)\..+)|(lm_head\..+)")
_COMPUTED = "rotary_emb.inv_freq"  # a buffer that old checkpoints hold and every class computes


@dataclass(frozen=True)
class Sizes:
    """What of a config.json decides names and shapes."""

    model_type: str
    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Sizes:
        """Those of a config of a known model_type. Raises StochaError for one that no model can have."""
        model_type = str(config["model_type"])
        found = {key: config.get(key, default) for key, default in DEFAULTS[model_type].items()}
        if found["num_key_value_heads"] is None:
            found["num_key_value_heads"] = found["num_attention_heads"]
        for key, value in found.items():
            flag, given = isinstance(DEFAULTS[model_type][key], bool), type(value)
            if key == "head_dim" and value is None:
                continue
            if given is not (bool if flag else int) or (not flag and value < 1):
                expected = "true or false" if flag else "a whole number of at least 1"
                raise StochaError(f"config.json of {where} has {key} {value!r}: expected {expected}")
        hidden, width, layers, heads, kv_heads, head_dim, vocab, *flags = found.values()
        if heads % kv_heads or (head_dim is None and hidden % heads):
            raise StochaError(
                f"config.json of {where} has {heads} attention heads, {kv_heads} key-value heads and hidden_size "
                f"{hidden}: expected each of these numbers to divide the next larger one"
            )
        return cls(model_type, hidden, width, layers, heads, kv_heads, head_dim or hidden // heads, vocab, *flags)

    @property
    def gemma(self) -> bool:
        return self.model_type.startswith("gemma")


def expected_tensors(sizes: Sizes) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor, without the prefix `model.`; lm_head only where it is a tensor of its own."""
    yield "embed_tokens.weight", [sizes.vocab, sizes.hidden]
    yield "norm.weight", [sizes.hidden]
    if not sizes.tied:
        yield "lm_head.weight", [sizes.vocab, sizes.hidden]
    for layer in range(sizes.layers):
        for name, shape in _layer(sizes):
            yield f"layers.{layer}.{name}", shape


def _layer(sizes: Sizes) -> Iterator[tuple[str, list[int]]]:
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    qwen2 = sizes.model_type == "qwen2"
    attention, ffn = sizes.attention_bias and sizes.model_type not in ("mistral", "qwen2"), sizes.mlp_bias
    linears = (  # name, outputs, inputs, whether it has a bias
        ("self_attn.q_proj", queries, sizes.hidden, attention or qwen2),
        ("self_attn.k_proj", keys, sizes.hidden, attention or qwen2),
        ("self_attn.v_proj", keys, sizes.hidden, attention or qwen2),
        ("self_attn.o_proj", sizes.hidden, queries, attention),
        ("mlp.gate_proj", sizes.width, sizes.hidden, ffn and sizes.model_type == "llama"),
        ("mlp.up_proj", sizes.width, sizes.hidden, ffn and sizes.model_type == "llama"),
        ("mlp.down_proj", sizes.hidden, sizes.width, ffn and sizes.model_type == "llama"),
    )
    for name, outputs, inputs, bias in linears:
        yield f"{name}.weight", [outputs, inputs]
        if bias:
            yield f"{name}.bias", [outputs]
    for norm in GEMMA_NORMS if sizes.gemma else NORMS:
        yield f"{norm}.weight", [sizes.hidden]
    if sizes.model_type in ("qwen3", "gemma3_text"):
        yield "self_attn.q_norm.weight", [sizes.head_dim]
        yield "self_attn.k_norm.weight", [sizes.head_dim]


def check_tensors(shapes: Mapping[str, list[int]], config: Mapping[str, Any], where: str) -> None:
    """Compare a checkpoint's tensors with what its config asks for, as transformers reads names.

    `model.` before a name may be there or not, lm_head may be there though it is tied, and tensors of parts that the
    architecture does not have (a vision tower, a value head) are let pass. Raises StochaError for a tensor that is
    missing, has another shape, is there twice, or belongs to the model's own parts and would be ignored.
    """
    sizes, found, quantization = Sizes.of(config, where), _own(shapes, where), read_quantization(config, where)
    expected = (row for one in expected_tensors(sizes) for row in matrix_shapes(*one, quantization))
    own = token_factors(sizes, config, where)
    for name, shape in chain(expected, own):  # lazily: a config can claim any number of layers
        if name not in found and name.endswith(TOKEN_FACTOR):
            raise StochaError(
                f"tensor {name} of {where} is missing, as where the native class saved the folder: expected tokens' "
                "own factors; save it with the class of its remote code, or take `inputs` out of the stocha entry of "
                "its config.json, and with it all cuts"
            )
        if name not in found:
            raise StochaError(
                f"tensor {name} of {where} is missing: expected all that its config.json asks for; download it again"
            )
        if (given := found.pop(name)) != shape:
            raise StochaError(f"{name} of {where} has the shape {given}: expected {shape}, as its config.json says")
    if sizes.tied and found.pop("lm_head.weight", head := [sizes.vocab, sizes.hidden]) != head:
        raise StochaError(f"lm_head.weight of {where} is tied to the embedding: expected its shape, {head}")
    if ignored := sorted(name for name in found if not name.endswith(_COMPUTED)):
        raise StochaError(
            f"{where} has a tensor {ignored[0]}, which a {sizes.model_type} model with its config.json would ignore: "
            "expected none in its layers that it does not use; check num_hidden_layers and the biases"
        )


def token_factors(sizes: Sizes, config: Mapping[str, Any], where: str) -> Iterator[tuple[str, list[int]]]:
    """What a folder whose cuts have tokens' own factors holds beside the native tensors, without the prefix `model.`.

    See cuts.py.
    """
    entry = config.get("stocha")
    inputs = entry.get("inputs") if isinstance(entry, dict) else None
    if not isinstance(inputs, dict) or not inputs.get("token_factors"):
        return
    try:
        leaders = {*InputCuts.from_dict(inputs).leaders().values()}
    except ValueError as error:
        raise StochaError(f"config.json of {where}: {error}") from None
    for name, shape in expected_tensors(sizes):
        projection = name.removesuffix(".weight")
        if projection.rpartition(".")[2] in leaders:
            yield f"{projection}{TOKEN_FACTOR}", [shape[1] + 1]


def _own(shapes: Mapping[str, list[int]], where: str) -> dict[str, list[int]]:
    """The tensors of the decoder and its head, without prefix."""
    found: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        if match := _OWN.fullmatch(name):
            short = match[1] or match[2]
            if short in found:
                raise StochaError(f"{where} has the tensor {short} with and without the prefix model.: expected one")
            found[short] = list(shape)
    return found


def check_loaded(info: Mapping[str, Any], where: str) -> None:
    """Raise StochaError unless `from_pretrained(..., output_loading_info=True)` found every tensor, of its shape."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        if names := sorted(str(name[0] if isinstance(name, tuple) else name) for name in info.get(key) or ()):
            raise StochaError(
                f"{where} {what} the tensor {names[0]}: expected all that its config.json asks for; download it again"
            )
