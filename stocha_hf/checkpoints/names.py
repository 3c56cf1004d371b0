"""Names that a published card repeats: Hub ids, revisions, and labels such as a folder's or a licence's name.

What stands in config.json or in a source's card was written by others and ends up as Markdown. So these names may hold
letters, digits and a few marks, and no markup, quote or line break.

    check_hub_id("org/model", "base_model")
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.paths import is_hub_id
from stocha_hf.errors import StochaError

LONGEST_ID = 96  # characters
_REVISION = re.compile(r"[a-zA-Z0-9_][\w./-]{0,199}", re.ASCII)
_LABEL = re.compile(r"\w[\w .+-]{0,199}")
_LINK = re.compile(r"\w[\w .+:/?=&#%~-]{0,499}")


def check_hub_id(value: Any, what: str) -> None:
    """Raise StochaError unless `value` is a Hub id, with or without a namespace."""
    if not (isinstance(value, str) and is_hub_id(value) and len(value) <= LONGEST_ID):
        raise StochaError(f"{what} is {_shown(value)}, which is not a valid Hub id: expected one such as org/name")


def check_revision(value: Any, what: str) -> None:
    """Raise StochaError unless `value` can be a branch, a tag or a commit hash."""
    if not (isinstance(value, str) and _REVISION.fullmatch(value)):
        raise StochaError(f"{what} is {_shown(value)}: expected a branch, a tag or a commit hash")


def check_label(value: Any, what: str, link: bool = False) -> None:
    """Raise StochaError unless `value` is a plain name or, with `link`, also an address."""
    if not (isinstance(value, str) and (_LINK if link else _LABEL).fullmatch(value)):
        raise StochaError(f"{what} is {_shown(value)}: expected a plain name of letters, digits, spaces and . + - _")


def check_origin(source: Any, where: str) -> None:
    """Raise StochaError unless a stocha entry's `source` holds the names of a model, or is None."""
    if source is None:
        return
    if not isinstance(source, dict):
        raise StochaError(f"stocha.source of {where} is {_shown(source)}: expected an id and a revision")
    for key, value in source.items():
        if value is None:
            continue
        what = f"stocha.source.{key} of {where}"
        if key == "revision":
            check_revision(value, what)
        elif isinstance(value, str) and "/" in value:
            check_hub_id(value, what)
        else:
            check_label(value, what)


def public_name(source: str) -> str:
    """A Hub id as it is; of a local file or folder its name alone, since a published config tells nobody's paths."""
    return label(Path(source).resolve().name) if Path(source).exists() else source


def label(name: str) -> str:
    """A file's or folder's name with `-` for what a label may not hold."""
    return re.sub(r"[^\w .+-]", "-", name).lstrip(" .+-")[:200] or "model"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
