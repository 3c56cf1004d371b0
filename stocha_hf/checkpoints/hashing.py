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

from stocha_hf.checkpoints.headers import Entry, tensor_headers
from stocha_hf.checkpoints.inspection import INDEX, list_files, read_config, read_json, weight_files
from stocha_hf.errors import StochaError

READ_BYTES = 2**20  # bytes read at a time
# Keys of config.json that no figure depends on. Any other key counts, also one that is not known here.
NEUTRAL = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache")
NEUTRAL_STOCHA = ("activation", "source", "history", "stocha_version")  # activation is what training runs
NEUTRAL_INPUTS = ("share", "train", "calibration")  # of the entry's `inputs`


def weights_hash(folder: Path) -> str:
    """SHA-256, in hex, of a folder's safetensors weights and of the config that they run with.

    Hashed are, as lines of JSON with sorted keys, config.json without its neutral keys, then of every tensor, by name,
    [name, dtype, shape] as safetensors writes them, followed by the tensor's bytes. Raises StochaError for a folder
    without config.json or whole safetensors weights.
    """
    found = weight_files(list_files(folder), lambda: read_json(folder / INDEX, "an index of shards"), str(folder))
    digest = hashlib.sha256(_line(behaviour(read_config(folder))))
    for name, entry in sorted(tensor_headers(folder, found).items()):
        digest.update(_line([name, entry.dtype, entry.shape]))
        _add_bytes(digest, entry)
    return digest.hexdigest()


def behaviour(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys that no figure depends on."""
    kept = {key: value for key, value in config.items() if key not in NEUTRAL}
    if isinstance(entry := kept.get("stocha"), dict):
        kept["stocha"] = {key: value for key, value in entry.items() if key not in NEUTRAL_STOCHA}
        if isinstance(cuts := entry.get("inputs"), dict):
            kept["stocha"]["inputs"] = {key: value for key, value in cuts.items() if key not in NEUTRAL_INPUTS}
    return kept


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _add_bytes(digest: Any, entry: Entry) -> None:
    begin = entry.begin
    with entry.file.open("rb") as file:
        file.seek(begin)
        while begin < entry.end:
            part = file.read(min(READ_BYTES, entry.end - begin))
            if not part:
                raise StochaError(f"{entry.file} is truncated: expected a whole file; download it again")
            digest.update(part)
            begin += len(part)
