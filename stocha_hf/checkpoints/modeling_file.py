"""Which code files a checkpoint carries, and which of them are ours: the package's own, or one that a release wrote.

A published file of these names runs in other people's Python. A folder may come from anywhere, so its file is
published only if it is known, and the package's own is put in the place of any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocha_hf.quantization import QUANTIZATION_FILE
from stocha_hf.spec import CUTS_FILE, MLX_FILE, MODELING_FILE

CODE_FILES = (MODELING_FILE, CUTS_FILE, QUANTIZATION_FILE, MLX_FILE)
RELEASED = {  # SHA-256 of the file in each release
    "c86c193bf88e9f47677e386c67c1b2687159c41206c41621bfeae8c72ccbe9e3": "0.1.0",
}


def code_files(config: Mapping[str, Any]) -> list[Path]:
    """The package's code that a checkpoint of this config carries."""
    quantized = bool(config.get("quantization_config"))
    cuts = bool((config.get("stocha") or {}).get("inputs"))
    wanted = {CUTS_FILE: cuts or quantized, QUANTIZATION_FILE: quantized, MLX_FILE: bool(config.get("model_file"))}
    return [MODELING_FILE, *(file for file, carried in wanted.items() if carried)]


def version_of(path: Path) -> str | None:
    """The release that wrote a file of one of these names, "current" for the installed package's, else None."""
    data = path.read_bytes()
    own = next(file for file in CODE_FILES if file.name == path.name)
    return "current" if data == own.read_bytes() else RELEASED.get(hashlib.sha256(data).hexdigest())


def is_ours(path: Path) -> bool:
    """Whether a file of one of these names was written by this package or a release of it."""
    return version_of(path) is not None
