"""Names that users give, as paths: refused in one place where no file system could have such a path.

local_path("~/models/smollm2")  # PosixPath("/home/me/models/smollm2")
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from stocha_hf.errors import StochaError

_HUB_ID = re.compile(r"(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)  # as the Hub's client checks it
LONGEST_PART, LONGEST_PATH = 255, 4095  # bytes, on common systems


def local_path(name: str | Path) -> Path:
    """Return the path that `name` would have on this machine, whether it exists or not.

    Raises:
        StochaError: `name` is empty, longer than a path can be, or begins with an unknown user's `~user`.
    """
    text = os.fspath(name)
    if not text.strip() or "\0" in text:
        raise StochaError(f"the name {text!r} is empty: expected a path or a Hub id")
    parts = Path(text).parts
    for part, most in (*((part, LONGEST_PART) for part in parts), (text, LONGEST_PATH)):
        if (length := len(os.fsencode(part))) > most:
            raise StochaError(f"the name {part[:40]}... has {length} bytes: expected at most {most}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise StochaError(f"{text} is in the home folder of {parts[0]}, an unknown user: expected a path") from None


def is_hub_id(name: str) -> bool:
    """Return whether a Hub repo can have this id: a name, or org/name."""
    return bool(_HUB_ID.fullmatch(name)) and not any(pair in name for pair in ("--", ".."))


def is_path(name: str) -> bool:
    """Return whether no Hub repo can have this name, so that it means a path, whether that exists or not."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(".gguf")
