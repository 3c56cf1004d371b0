"""Which files travel with a checkpoint's weights, and where their links may lead.

Only names on a fixed list are copied or published. A pattern such as `*token*` would also take `.hf_token`. Code is
never on the list: no .py file of a source is copied, and `auto_map`, which names code, is taken out of its tokenizer's
settings. A link is followed within the folder and into the Hub's cache, and nowhere else.

    companion_files(["tokenizer.json", ".hf_token", "LICENSE"])  # ["LICENSE", "tokenizer.json"]
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from stocha_hf.errors import StochaError

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.json", "vocab.txt")
COMPANIONS = {
    *TOKENIZERS,
    *(TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *(
        f"{stem}{end}"
        for stem in ("LICENSE", "LICENCE", "NOTICE", "Notice", "USE_POLICY")
        for end in ("", ".txt", ".md")
    ),
}
_TEMPLATE = re.compile(r"additional_chat_templates/[\w-]+\.jinja")  # transformers names these after their use
_CACHED = re.compile(r"(models--[^/]+/)?blobs/.+")
_SNAPSHOT = re.compile(r"models--[^/]+/snapshots/[^/]+$")


def companion_files(names: Collection[str]) -> list[str]:
    """Tokenizer, generation config, chat templates and licence among the file names of a folder or repo."""
    return sorted(name for name in names if name in COMPANIONS or _TEMPLATE.fullmatch(name))


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raise StochaError where a file is a link to somewhere outside its folder and outside the Hub's cache."""
    home = folder.resolve()
    for name in names:
        real = (folder / name).resolve()
        if not real.is_relative_to(home) and not _is_cached(real, home):
            raise StochaError(
                f"{folder / name} is a link to {real}: expected a file of {folder}; put a copy in the link's place"
            )


def _is_cached(real: Path, home: Path) -> bool:
    """Whether a file is a blob of the user's Hub cache, or of the one that `home` is a snapshot in."""
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = [Path(HF_HUB_CACHE).resolve()]
    if _SNAPSHOT.search(home.as_posix()):
        caches.append(home.parents[2])
    return any(
        real.is_relative_to(cache) and _CACHED.fullmatch(real.relative_to(cache).as_posix()) for cache in caches
    )


def without_code(folder: Path, names: Collection[str], settings: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's settings without `auto_map`, given the files it comes with.

    Raises StochaError where that code is all there is to build the tokenizer from.
    """
    if settings.get("auto_map") and "tokenizer.json" not in names:
        raise StochaError(
            f"the tokenizer of {folder} needs the code that its {TOKENIZER_CONFIG} names, which is never run: "
            "expected a tokenizer.json beside it; save one with save_pretrained of a fast tokenizer"
        )
    return {key: value for key, value in settings.items() if key != "auto_map"}


def dump(content: dict[str, Any]) -> str:
    """JSON as the files of a checkpoint have it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
