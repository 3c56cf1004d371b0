"""What a checkpoint says of where it came from: its source's Hub metadata, and a name that may be published.

source_metadata(folder)          # {"license": "apache-2.0", ...}
public_name("/home/me/my-model")  # "my-model"
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.inspection import CARD

_METADATA = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)


def source_metadata(folder: Path) -> dict[str, Any]:
    """The Hub metadata of a source's own card, {} where it has none or it does not parse.

    Every scalar stays a string: to the Hub the language `no` is Norwegian, to a YAML 1.1 parser it is False.
    """
    import yaml

    try:
        block = _METADATA.match((folder / CARD).read_text(encoding="utf-8-sig"))
        metadata = yaml.load(block[1], Loader=yaml.BaseLoader) if block else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def public_name(source: str) -> str:
    """A Hub id as it is; of a local file or folder its name alone, since a published config tells nobody's paths."""
    return Path(source).resolve().name if Path(source).exists() else source
