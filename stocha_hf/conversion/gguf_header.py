"""The header of a GGUF file: its metadata and where its tensors are, read without the tensors.

A header states counts and lengths that nobody has checked. Each is held against the bytes that are left in the file
before it is believed, so that a file of 150 bytes that claims 2**40 entries is refused at once.

    header = read_gguf_header(Path("model.gguf"))
    header.metadata["general.architecture"], header.tensors["token_embd.weight"].shape
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocha_hf.errors import StochaError

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
KEPT = 256  # entries of an array that are kept; a vocabulary has more and is read by transformers
MOST = 2**24  # entries of an array, of the metadata, or tensors
DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its file, ggml's number of its type, its shape as torch has it, and where its bytes begin."""

    file: Path
    type: int
    shape: list[int]
    begin: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (long arrays are None) and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a file's header. Raises StochaError for a file that is not GGUF, or not whole."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(path, data)
    except (OSError, ValueError, struct.error) as error:
        raise StochaError(
            f"{path} cannot be read as GGUF ({error}): expected a whole file; download it again"
        ) from error


def _header(path: Path, data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF" or cursor.number("I") not in VERSIONS:
        raise ValueError(f"it does not begin with GGUF and a version of {VERSIONS}")
    tensors, entries = cursor.count(24), cursor.count(13)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"{key!r} is in its metadata twice")
        metadata[key] = cursor.value(cursor.number("I"))
    found: dict[str, tuple[int, list[int], int]] = {}
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.number("I")
        if name in found or not 0 < dimensions <= DIMENSIONS:
            raise ValueError(f"tensor {name!r} is there twice or has {dimensions} dimensions")
        shape = [cursor.number("Q") for _ in range(dimensions)][::-1]
        found[name] = cursor.number("I"), shape, cursor.number("Q")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return GgufHeader(
        metadata, {name: GgufTensor(path, kind, shape, start + at) for name, (kind, shape, at) in found.items()}
    )


class _Cursor:
    """Reads a header from front to back. Raises ValueError or struct.error where the file ends first."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise ValueError(
                f"{length} bytes are announced at byte {self.at}, where {len(self.data) - self.at} are left"
            )
        self.at += length
        return self.data[self.at - length : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, size: int) -> int:
        """How many entries follow, of at least `size` bytes each."""
        count, left = self.number("Q"), len(self.data) - self.at
        if count > MOST or count * size > left:
            raise ValueError(f"{count} entries are announced at byte {self.at}, where {left} bytes are left")
        return int(count)

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value has the type {kind}, which GGUF does not have")
        item = self.number("I")
        if item in SCALARS:
            size = struct.calcsize(f"<{SCALARS[item]}")
            count = self.count(size)
            values = self.take(count * size)
            return list(struct.unpack(f"<{count}{SCALARS[item]}", values)) if count <= KEPT else None
        if item != STRING:
            raise ValueError(f"an array holds values of type {item}: it can hold numbers and strings")
        count = self.count(8)
        strings = [self.string() if count <= KEPT else self.take(self.number("Q")) for _ in range(count)]
        return strings if count <= KEPT else None
