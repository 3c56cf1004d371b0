"""Tensors that a folder's new config.json does not ask for are left out: the tokens' factors of cuts that went.

A loader would warn of them, and this package refuses a folder that has what its config ignores. Files are written
again without them, byte for byte; memory is that of a chunk.

    drop_tensors(folder, ["model.safetensors"], {"layers.0.mlp.gate_proj_token_factor"})
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.architecture import Sizes, token_factors
from stocha_hf.checkpoints.casting import correct_index
from stocha_hf.checkpoints.companions import dump
from stocha_hf.checkpoints.headers import Entry, read_header
from stocha_hf.checkpoints.inspection import INDEX, read_json

PREFIX = "model."  # which names may have or not
CHUNK = 2**24  # bytes


def unasked(before: Mapping[str, Any], after: Mapping[str, Any], where: str) -> set[str]:
    """The tokens' factors that a folder of one config.json has and of another has not, by names without PREFIX."""
    had, has = ({name for name, _ in token_factors(Sizes.of(one, where), one, where)} for one in (before, after))
    return had - has


def is_among(name: str, names: Collection[str]) -> bool:
    """Return whether a tensor is one of these, named without PREFIX."""
    return name.removeprefix(PREFIX) in names


def drop_tensors(folder: Path, files: Collection[str], names: Collection[str]) -> None:
    """Write those of a folder's safetensors files again that have tensors of these names, and its index."""
    if not names:
        return
    for path in [folder / file for file in files if file.endswith(".safetensors")]:
        entries = sorted(read_header(path).items(), key=lambda row: row[1].begin)
        kept = {name: entry for name, entry in entries if not is_among(name, names)}
        if not kept:
            path.unlink()
        elif len(kept) < len(entries):
            _rewrite(path, kept)
    if INDEX not in files:
        return
    index = read_json(folder / INDEX, "an index of shards")
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not is_among(name, names)}
    (folder / INDEX).write_text(dump(index), encoding="utf-8")
    correct_index(folder, [file for file in files if (folder / file).exists()])


def _rewrite(path: Path, kept: Mapping[str, Entry]) -> None:
    partial = path.with_suffix(".partial")
    with path.open("rb") as old, partial.open("wb") as new:
        told = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header, end = {name: row for name, row in told.items() if name == "__metadata__"}, 0
        for name, entry in kept.items():
            begin, end = end, end + entry.end - entry.begin
            header[name] = told[name] | {"data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        for entry in kept.values():
            old.seek(entry.begin)
            for begin in range(entry.begin, entry.end, CHUNK):
                new.write(old.read(min(CHUNK, entry.end - begin)))
    partial.replace(path)
