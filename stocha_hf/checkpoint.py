"""Reading a checkpoint folder without reading its tensors: what it is, which files belong to it, whether they are
whole.

Everything that can be wrong with a source is found here, before anything is written. Only config.json, the index and
the safetensors headers are read, so a check costs milliseconds and a few megabytes whatever the model's size. Pickle
weights (.bin, .pt) are never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from stocha_hf.config import ARCHITECTURES, Architecture
from stocha_hf.errors import StochaError

CONFIG, SINGLE, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
# What comes along with the weights; anything else in a source folder is left where it is.
COMPANIONS = (
    "*token*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    "LICEN[SC]E*",
    "NOTICE*",
    "USE_POLICY*",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = ("BF16", "F16", "F32")
RANDOM_START = "random weights"  # `start` of the first stage of a history that began without a source


def began_random(stocha: dict[str, Any]) -> bool:
    """Whether the weights of a config's `stocha` entry were trained from random ones, so that it has no source."""
    history = stocha.get("history") or [{}]
    return history[0].get("start") == RANDOM_START


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder as a dict. Raises StochaError where there is none or it is no JSON object."""
    return read_json(folder / CONFIG, "a Hugging Face checkpoint folder, which has one")


def read_json(path: Path, expected: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StochaError(f"{path} does not exist: expected {expected}") from None
    except (OSError, ValueError) as error:
        raise StochaError(f"{path} cannot be read ({error}): expected {expected}") from None
    if not isinstance(content, dict):
        raise StochaError(f"{path} holds a JSON {type(content).__name__}: expected {expected}")
    return content


def check_config(config: dict[str, Any], where: str) -> Architecture:
    """The architecture's row for a source config. Raises StochaError for a model that cannot be converted."""
    model_type = config.get("model_type")
    row = ARCHITECTURES.get(str(model_type))
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise StochaError(f"{where} has model_type {model_type!r}: expected a dense gated model of type {known}")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise StochaError(
            f"{where} is quantized ({method}): expected bf16, fp16 or fp32 weights; convert the original model"
        )
    if "stocha" in config:
        return row
    remote = {"AutoModel", "AutoModelForCausalLM"} & set(config.get("auto_map") or {})
    if remote:
        raise StochaError(
            f"{where} runs its own modeling code (auto_map): expected a model of the native {row.causal_lm}"
        )
    act = config.get(row.act_key) or row.act  # configs on the Hub may leave the default out
    if act != row.act:
        raise StochaError(
            f"{where} has {row.act_key} {act!r}: expected {row.act!r}, the gated activation of {model_type}"
        )
    return row


def weight_files(names: Collection[str], load_index: Callable[[], dict[str, Any]], where: str) -> list[str]:
    """The files that hold the weights, given all file names of a checkpoint: as transformers would choose them.

    Raises StochaError for pickle-only or missing weights, and for an index that names absent files or other folders.
    """
    if SINGLE in names:
        return [SINGLE]
    if INDEX not in names:
        pickles = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLES))
        found = f"only pickle weights ({pickles[0]}), which can run code when opened" if pickles else "no weights"
        raise StochaError(f"{where} has {found}: expected {SINGLE} or {INDEX}; save the model as safetensors first")
    weight_map = load_index().get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StochaError(f"{INDEX} in {where} has no weight_map: expected one that names each tensor's file")
    shards = sorted(set(map(str, weight_map.values())))
    for shard in shards:
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise StochaError(f"{INDEX} in {where} names {shard!r}: expected safetensors files of the same folder")
        if shard not in names:
            raise StochaError(
                f"{INDEX} in {where} names {shard}, which is missing: expected every shard; download it again"
            )
    return [INDEX, *shards]


def companion_files(names: Collection[str]) -> list[str]:
    """Tokenizer, generation config, chat template, licence: what travels with the weights."""
    return sorted(name for name in names if is_companion(name) and not any(fnmatch(name, bad) for bad in PICKLES))


def is_companion(name: str) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in COMPANIONS)


def list_files(folder: Path) -> list[str]:
    """All files of a folder and of its direct subfolders, as names relative to it."""
    if not folder.is_dir():
        raise StochaError(f"{folder} does not exist: expected a folder, a .gguf file or a Hub id such as org/name")
    return sorted(
        str(path.relative_to(folder)) for depth in ("*", "*/*") for path in folder.glob(depth) if path.is_file()
    )


def check_weights(folder: Path, files: Collection[str], config: dict[str, Any]) -> None:
    """Raise StochaError unless every shard is whole and together they hold one gated FFN per layer of the stated
    shape.
    """
    shapes = tensor_headers(folder, files)
    if INDEX in files:
        listed = set(read_json(folder / INDEX, "an index of shards")["weight_map"])
        if missing := sorted(listed - set(shapes)):
            raise StochaError(
                f"{folder / INDEX} names tensor {missing[0]}, which no shard holds: download the shards again"
            )
    foreign = sorted(f"{name} ({dtype})" for name, (_, dtype) in shapes.items() if dtype not in DTYPES)
    if foreign:
        raise StochaError(
            f"{folder} holds {foreign[0]}: expected tensors of dtype {', '.join(DTYPES)}, not quantized ones"
        )
    _check_ffns(folder, {name: shape for name, (shape, _) in shapes.items()}, config)


def tensor_headers(folder: Path, files: Collection[str]) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each tensor of a folder's safetensors files. Raises StochaError for a broken file."""
    return {
        name: header
        for file in files
        if file.endswith(".safetensors")
        for name, header in _read_header(folder / file).items()
    }


def _read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """One file's; safetensors checks the header against the file's length when opening."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - not a dict
            return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise StochaError(
            f"{path} is truncated or corrupt ({reason}): expected a whole file; download it again"
        ) from None


def _check_ffns(folder: Path, shapes: dict[str, list[int]], config: dict[str, Any]) -> None:
    hidden, width, layers = (config.get(key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    expected: dict[str, list[Any]] = {
        "gate_proj": [width, hidden],
        "up_proj": [width, hidden],
        "down_proj": [hidden, width],
    }
    ffn = re.compile(r"layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
    found: dict[tuple[int, str], list[int]] = {}
    for name, shape in shapes.items():
        if match := ffn.search(name):
            found[int(match[1]), match[2]] = shape
    if not isinstance(layers, int):
        raise StochaError(f"{folder / CONFIG} has num_hidden_layers {layers!r}: expected a number of layers")
    for layer in range(layers):
        for part, shape in expected.items():
            given = found.get((layer, part), "missing")
            if given != shape:
                name = f"layers.{layer}.mlp.{part}.weight"
                raise StochaError(
                    f"{name} of {folder} is {given}: expected a gated FFN with a {part} of shape {shape}"
                )
