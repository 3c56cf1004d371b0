"""One hash for what a checkpoint folder computes, so that measured figures can be tied to it.

    weights_hash(Path("smollm2-sparse"))  # "5f0c..."

It is independent of how the tensors are split over files and of all that changes no number: where the model came from,
what training did, which version of a library wrote the file. torch is not needed, and a few megabytes are in memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.inspection import INDEX, list_files, read_config, read_json, weight_files
from stocha_hf.errors import StochaError

CHUNK = 2**20  # bytes read at a time
# Keys of config.json that no figure depends on. Any other key counts, also one that is not known here.
NEUTRAL = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache")
NEUTRAL_STOCHA = ("activation", "source", "history", "stocha_version")  # activation is what training runs


def weights_hash(folder: Path) -> str:
    """SHA-256, in hex, of a folder's safetensors weights and of the config that they run with.

    Hashed are, as lines of JSON with sorted keys, config.json without its neutral keys, then of every tensor, by name,
    [name, dtype, shape] as safetensors writes them, followed by the tensor's bytes. Raises StochaError for a folder
    without config.json or whole safetensors weights.
    """
    found = weight_files(list_files(folder), lambda: read_json(folder / INDEX, "an index of shards"), str(folder))
    tensors: dict[str, tuple[Path, str, list[int], int, int]] = {}
    for path in (folder / name for name in found if name.endswith(".safetensors")):
        tensors |= {name: (path, *entry) for name, entry in _entries(path).items()}
    digest = hashlib.sha256(_line(behaviour(read_config(folder))))
    for name, (path, dtype, shape, begin, end) in sorted(tensors.items()):
        digest.update(_line([name, dtype, shape]))
        _add_bytes(digest, path, begin, end)
    return digest.hexdigest()


def behaviour(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys that no figure depends on."""
    kept = {key: value for key, value in config.items() if key not in NEUTRAL}
    if isinstance(entry := kept.get("stocha"), dict):
        kept["stocha"] = {key: value for key, value in entry.items() if key not in NEUTRAL_STOCHA}
    return kept


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _entries(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Of each tensor of a safetensors file: dtype, shape, and where in the file its bytes begin and end."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < path.stat().st_size else None
            begins = {
                name: (row["dtype"], row["shape"], *(8 + length + at for at in row["data_offsets"]))
                for name, row in header.items()  # type: ignore[union-attr]
                if name != "__metadata__"
            }
        except (ValueError, AttributeError, KeyError, TypeError):
            raise StochaError(f"{path} is no safetensors file: expected a whole one; download it again") from None
    return begins


def _add_bytes(digest: Any, path: Path, begin: int, end: int) -> None:
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end:
            part = file.read(min(CHUNK, end - begin))
            if not part:
                raise StochaError(f"{path} is truncated: expected a whole file; download it again")
            digest.update(part)
            begin += len(part)
