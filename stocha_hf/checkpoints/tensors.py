"""The tensors of a checkpoint folder by name, read and overwritten one at a time: memory of a tensor, not of a model.

Overwriting changes a tensor's bytes where they stand in their file; names, shapes, dtypes and all other bytes stay.

    tensors = Tensors(folder)
    weight = tensors.read("model.layers.0.mlp.down_proj.weight")
    tensors.overwrite("model.layers.0.mlp.down_proj.weight", weight * 2)
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


class Tensors:
    """All tensors of a folder's safetensors files; the folder was checked before (checkpoints/inspection.py)."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as shard:
                self.files |= dict.fromkeys(shard.keys(), path)

    def layer(self, index: int) -> dict[str, str]:
        """Names of decoder layer `index`'s tensors within the layer -> in the files."""
        found = {name: LAYER.search(name) for name in self.files}
        return {match[2]: name for name, match in found.items() if match and int(match[1]) == index}

    def ending(self, end: str) -> str:
        """The one name that ends so. Raises KeyError."""
        for name in self.files:
            if name == end or name.endswith(f".{end}"):
                return name
        raise KeyError(end)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as shard:
            return shard.get_tensor(name)

    def overwrite(self, name: str, value: torch.Tensor) -> None:
        """Write `value` in the dtype that the tensor has. Raises ValueError for another shape."""
        old = self.read(name)
        if old.shape != value.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}: expected {list(old.shape)}")
        data = value.detach().to("cpu", old.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        with self.files[name].open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            begin, _ = json.loads(file.read(length))[name]["data_offsets"]
            file.seek(8 + length + begin)
            file.write(data)
