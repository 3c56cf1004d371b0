"""The torch-free table of tensors is what the native classes build, and a checkpoint that differs is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from helpers import CONFIGS, SIZES
from safetensors.torch import load_file, save_file

from stocha_hf.checkpoints.architecture import DEFAULTS, Sizes, check_loaded, check_tensors, expected_tensors
from stocha_hf.conversion.convert import convert
from stocha_hf.errors import StochaError
from stocha_hf.spec import ARCHITECTURES

VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention_bias": True, "mlp_bias": True},
    {"tie_word_embeddings": False, "head_dim": 20, "num_key_value_heads": 1},
    {"tie_word_embeddings": True, "head_dim": None, "num_key_value_heads": 4},
]


def native_shapes(model_type: str, config: Any) -> dict[str, list[int]]:
    with torch.device("meta"):
        model = getattr(transformers, ARCHITECTURES[model_type].causal_lm)(config)
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def expected(config: dict[str, Any]) -> dict[str, list[int]]:
    return {name.removeprefix("model."): shape for name, shape in expected_tensors(Sizes.of(config, "a model"))}


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_table_is_what_the_native_class_builds(model_type, options):
    class_name, extra = CONFIGS[model_type]
    given = {**SIZES, **extra, **options}
    if given.get("head_dim", 1) is None and model_type not in ("llama", "mistral"):
        given.pop("head_dim")  # a number in these classes
    config = getattr(transformers, class_name)(**given)
    built = native_shapes(model_type, config)
    if config.tie_word_embeddings:
        del built["lm_head.weight"]
    assert expected(config.to_dict()) == {name.removeprefix("model."): shape for name, shape in built.items()}
    check_tensors(built, config.to_dict(), "a model")


@pytest.mark.parametrize("model_type", CONFIGS)
def test_keys_that_are_left_out_mean_what_the_native_class_takes_for_them(model_type):
    config = getattr(transformers, CONFIGS[model_type][0])(num_hidden_layers=1)
    assert DEFAULTS.keys() == ARCHITECTURES.keys()
    built = native_shapes(model_type, config)
    if config.tie_word_embeddings:
        del built["lm_head.weight"]
    found = expected({"model_type": model_type, "num_hidden_layers": 1})
    assert found == {name.removeprefix("model."): shape for name, shape in built.items()}


Edit = Callable[[dict[str, torch.Tensor]], object]


def pop(name: str) -> Edit:
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Edit:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


SPOILED: dict[str, tuple[Edit, str]] = {
    "no q_proj": (
        pop("model.layers.1.self_attn.q_proj.weight"),
        r"layers.1.self_attn.q_proj.weight of .* is missing",
    ),
    "no embedding": (pop("model.embed_tokens.weight"), r"tensor embed_tokens.weight of .* is missing"),
    "no final norm": (pop("model.norm.weight"), r"tensor norm.weight of .* is missing"),
    "no head": (pop("lm_head.weight"), r"tensor lm_head.weight of .* is missing"),
    "a wrong shape": (put("model.layers.0.self_attn.k_proj.weight", 8, 32), r"\[8, 32\]: expected \[16, 32\]"),
    "a layer too many": (
        put("model.layers.2.mlp.up_proj.weight", 48, 32),
        "layers.2.mlp.up_proj.weight, which a llama",
    ),
    "a bias": (put("model.layers.0.self_attn.q_proj.bias", 32), "q_proj.bias, which a llama"),
    "with and without prefix": (put("norm.weight", 32), "norm.weight with and without the prefix"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_checkpoint_that_differs_is_refused_unwritten(checkpoint, tmp_path, case):
    edit, words = SPOILED[case]
    path = checkpoint() / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(StochaError, match=words):
        convert(path.parent, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "edit",
    [
        put("model.layers.0.self_attn.rotary_emb.inv_freq", 4),
        put("vision_tower.layers.0.weight", 3),
        lambda tensors: [tensors.update({name.removeprefix("model."): tensors.pop(name)}) for name in [*tensors]],
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    ],
)
def test_what_transformers_tolerates_is_tolerated(checkpoint, tmp_path, edit):
    path = checkpoint(tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    convert(path.parent, tmp_path / "out")
    info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1]
    assert not info["missing_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_hidden_layers", value) for value in (True, 0, -3, 2.0, "2", None, [2], 10**30)),
        *(("hidden_size", value) for value in (0, "32", None)),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("head_dim", -8),
        ("vocab_size", {}),
        ("tie_word_embeddings", "no"),
        ("attention_bias", 1),
    ],
)
def test_sizes_that_no_model_has_are_refused(checkpoint, tmp_path, key, value):
    path = checkpoint() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(StochaError) as refused:
        convert(path.parent, tmp_path / "out")
    assert key in str(refused.value) or "layers.2." in str(refused.value) or "key-value heads" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_shards_is_refused(checkpoint, tmp_path):
    source = checkpoint(max_shard_size="20KB")
    first, second = sorted(source.glob("*.safetensors"))[:2]
    save_file(load_file(second) | dict([next(iter(load_file(first).items()))]), second, {"format": "pt"})
    with pytest.raises(StochaError, match=r"is in .*00001.* and in .*00002.*: expected it once"):
        convert(source, tmp_path / "out")


def test_a_tensor_twice_in_a_header_is_refused(checkpoint, tmp_path):
    path = checkpoint() / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, name = data[8 : 8 + length], b'"lm_head.weight"'
    twice = (
        header.replace(b"{" + name, b"{" + name, 1).rstrip()[:-1]
        + b","
        + header[header.index(name) :].split(b"}")[0]
        + b"}}"
    )
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])
    with pytest.raises(StochaError, match=r"truncated or corrupt|there twice"):
        convert(path.parent, tmp_path / "out")


def test_what_from_pretrained_did_not_find_is_refused():
    check_loaded({"missing_keys": set(), "mismatched_keys": []}, "org/model")
    with pytest.raises(StochaError, match=r"org/model lacks the tensor a\.weight"):
        check_loaded({"missing_keys": {"b.weight", "a.weight"}, "mismatched_keys": []}, "org/model")
    with pytest.raises(StochaError, match=r"has another shape for the tensor a\.weight"):
        check_loaded({"missing_keys": set(), "mismatched_keys": [("a.weight", [1], [2])]}, "org/model")
