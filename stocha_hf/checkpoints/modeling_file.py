"""Which modeling_stocha.py is ours: the package's own, or one that a release wrote.

A published file of that name runs in other people's Python. A folder may come from anywhere, so its file is published
only if it is known, and the package's own is put in the place of any other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from stocha_hf.spec import MODELING_FILE

RELEASED = {  # SHA-256 of the file in each release
    "c86c193bf88e9f47677e386c67c1b2687159c41206c41621bfeae8c72ccbe9e3": "0.1.0",
}


def is_ours(path: Path) -> bool:
    """Whether a file is a modeling_stocha.py that this package or a release of it wrote."""
    data = path.read_bytes()
    return data == MODELING_FILE.read_bytes() or hashlib.sha256(data).hexdigest() in RELEASED
