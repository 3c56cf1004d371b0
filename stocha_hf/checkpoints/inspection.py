"""Reading a checkpoint folder without reading its tensors: what it is, which files belong to it, whether they are
whole.

Everything that can be wrong with a source is found here, before anything is written. Only config.json, the index and
the safetensors headers are read, so a check costs milliseconds and a few megabytes whatever the model's size. Pickle
weights (.bin, .pt) are never opened.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.architecture import check_tensors
from stocha_hf.checkpoints.entry import read_entry
from stocha_hf.checkpoints.headers import tensor_headers
from stocha_hf.checkpoints.paths import local_path
from stocha_hf.checkpoints.quantized import dtypes, read_quantization
from stocha_hf.errors import StochaError
from stocha_hf.spec import ARCHITECTURES, Architecture

CONFIG, SINGLE, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LONGEST = 2**26  # bytes of a JSON file; the index of a large model has one or two million


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder as a dict. Raises StochaError where there is none or it is not a JSON object."""
    check_folder(folder)
    return read_json(folder / CONFIG, "a Hugging Face checkpoint folder, which has one")


def check_folder(name: str | Path, expected: str = "a checkpoint folder") -> None:
    """Raise StochaError unless this is a folder; it says what was `expected`, and how a GGUF file becomes one."""
    path = local_path(name)
    if path.is_dir():
        return
    what = "is not a folder" if os.path.lexists(path) else "does not exist"
    if path.suffix.lower() == ".gguf" and path.is_file():
        what, expected = "is a GGUF file", f"{expected}; convert it first: stocha-convert {shlex.quote(str(name))} OUT"
    raise StochaError(f"{name} {what}: expected {expected}")


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """A JSON object that can be written again. Raises StochaError, which says what was `expected`."""
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise ValueError(f"more than {LONGEST} bytes")
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair can be read, not written
    except FileNotFoundError:
        raise StochaError(f"{path} does not exist: expected {expected}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StochaError(f"{path} cannot be read ({error}): expected {expected}") from error
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
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StochaError(f"{where} has architectures {names!r}: expected a list of class names")
    quantization = read_quantization(config, where)
    if "stocha" in config or quantization is not None:
        read_entry(config, where)
        return row
    code = config.get("auto_map")
    if isinstance(code, dict) and {"AutoModel", "AutoModelForCausalLM"} & code.keys():
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


def is_weight(name: str) -> bool:
    """Whether a checkpoint's file of this name holds weights, or says where they are."""
    return name == INDEX or name.endswith(".safetensors")


def list_files(folder: Path) -> list[str]:
    """All files of a folder and of its direct subfolders, as names relative to it. Raises StochaError."""
    try:
        check_folder(folder)
        paths = [path for depth in ("*", "*/*") for path in folder.glob(depth) if path.is_file()]
    except OSError as error:
        raise StochaError(f"cannot read {folder} ({error.strerror}): expected a folder that you may read") from error
    return sorted(str(path.relative_to(folder)) for path in paths)


def check_weights(folder: Path, files: Collection[str], config: dict[str, Any]) -> None:
    """Raise StochaError unless every shard is whole and together they hold what config.json asks for.

    Names, shapes and dtypes are compared; checkpoints/architecture.py says with what.
    """
    found = tensor_headers(folder, files)
    if INDEX in files:
        listed = set(read_json(folder / INDEX, "an index of shards")["weight_map"])
        if missing := sorted(listed - set(found)):
            raise StochaError(
                f"{folder / INDEX} names tensor {missing[0]}, which no shard holds: download the shards again"
            )
    quantization = read_quantization(config, str(folder))
    for name, entry in sorted(found.items()):
        if entry.dtype not in (expected := dtypes(name, quantization)):
            said = "" if quantization else ", not quantized ones"
            raise StochaError(
                f"{folder} holds {name} ({entry.dtype}): expected tensors of dtype {', '.join(expected)}{said}"
            )
    check_tensors({name: entry.shape for name, entry in found.items()}, config, str(folder))
