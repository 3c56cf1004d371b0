"""The tensors of a checkpoint folder by name, read and overwritten one at a time: memory of a tensor, not of a model.

Overwriting changes a tensor's bytes where they stand in their file; names, shapes, dtypes and all other bytes stay.

    tensors = Tensors(folder)
    weight = tensors.read("model.layers.0.mlp.down_proj.weight")
    tensors.overwrite("model.layers.0.mlp.down_proj.weight", weight * 2)
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open

from stocha_hf.checkpoints.casting import cast
from stocha_hf.checkpoints.headers import read_header, tensor_headers
from stocha_hf.checkpoints.inspection import INDEX, list_files, read_json, weight_files

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


class _Named:
    """Tensors that are found by name."""

    names: Collection[str]

    def layer(self, index: int) -> dict[str, str]:
        """Names of decoder layer `index`'s tensors within the layer -> in full."""
        found = {name: LAYER.search(name) for name in self.names}
        return {match[2]: name for name, match in found.items() if match and int(match[1]) == index}

    def ending(self, end: str) -> str:
        """The one name that ends so. Raises KeyError."""
        for name in self.names:
            if name == end or name.endswith(f".{end}"):
                return name
        raise KeyError(end)


class Tensors(_Named):
    """The tensors of a folder's weight files; the folder was checked before (checkpoints/inspection.py)."""

    def __init__(self, folder: Path) -> None:
        found = weight_files(list_files(folder), lambda: read_json(folder / INDEX, "an index of shards"), str(folder))
        headers = tensor_headers(folder, found)
        self.files = {name: entry.file for name, entry in headers.items()}
        self.shapes = {name: tuple(entry.shape) for name, entry in headers.items()}
        self.names = self.files.keys()

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as shard:
            return shard.get_tensor(name)

    def overwrite(self, name: str, value: torch.Tensor) -> None:
        """Write `value` in the dtype that the tensor has.

        Raises ValueError for another shape, and StochaError for values that are not finite in that dtype.
        """
        old = self.read(name)
        if old.shape != value.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}: expected {list(old.shape)}")
        data = cast(value.detach().cpu(), old.dtype, name).contiguous().view(torch.uint8).numpy().tobytes()
        with self.files[name].open("r+b") as file:
            file.seek(read_header(self.files[name])[name].begin)
            file.write(data)


class ModelTensors(_Named):
    """The tensors of a model in memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.state = model.state_dict()
        self.names = self.state.keys()

    def read(self, name: str) -> torch.Tensor:
        return self.state[name].detach()
