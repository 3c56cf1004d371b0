"""The folder that a conversion, an average or an export writes: checked before, and there whole or not at all.

Weights are copied byte for byte, copy-on-write where the file system can, or cast on the way (casting.py). What
changes tensors does so in the copy, in the dtype that they have there.

    check_output(output, overwrite=False)
    with open_source("org/model", None, "bfloat16", output) as source:
        write_checkpoint(source, config, output, overwrite=False)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.casting import cast_file, correct_index
from stocha_hf.checkpoints.companions import TOKENIZER_CONFIG, dump
from stocha_hf.checkpoints.dropping import drop_tensors, unasked
from stocha_hf.checkpoints.inspection import CONFIG
from stocha_hf.checkpoints.modeling_file import code_files
from stocha_hf.checkpoints.staging import check_place, copy_file, staged_folder
from stocha_hf.conversion.source import Source
from stocha_hf.errors import StochaError
from stocha_hf.progress import Progress
from stocha_hf.publishing import card


def check_output(output: Path, overwrite: bool) -> None:
    """Raise StochaError where `output` cannot be written, or exists and is not to be replaced."""
    if not output.exists() and not output.is_symlink():
        check_place(output)
        return
    if not overwrite:
        raise StochaError(f"{output} exists: expected a new folder; choose another one or pass --overwrite")
    if not output.is_dir() or output.is_symlink() or (any(output.iterdir()) and not (output / CONFIG).is_file()):
        raise StochaError(f"{output} is not a checkpoint folder: expected one to overwrite; choose another output")


def write_checkpoint(
    source: Source,
    config: dict[str, Any],
    output: Path,
    overwrite: bool,
    change: Callable[[Path], None] | None = None,
    dtype: str | None = None,
) -> list[str]:
    """Write the source's files with this config to `output`, whole or not at all; returns the names of its files.

    Weights are cast to `dtype`, if it is given. `change` may overwrite the copied tensors in the folder that it is
    given. Raises StochaError.
    """
    with staged_folder(output, replace=overwrite) as folder:
        copy_files(source, folder, config, dtype)
        if change is not None:
            change(folder)
        for file in code_files(config):
            copy_file(file, folder / file.name)
        (folder / CONFIG).write_text(dump(config), encoding="utf-8")
        card.write_card(folder, config=config, metadata=source.metadata)
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def copy_files(source: Source, folder: Path, config: Mapping[str, Any], dtype: str | None = None) -> None:
    """Copy weights, cast to `dtype` if it is given, and companions, and the tokenizer's settings without code.

    Tensors that only the source's config.json asks for, and not this one, stay behind.
    """
    sizes = {name: (source.folder / name).stat().st_size for name in source.files}
    with Progress(total=sum(sizes.values()), unit="B", unit_scale=True, desc="Copying") as bar:
        for name in source.files:
            if dtype is not None and name.endswith(".safetensors"):
                cast_file(source.folder / name, folder / name, dtype, source.id, bar.update)
            else:
                copy_file(source.folder / name, folder / name, bar.update)
    if dtype is not None:
        correct_index(folder, source.files)
    drop_tensors(folder, source.files, unasked(source.config, config, source.id))
    if source.tokenizer is not None:
        (folder / TOKENIZER_CONFIG).write_text(dump(source.tokenizer), encoding="utf-8")
