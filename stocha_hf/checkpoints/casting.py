"""Weights in another dtype: a safetensors file is written a tensor at a time, each cast as torch casts it.

A value that the dtype cannot hold is refused, and not left infinite. Memory is that of one tensor. torch is imported
where a tensor is cast, and not by files that have the dtype already: they are copied byte for byte.

    cast_file(folder / "model.safetensors", output / "model.safetensors", "bfloat16", "org/model")
    config = with_dtype(config, "bfloat16")
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocha_hf.checkpoints.companions import dump
from stocha_hf.checkpoints.headers import read_header, tensor_headers
from stocha_hf.checkpoints.inspection import INDEX, read_json
from stocha_hf.checkpoints.staging import copy_file
from stocha_hf.errors import StochaError

if TYPE_CHECKING:
    import torch

DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}  # safetensors' names, and bytes
KEYS = ("dtype", "torch_dtype")  # of config.json; the second is that of transformers before 4.56


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that names this dtype, by the keys that it has."""
    return dict(config) | dict.fromkeys([key for key in KEYS if key in config] or KEYS[:1], dtype)


def cast(value: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A tensor of this name in a dtype. Raises StochaError for values that are not finite in it."""
    value = value.to(dtype)
    ends = value.aminmax() if value.numel() else ()  # isfinite of the whole makes copies; NaN is both ends
    if not all(end.isfinite() for end in ends):
        raise StochaError(
            f"{name} has values that are not finite in {str(dtype).removeprefix('torch.')}: expected numbers that it "
            "can hold; choose another dtype, or check the weights"
        )
    return value


def cast_file(
    source: Path, target: Path, dtype: str, where: str, progress: Callable[[int], object] = lambda count: None
) -> None:
    """Write a safetensors file of the checkpoint `where` again, in this dtype, with its tensors in the same order."""
    entries = dict(sorted(read_header(source).items(), key=lambda row: row[1].begin))
    if all(entry.dtype == DTYPES[dtype][0] for entry in entries.values()):
        copy_file(source, target, progress)
        return
    from safetensors import safe_open

    with safe_open(source, framework="pt") as file:

        def read(name: str) -> torch.Tensor:
            progress(entries[name].end - entries[name].begin)
            return file.get_tensor(name)

        shapes = {name: entry.shape for name, entry in entries.items()}
        write_tensors(target, shapes, dtype, read, where, file.metadata())


def write_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: str,
    read: Callable[[str], torch.Tensor],
    where: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of tensors that `read` gives by name, one after the other.

    Raises StochaError for values that are not finite in `dtype`, as tensors of `where`.
    """
    import torch

    kind, size = DTYPES[dtype]
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            value = cast(read(name), getattr(torch, dtype), f"{name} of {where}")
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
            del value  # before the next one is read


def correct_index(folder: Path, files: Collection[str]) -> None:
    """Make the index of a folder's cast shards, if it has one, tell their bytes."""
    if INDEX not in files:
        return
    index = read_json(folder / INDEX, "an index of shards")
    total = sum(entry.end - entry.begin for entry in tensor_headers(folder, files).values())
    told = index.get("metadata")
    if isinstance(told, dict) and told.get("total_size") not in (None, total):
        index["metadata"] = told | {"total_size": total}
        (folder / INDEX).write_text(dump(index), encoding="utf-8")
