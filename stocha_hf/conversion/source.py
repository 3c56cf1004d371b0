"""What SOURCE means: a Hub id, a local checkpoint folder, or a .gguf file, each opened as a checked checkpoint folder.

A GGUF file is the one source whose tensors must be decoded (conversion/gguf.py): they become an ordinary checkpoint in
a hidden folder beside the output, from which the conversion goes on as from any other. It needs torch, and the extra
`stocha_hf[gguf]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocha_hf import hub
from stocha_hf.checkpoints import companions, inspection, names
from stocha_hf.checkpoints.metadata import source_metadata
from stocha_hf.checkpoints.paths import is_path, local_path
from stocha_hf.checkpoints.staging import scratch_folder
from stocha_hf.errors import StochaError
from stocha_hf.spec import Architecture

_SNAPSHOT = re.compile(r"models--(?P<org>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})$")


@dataclass(frozen=True)
class Source:
    """A whole checkpoint folder that can be converted."""

    folder: Path
    id: str  # Hub id, or the name of a local folder or file
    revision: str | None  # commit hash on the Hub
    architecture: Architecture
    config: dict[str, Any]
    files: list[str]  # weights and companions, without config.json and the card
    metadata: dict[str, Any]  # Hub metadata of the source's card
    tokenizer: dict[str, Any] | None = None  # tokenizer_config.json without the code that it names, if it does


def local_source(source: str) -> Path | None:
    """The path of a source that is local, None for a Hub id. Raises StochaError for a path that cannot be one."""
    path = local_path(source)
    return path if path.exists() or is_path(source) else None


@contextmanager
def open_source(source: str, revision: str | None, dtype: str, output: Path) -> Iterator[Source]:
    """Find, fetch and check a source for `output`. `dtype` is what a .gguf file's tensors become.

    Raises StochaError.
    """
    path = local_source(source)
    if path is None:
        folder, commit = hub.fetch(source, revision)
        yield _checked(folder, source, commit)
        return
    if revision is not None:
        raise StochaError(
            f"--revision {revision} was given for the local {source}: expected a Hub id; leave --revision out"
        )
    if _is_gguf(path):
        from stocha_hf.conversion.gguf import check_gguf, dequantize

        model = check_gguf(path)
        with scratch_folder(output) as native:
            yield _checked(native, names.label(path.name), None, dequantize(model, native, dtype))
        return
    snapshot = _SNAPSHOT.search(str(path.resolve()))
    name = f"{snapshot['org']}/{snapshot['name']}" if snapshot else names.label(path.resolve().name)
    yield _checked(path, name, snapshot["revision"] if snapshot else None)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def _checked(folder: Path, name: str, revision: str | None, metadata: dict[str, Any] | None = None) -> Source:
    inspection.check_folder(folder, "a checkpoint folder, a .gguf file or a Hub id such as org/name")
    present = inspection.list_files(folder)
    companions.check_links(folder, {inspection.CONFIG, inspection.CARD, inspection.INDEX} & set(present))
    config = inspection.read_config(folder)
    row = inspection.check_config(config, name)
    weights = inspection.weight_files(
        present, lambda: inspection.read_json(folder / inspection.INDEX, "an index"), name
    )
    files = [*weights, *companions.companion_files(present)]
    companions.check_links(folder, files)
    inspection.check_weights(folder, weights, config)
    found = source_metadata(folder) if metadata is None else metadata
    return Source(folder, name, revision, row, config, files, found, _tokenizer_without_code(folder, files))


def _tokenizer_without_code(folder: Path, files: list[str]) -> dict[str, Any] | None:
    if companions.TOKENIZER_CONFIG not in files:
        return None
    settings = inspection.read_json(folder / companions.TOKENIZER_CONFIG, "a tokenizer's settings")
    cleaned = companions.without_code(folder, files, settings)
    return cleaned if cleaned != settings else None
