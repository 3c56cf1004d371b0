"""Conversion: a source checkpoint becomes a stocha checkpoint; no tensor is decoded.

Patching changes the activation and not one weight, so the shards are copied byte for byte (copy-on-write where the
file system can) and only config.json, the modeling file and the card are written. Hence the time of `cp`, and memory
independent of the model's size. Converting a converted checkpoint changes only what is asked for.

    stocha-convert org/model model-stocha --p 0.3
    from stocha_hf.convert import convert; convert("org/model", "model-stocha", p=0.3)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stocha_hf import report
from stocha_hf.checkpoint import CARD, CONFIG, began_random
from stocha_hf.config import MODELING_FILE, StochaConfig, __version__
from stocha_hf.errors import StochaError
from stocha_hf.source import Source, open_source
from stocha_hf.staging import copy_file, staged_folder

DTYPES = ("bfloat16", "float16", "float32")


def convert(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    base_model: str | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    refit: str | None = None,
    target_sparsity: float | None = None,
    refit_tokens: int | None = None,
    refit_on_disk: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Write the stocha checkpoint of `source` (Hub id, folder or .gguf file) to the folder `output`.

    `changes` are fields of StochaConfig (activation, p, positive, inference, threshold, k). `base_model` is the Hub id
    of a local source, `dtype` what the tensors of a .gguf file become. With `refit`, a data set's name, the FFNs are
    refitted for ReLU on `refit_tokens` of its text, or for FATReLU with a share of `target_sparsity` zeros
    (stocha_hf/refit.py). Returns layers, output, source {id, revision}, stocha (the new config entry) and files.
    Raises StochaError, with nothing written, for whatever cannot be converted.
    """
    output = Path(output)
    if refit is not None:
        changes = _refit_activation(changes)
    elif target_sparsity is not None or refit_tokens is not None or refit_on_disk:
        raise StochaError(
            "target_sparsity, refit_tokens or refit_on_disk was given without refit: expected the data to refit on"
        )
    _stocha_config(changes)
    check_output(output, overwrite)
    if refit is not None:
        from stocha_hf.refit import Refit, refit_checkpoint  # needs torch, which copying does not

        options = Refit(refit, refit_tokens, target_sparsity, refit_on_disk)
    if dtype not in DTYPES:
        raise StochaError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    with open_source(str(source), revision, dtype) as found:
        config = _converted_config(found, base_model, changes)
        fitted = refit_checkpoint(found, config, options, _work_folder(output)) if refit is not None else None
        if fitted is not None:
            config = fitted.config
        files = write_checkpoint(found, config, output, overwrite, fitted.apply_to if fitted is not None else None)
        shutil.rmtree(_work_folder(output), ignore_errors=True)
    return {
        "layers": config["num_hidden_layers"],
        "output": str(output),
        "source": config["stocha"].get("source"),
        "stocha": config["stocha"],
        "files": files,
    }


def _refit_activation(changes: dict[str, Any]) -> dict[str, Any]:
    changes = {"activation": "relu"} | changes
    if changes.keys() - {"activation"} or changes["activation"] != "relu":
        given = ", ".join(f"{key} {value}" for key, value in changes.items())
        raise StochaError(
            f"refit was given with {given}: expected activation relu and no other field, since the refit chooses the "
            "thresholds; convert the result again for another training activation"
        )
    return changes


def _work_folder(output: Path) -> Path:
    """Where a refit keeps finished layers until the output stands: beside it, so that a killed run finds it."""
    output = Path(os.path.abspath(output))
    return output.with_name(f".{output.name}.refit")


def _stocha_config(entry: dict[str, Any]) -> StochaConfig:
    try:
        return StochaConfig.from_dict(entry)
    except ValueError as error:
        raise StochaError(str(error)) from None


def check_output(output: Path, overwrite: bool) -> None:
    """Raise StochaError where `output` cannot be written, or exists and is not to be replaced."""
    if not output.exists() and not output.is_symlink():
        ancestor = next(parent for parent in output.absolute().parents if parent.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise StochaError(f"cannot write {output} in {ancestor}: expected a folder with write permission")
        return
    if not overwrite:
        raise StochaError(f"{output} exists: expected a new folder; choose another one or pass --overwrite")
    if not output.is_dir() or output.is_symlink() or (any(output.iterdir()) and not (output / CONFIG).is_file()):
        raise StochaError(f"{output} is no checkpoint folder: expected one to overwrite; choose another output")


def _converted_config(source: Source, base_model: str | None, changes: dict[str, Any]) -> dict[str, Any]:
    """The source's config.json with hidden_act, auto_map and the stocha entry; every other key stays."""
    row, before = source.architecture, dict(source.config.get("stocha") or {})
    if "activation" in changes:
        before.pop("inference", None)  # follows the new activation unless it is asked for too
    own_act = before.get("base") or row.act
    origin = before.get("source")
    if origin is None and not began_random(before):
        origin = {"id": source.id, "revision": source.revision}
    if base_model is not None:
        origin = {"revision": None, **(origin or {}), "id": base_model}
    entry = {**before, **changes, "source": origin, "stocha_version": __version__}
    try:
        stocha = _stocha_config(entry).resolve(own_act)
    except ValueError as error:
        raise StochaError(str(error)) from None
    if isinstance(stocha.threshold, list) and len(stocha.threshold) != source.config["num_hidden_layers"]:
        raise StochaError(f"threshold has {len(stocha.threshold)} numbers: expected one, or one per layer")
    # Gemma's configs on the Hub hold both keys, of which the native class reads one: neither may tell another story.
    act_keys = {row.act_key, *({"hidden_act", "hidden_activation"} & source.config.keys())}
    acts = dict.fromkeys(sorted(act_keys), stocha.native_act)
    return source.config | acts | {"auto_map": row.auto_map, "stocha": stocha.to_dict()}


def write_checkpoint(
    source: Source, config: dict[str, Any], output: Path, overwrite: bool, change: Callable[[Path], None] | None = None
) -> list[str]:
    """Write the source's files with this config to `output`, whole or not at all; returns the names of its files.

    `change` may overwrite the copied tensors in the folder that it is given.
    """
    with staged_folder(output, replace=overwrite) as folder:
        _copy_all(source, folder)
        if change is not None:
            change(folder)
        copy_file(MODELING_FILE, folder / MODELING_FILE.name)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / CARD).write_text(report.model_card(config, source.metadata), encoding="utf-8")
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _copy_all(source: Source, folder: Path) -> None:
    from tqdm import tqdm

    sizes = {name: (source.folder / name).stat().st_size for name in source.files}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="Copying", disable=None, leave=False) as bar:
        for name in source.files:
            copy_file(source.folder / name, folder / name, bar.update)
