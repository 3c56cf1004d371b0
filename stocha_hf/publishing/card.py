"""The model card: README.md, written at conversion, again with measurements, and completed at publication.

card_text.py says what stands in it. `write_card` is the one function that writes a card, whoever wants one:
conversion, training and stocha-card. A card still has REPO_ID and REVISION; `published_card` fills them in for the
upload and leaves the folder as it is.

    write_card("smollm2-relu", evaluation="eval.json", bench="bench.json")
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.inspection import CARD, read_config
from stocha_hf.checkpoints.metadata import source_metadata
from stocha_hf.errors import StochaError
from stocha_hf.publishing.card_text import card_text
from stocha_hf.publishing.measurements import HASH_KEY, Measurements, check_measurements


def write_card(
    folder: str | Path,
    *,
    evaluation: str | Path | None = None,
    rows: Mapping[str, str | Path] | None = None,
    bench: str | Path | None = None,
    generation: str | Path | None = None,
    tasks: str | Path | None = None,
    row_benches: Mapping[str, str | Path] | None = None,
    notes: str | Path | None = None,
    config: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder's README.md, with tables and pictures of what was measured if files are given.

    The files and their pictures are copied to the folder's measurements/. Everything is read, checked and drawn before
    the first file is written. A card that is there already is kept as README.md.orig when measurements are given.

    Args:
        folder: A stocha checkpoint's folder.
        evaluation: What `stocha-eval FOLDER --json` printed; the other files need it.
        rows: Other evaluations for the same table, by label.
        bench: What `stocha-bench FOLDER --json` printed.
        generation: What `stocha-generate FOLDER --json` printed.
        tasks: What `stocha-eval FOLDER --tasks ... --json` printed.
        row_benches: What `stocha-bench` printed of rows, by their labels.
        notes: Markdown to stand behind the figures, for what no command measured on this folder.
        config: The checkpoint's config.json (default: the folder's; an adapter's folder has none).
        metadata: Hub metadata of the source's card (default: of the folder's own card, which has it from the source).

    Returns:
        The card's path.

    Raises:
        StochaError: the folder is not a stocha checkpoint, or a file is malformed, of other weights or not comparable.
    """
    folder = Path(folder)
    config = stocha_config(folder) if config is None else config
    if evaluation is None and (rows or bench or generation or tasks or row_benches or notes):
        raise StochaError("a card was given measurements but no evaluation: expected what stocha-eval --json printed")
    measured = (
        None
        if evaluation is None
        else Measurements.read(folder, evaluation, rows, bench, generation, tasks, row_benches, notes)
    )
    card = card_text(config, source_metadata(folder) if metadata is None else metadata, measured)
    path = folder / CARD
    if measured is None:
        _replace(path, card)
    else:
        with measured.staged() as install:
            install()
            if path.exists():
                shutil.copyfile(path, folder / f"{CARD}.orig")
            _replace(path, card)
    return path


def _replace(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=".card-", delete=False
        ) as file:
            file.write(content)
        os.chmod(file.name, 0o666 & ~_umask())
        os.replace(file.name, path)
    except OSError as error:
        raise StochaError(f"{path} cannot be written ({error.strerror}): free space, or make it writable") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def stocha_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a stocha checkpoint folder. Raises StochaError for another folder."""
    config = read_config(folder)
    if not isinstance(config.get("stocha"), dict):
        raise StochaError(
            f"{folder} is not a stocha checkpoint: expected a folder that stocha-convert or training wrote"
        )
    return config


def check_card(folder: Path) -> None:
    """Raise StochaError where a folder's card or measurements tell of other weights than it has."""
    found = source_metadata(folder).get(HASH_KEY)
    check_measurements(folder, None if found is None else str(found))


def published_card(folder: Path, repo: str, tag: str) -> str:
    """Return the folder's card, or a new one where there is none, with the repo and revision that its snippets name.

    Raises StochaError for a card that is not text.
    """
    path = folder / CARD
    try:
        card = path.read_text(encoding="utf-8") if path.is_file() else card_text(read_config(folder), {})
    except (OSError, UnicodeDecodeError) as error:
        raise StochaError(f"{path} cannot be read ({error}): expected text in UTF-8") from None
    return card.replace("REPO_ID", repo).replace("REVISION", tag)
