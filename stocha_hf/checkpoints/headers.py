"""Where the tensors of safetensors files are: names, dtypes, shapes and byte ranges, read without the tensors.

for name, entry in tensor_headers(folder, ["model.safetensors"]).items():
    print(name, entry.dtype, entry.shape)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocha_hf.errors import StochaError


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, safetensors' name of its dtype, its shape, and where its bytes begin and end."""

    file: Path
    dtype: str
    shape: list[int]
    begin: int
    end: int


def tensor_headers(folder: Path, files: Collection[str]) -> dict[str, Entry]:
    """The tensors of a folder's safetensors files, by name.

    Raises StochaError for a broken file, and for a tensor that is there twice: which of the two is loaded would depend
    on the loader.
    """
    found: dict[str, Entry] = {}
    for path in (folder / file for file in files if file.endswith(".safetensors")):
        for name, entry in read_header(path).items():
            if name in found:
                raise StochaError(f"tensor {name} is in {found[name].file} and in {path}: expected it once")
            found[name] = entry
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises StochaError for a file that is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # checks every range against the shapes and the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_once)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise StochaError(
            f"{path} is truncated or corrupt ({reason}): expected a whole file; download it again"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: Entry(path, row["dtype"], row["shape"], *(8 + length + at for at in row["data_offsets"]))
        for name, row in header.items()
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{next(key for key, value in pairs if found[key] is not value)} is there twice")
    return found
