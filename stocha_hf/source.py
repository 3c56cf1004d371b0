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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stocha_hf import checkpoint, hub, report
from stocha_hf.config import Architecture
from stocha_hf.errors import StochaError

_SNAPSHOT = re.compile(r"models--(?P<org>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})$")

SPECIAL_TOKENS = {  # of a tokenizer, and the metadata of a .gguf file that says which they are
    f"{ours}_token": f"tokenizer.ggml.{theirs}_token_id"
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
}


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
            yield _checked(Path(native), path.name, None, _dequantize(path, Path(native), dtype))
    elif path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        snapshot = _SNAPSHOT.search(str(path.resolve()))
        name = f"{snapshot['org']}/{snapshot['name']}" if snapshot else path.resolve().name
        yield _checked(path, name, snapshot["revision"] if snapshot else None)
    else:
        folder, commit = hub.fetch(source, revision)
        yield _checked(folder, source, commit)


def _checked(folder: Path, name: str, revision: str | None, metadata: dict[str, Any] | None = None) -> Source:
    names = checkpoint.list_files(folder)
    config = checkpoint.read_config(folder)
    row = checkpoint.check_config(config, name)
    weights = checkpoint.weight_files(names, lambda: checkpoint.read_json(folder / checkpoint.INDEX, "an index"), name)
    checkpoint.check_weights(folder, weights, config)
    files = [*weights, *checkpoint.companion_files(names)]
    return Source(
        folder, name, revision, row, config, files, report.source_metadata(folder) if metadata is None else metadata
    )


def _dequantize(path: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """Write a .gguf file's model and tokenizer into `folder` as a native checkpoint; returns its Hub metadata."""
    if not path.is_file():
        raise StochaError(f"{path} does not exist: expected a .gguf file, a folder or a Hub id such as org/name")
    if find_spec("gguf") is None:
        raise StochaError(f"{path} needs the package gguf, which is not installed: run pip install 'stocha_hf[gguf]'")
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        fields = GGUFReader(path).fields
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),  # else tensors may stay packed and saving refuses
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        for name, key in SPECIAL_TOKENS.items():  # transformers 5.17 takes BOS for EOS
            if key in fields:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(fields[key].contents())))
    except Exception as error:  # gguf, tokenizers and transformers raise whatever a broken file leads them to
        raise StochaError(
            f"{path} cannot be read as GGUF ({_one_line(error)}): expected a whole file of a dense model"
        ) from None
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    named = {"license": "general.license", "language": "general.languages"}
    return {key: fields[field].contents() for key, field in named.items() if field in fields}


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
