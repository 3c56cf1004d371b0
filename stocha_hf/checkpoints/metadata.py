"""What a source's own card says of it: the Hub metadata at the head of its README.md.

Of what others wrote there, only strings and short lists of strings are taken, and what a card of ours repeats must be
plain names. YAML can nest aliases so that a few lines stand for gigabytes.

    source_metadata(folder)  # {"license": "apache-2.0", "language": ["en"]}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.inspection import CARD
from stocha_hf.checkpoints.names import check_label

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # what a new card repeats
LONGEST = 2**16  # bytes of a card in which its metadata must end; parsing takes a second for as many
DEEPEST = 20  # brackets within brackets
STRING, LIST = 512, 64  # characters and items at most
_METADATA = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)


def source_metadata(folder: Path) -> dict[str, Any]:
    """The Hub metadata of a folder's card that are strings or lists of strings; {} where it has none.

    Every scalar stays a string: to the Hub the language `no` is Norwegian, to a YAML 1.1 parser it is False. Raises
    StochaError where a key of INHERITED holds more than plain names.
    """
    import yaml

    try:
        with (folder / CARD).open("rb") as file:
            block = _METADATA.match(file.read(LONGEST).decode("utf-8-sig", errors="replace"))
        if block is None or _depth(block[1]) > DEEPEST:
            return {}
        metadata = yaml.load(block[1], Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, TypeError, yaml.YAMLError):
        return {}
    return plain_metadata(metadata, str(folder / CARD)) if isinstance(metadata, dict) else {}


def _depth(text: str) -> int:
    """How deep brackets nest, at least; the time of parsing grows with its square."""
    depth = deepest = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    return deepest


def plain_metadata(metadata: dict[Any, Any], where: str) -> dict[str, Any]:
    """The strings and short lists of strings among a source's metadata.

    Raises StochaError where a key of INHERITED holds more than plain names.
    """
    kept = {key: value for key, value in metadata.items() if isinstance(key, str) and _is_plain(value)}
    for key in INHERITED:
        for value in kept[key] if isinstance(kept.get(key), list) else [kept.get(key)]:
            if value:
                check_label(value, f"{key} in {where}", link=key == "license_link")
    return kept


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= LIST and all(isinstance(item, str) and len(item) <= STRING for item in value)
    return isinstance(value, str) and len(value) <= STRING
