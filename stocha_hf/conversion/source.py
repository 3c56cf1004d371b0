"""What SOURCE means: a Hub id, a local checkpoint folder, or a .gguf file, each opened as a checked checkpoint folder.

A GGUF file is the one source whose tensors must be decoded: transformers dequantizes it and saves an ordinary
checkpoint into a temporary folder, from which the conversion goes on as from any other. It needs torch, and the extra
`stocha_hf[gguf]`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocha_hf import hub
from stocha_hf.checkpoints import inspection
from stocha_hf.checkpoints.metadata import source_metadata
from stocha_hf.conversion.gguf import dequantize
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


@contextmanager
def open_source(source: str, revision: str | None, dtype: str) -> Iterator[Source]:
    """Find, fetch and check a source. `dtype` is what a .gguf file's tensors become. Raises StochaError."""
    path = Path(source).expanduser()
    if path.exists() and revision is not None:
        raise StochaError(
            f"--revision {revision} was given for the local {source}: expected a Hub id; leave --revision out"
        )
    if path.suffix == ".gguf":
        with tempfile.TemporaryDirectory(prefix="stocha-gguf-") as native:
            yield _checked(Path(native), path.name, None, dequantize(path, Path(native), dtype))
    elif path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        snapshot = _SNAPSHOT.search(str(path.resolve()))
        name = f"{snapshot['org']}/{snapshot['name']}" if snapshot else path.resolve().name
        yield _checked(path, name, snapshot["revision"] if snapshot else None)
    else:
        folder, commit = hub.fetch(source, revision)
        yield _checked(folder, source, commit)


def _checked(folder: Path, name: str, revision: str | None, metadata: dict[str, Any] | None = None) -> Source:
    names = inspection.list_files(folder)
    config = inspection.read_config(folder)
    row = inspection.check_config(config, name)
    weights = inspection.weight_files(names, lambda: inspection.read_json(folder / inspection.INDEX, "an index"), name)
    inspection.check_weights(folder, weights, config)
    files = [*weights, *inspection.companion_files(names)]
    return Source(
        folder, name, revision, row, config, files, source_metadata(folder) if metadata is None else metadata
    )
