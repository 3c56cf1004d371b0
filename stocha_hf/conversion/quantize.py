"""Quantizing a checkpoint: every matrix becomes codes and scales, a decoder layer at a time.

Scales fit the weights (quantization_stocha.fit). With a text to calibrate on they fit what the layers compute from it
(error_feedback.py): the text runs through the model one layer at a time, and each layer is quantized before the next
sees its output. Memory is that of a layer and of the text's hidden states.

Each finished layer is a file in a work folder beside the output (refit_work.py), so that a killed run goes on there
and ends with the same bytes. The last step joins these files into the folder's weights.

    stocha-convert SOURCE OUTPUT --bits 4 [--calibrate DATA]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stocha_hf.checkpoints.architecture import Sizes, expected_tensors
from stocha_hf.checkpoints.casting import cast
from stocha_hf.checkpoints.companions import dump
from stocha_hf.checkpoints.dropping import is_among, unasked
from stocha_hf.checkpoints.entry import read_entry, with_entry, with_stage
from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.checkpoints.inspection import INDEX
from stocha_hf.checkpoints.names import public_name
from stocha_hf.checkpoints.tensors import LAYER, Tensors
from stocha_hf.conversion.calibration import WINDOWS, Calibration
from stocha_hf.conversion.error_feedback import round_with_feedback
from stocha_hf.conversion.mixed_bits import with_mean_bits
from stocha_hf.conversion.refit_work import layers_folder, reading_layer
from stocha_hf.conversion.source import Source
from stocha_hf.data import calibration_windows
from stocha_hf.errors import StochaError
from stocha_hf.progress import Progress
from stocha_hf.quantization import IN_8_BITS, OUTPUTS, Quantization, is_matrix
from stocha_hf.quantization_stocha import NAMES, dequantize, quantize
from stocha_hf.spec import ACTIVATIONS

SHARD = "5GB"
DEFAULT_TOKENS, WINDOW = 16_384, 512


@dataclass(frozen=True)
class Quantize:
    """What to quantize to: the entry, a mean of bits a weight to reach with more matrices in 8 bits, if any, and the
    text to calibrate on, if any, with the number of its tokens. `dtype` is that of what has no codes, such as norms
    (None: the source's).
    """

    entry: Quantization
    mean_bits: float | None = None
    data: str | None = None
    tokens: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Quantized:
    """The result: the quantized folder's config.json, and the finished parts of its weights."""

    folder: Path
    parts: list[str]
    config: dict[str, Any]

    def write_to(self, checkpoint: Path) -> None:
        """Write the weights into a folder that has none."""
        tensors = {name: value for part in self.parts for name, value in _load(self.folder / part).items()}  # mapped
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
        for file, names in split.filename_to_tensors.items():
            save_file({name: tensors[name] for name in names}, checkpoint / file, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (checkpoint / INDEX).write_text(dump(index), encoding="utf-8")


def layout(
    bits: float, in_8_bits: Sequence[str] | None, config: dict[str, Any], rows: str | None = None
) -> Quantization:
    """The entry for a converted config.json, with projections that cut their inputs laid out for decode steps, or a
    row an output where `rows` says so.
    """
    entry, named = config["stocha"], IN_8_BITS if in_8_bits is None else tuple(in_8_bits)
    inputs = entry.get("inputs") or {}
    cut = inputs.get("thresholds", {})
    sizes = {
        name.split(".")[-2]: (shape[0], shape[1])
        for name, shape in expected_tensors(Sizes.of(config, "the converted folder"))
        if name.split(".")[-2] in cut and len(shape) == 2 and rows != OUTPUTS
    }
    skips = ACTIVATIONS[entry["inference"]].cut is not None
    return Quantization(8 if bits == 8 else 4, named).laid_out(sizes, inputs.get("share") or 0.0, skips)


def quantize_checkpoint(source: Source, config: dict[str, Any], options: Quantize, work: Path) -> Quantized:
    """Quantize the matrices of `source`, of which `config` is the converted config.json; keeps what is done in `work`.

    Raises StochaError for weights that are not finite, too little text, a mean of bits that is too small, and for what
    cannot be written.
    """
    tensors = Tensors(source.folder)
    if options.mean_bits is not None:
        options = replace(options, entry=with_mean_bits(tensors, options.entry, options.mean_bits))
    text = _calibration(source, config, options)
    try:
        folder = layers_folder(work, _key(source, config, options))
        parts = _parts(tensors, Sizes.of(config, source.id).tied, unasked(source.config, config, source.id))
        for part, names in Progress(parts.items(), desc="Quantizing", unit="layer"):
            match = LAYER.search(names[0])
            if text is not None and match is not None:
                _calibrated(tensors, names, options, folder / part, text, int(match[1]))
            elif not (folder / part).exists():
                _save(folder / part, _quantized(tensors, names, options))
    except (OSError, SafetensorError) as error:
        raise StochaError(
            f"cannot write {work} ({error}): free space and start again with the same command, which continues from "
            "the finished layers there"
        ) from error
    stage: dict[str, Any] = {"method": "quantize", "bits": options.mean_bits or options.entry.bits}
    if options.data is not None:
        stage |= {"data": public_name(options.data), "tokens": options.tokens or DEFAULT_TOKENS}
    config = config | {"quantization_config": options.entry.to_dict()}
    config = with_entry(config, with_stage(read_entry(config, source.id), stage))
    return Quantized(folder, list(parts), config)


def _parts(tensors: Tensors, tied: bool, unasked: set[str]) -> dict[str, list[str]]:
    """The tensors of each file in the work folder, less those unasked for: a file a layer, and one for the rest."""
    parts: dict[str, list[str]] = {}
    for name in sorted(tensors.names):
        match = LAYER.search(name)
        part = f"layer-{int(match[1]):03d}" if match else f"layer-{name}"
        if not (tied and name == "lm_head.weight") and not is_among(name, unasked):
            parts.setdefault(f"{part}.safetensors", []).append(name)
    return dict(sorted(parts.items()))


def _calibration(source: Source, config: dict[str, Any], options: Quantize) -> Calibration | None:
    if options.data is None:
        return None
    length = min(WINDOW, config.get("max_position_embeddings") or WINDOW)
    windows = calibration_windows(options.data, source.folder, options.tokens or DEFAULT_TOKENS, length, seed=0)
    windows = windows[: len(windows) // WINDOWS * WINDOWS]
    if not len(windows):
        raise StochaError(
            f"{options.data} has too little text to calibrate on: expected at least {WINDOWS} windows of {length} "
            "tokens"
        )
    return Calibration(source, config, windows)


def _calibrated(
    tensors: Tensors, names: list[str], options: Quantize, path: Path, text: Calibration, index: int
) -> None:
    """Quantize a layer with error feedback, unless its file is there, and run the text through the result."""
    entry = options.entry
    with text.layers.load(index) as layer:
        if not path.exists():
            _save(path, _quantized(tensors, names, options, text.moments(layer, index)))
        found = _load(path)
        for module in [name.removesuffix(".codes") for name in found if name.endswith(".codes")]:
            weight = layer.get_submodule(LAYER.search(module)[2]).weight  # type: ignore[index]
            weight = weight.t() if entry.is_transposed(module) else weight
            codes, scale = (found[f"{module}.{end}"] for end in NAMES)
            weight.copy_(dequantize(codes, scale, entry.bits_of(module), weight.shape[1]))
        text.advance(layer, index)


def _quantized(
    tensors: Tensors, names: list[str], options: Quantize, moments: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    entry = options.entry
    found: dict[str, torch.Tensor] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        value = tensors.read(name)
        if part != "weight" or not is_matrix(module):
            found[name] = value if options.dtype is None else cast(value, getattr(torch, options.dtype), name)
            continue
        if not value.isfinite().all():
            raise StochaError(f"{name} has values that are not finite: expected numbers; check the source's weights")
        matrix = value.t() if entry.is_transposed(module) else value
        bits = entry.bits_of(module)
        if moments is None or bits == 8:
            made = quantize(matrix, bits, in_planes=entry.is_in_planes(module))
        else:
            own = moments[module.rpartition(".")[2]]
            made = round_with_feedback(matrix.to(own.device), own, entry.is_transposed(module))
        found |= {f"{module}.{end}": one.cpu() for end, one in zip(NAMES, made, strict=True)}
    return found


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    partial.rename(path)


def _load(path: Path) -> dict[str, torch.Tensor]:
    with reading_layer(path):
        return load_file(path)


def _key(source: Source, config: dict[str, Any], options: Quantize) -> str:
    """A hash of all that decides the quantized layers."""
    told = json.dumps([config, weights_hash(source.folder), asdict(options)], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
