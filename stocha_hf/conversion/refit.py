"""Refit: a ReLU conversion without training. Layer by layer, each FFN is fitted to what the original model computes.

Swapping SiLU for ReLU breaks a model. Here calibration text runs through the original model (stream h0) and through
the converted one (stream h1) side by side, one layer in memory at a time. For each layer the FFN, fed with h1, is
refitted (refit_ffn.py) so that the stream after it returns to h0: target = FFN_0(h0) + MIX * (h0 - h1), both
streams after attention. MIX = 1 would undo all drift at once, 0 ignores it. A token's error counts relative to the
mean square of its stream, which the next norm divides by. Nothing is backpropagated through the model.

A finished layer is written to a work folder beside the output, so that a killed run goes on there and ends with the
same weights.

    stocha-convert SOURCE OUTPUT --activation relu --refit DATA [--target-sparsity 0.8]
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from stocha_hf.checkpoints.tensors import Tensors
from stocha_hf.conversion.layerwise import Layers
from stocha_hf.conversion.refit_ffn import BATCH, FFN, Rows, refit_ffn
from stocha_hf.conversion.refit_shares import allocate
from stocha_hf.conversion.source import Source
from stocha_hf.data import calibration_windows
from stocha_hf.errors import StochaError

MIX = 0.7  # share of the streams' distance that a layer's target undoes
TOKENS = 98_304  # default, or TOKENS_PER_NEURON x the FFN's width if that is more
TOKENS_PER_NEURON = 8
LEAST_PER_NEURON = 4  # with fewer, the normal equations fit noise
WINDOW = 1024  # tokens
WINDOWS = 8  # in a batch
PASSES = 2  # over the tokens, for the local fit
PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Refit:
    """What to refit on and towards; recorded in config.json under `stocha.history`.

    `data` is a file, folder or Hub data set (stocha_hf/data.py), `tokens` how many of its tokens to use,
    `target_sparsity` the wanted share of zeros in the hidden vectors (None: plain ReLU's), `on_disk` whether the
    streams are kept in the work folder instead of in memory.
    """

    data: str
    tokens: int | None = None
    target_sparsity: float | None = None
    on_disk: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target_sparsity is not None and not 0 < self.target_sparsity < 1:
            raise StochaError(
                f"the sparsity target is {self.target_sparsity}: expected a share of zeros between 0 and 1"
            )


@dataclass(frozen=True)
class Refitted:
    """The result: the converted model's config.json, and the new FFN weights by layer in `folder`."""

    folder: Path
    config: dict[str, Any]

    def apply_to(self, checkpoint: Path) -> None:
        """Overwrite the FFN weights of a copy of the source."""
        tensors = Tensors(checkpoint)
        for index in range(self.config["num_hidden_layers"]):
            names = tensors.layer(index)
            with safe_open(layer_file(self.folder, index), framework="pt") as stored:
                for part in PARTS:
                    tensors.overwrite(names[f"mlp.{part}.weight"], stored.get_tensor(part))


def refit_checkpoint(source: Source, config: dict[str, Any], options: Refit, work: Path) -> Refitted:
    """Refit the FFNs of `source`, of which `config` is the converted config.json; keeps what is done in `work`.

    A work folder of the same source and options is gone on with. Runs on the GPU where there is one. Raises
    StochaError for a source that does not infer with its base activation any more or has FFN biases, too few tokens,
    activations that are no numbers, and normal equations without a solution.
    """
    before = source.config.get("stocha") or {}
    if before.get("history") and before["inference"] != before["base"]:
        raise StochaError(
            f"{source.id} was trained or refitted for {before['inference']} already: expected a model that runs "
            f"{before['base']}, the original or one trained with it"
        )
    native = source.config | {source.architecture.act_key: config["stocha"]["base"]}
    tokens = _windows(source.folder, native, options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = Layers(source.folder, native, device)
    if biases := [name for name in layers.tensors.layer(0) if name.startswith("mlp.") and name.endswith(".bias")]:
        raise StochaError(f"{source.id} has {biases[0]} in its FFNs: expected FFNs without biases")
    shares: list[float | None] = [None] * len(layers)
    if options.target_sparsity is not None:
        shares = [*allocate(layers, tokens[:WINDOWS], options.target_sparsity)]
    try:
        _open_work(work, source.folder, native, options)
        streams = Streams(layers, tokens, work if options.on_disk else None)
        fitted = _refit_layers(layers, streams, PASSES * tokens.numel() // BATCH, shares, options.seed, work)
    except (OSError, SafetensorError) as error:
        raise StochaError(
            f"cannot write {work} ({error}): free space and start again with the same command, which goes on from "
            "the finished layers there"
        ) from None
    return Refitted(work, _refitted_config(config, options, tokens.numel(), fitted))


def _refit_layers(
    layers: Layers, streams: Streams, steps: int, shares: list[float | None], seed: int, work: Path
) -> list[tuple[float, float]]:
    """Threshold and held-out error of each layer, whose weights are then in `work`."""
    done = []
    with tqdm(total=len(layers) * (steps + 2 * streams.batches), desc="Refitting", unit="step", disable=None) as bar:
        for index in range(len(layers)):
            with layers.load(index) as layer:
                rows = streams.through_attention(layer, index, bar.update)
                if layer_file(work, index).exists():
                    bar.update(steps)
                else:
                    ffn = FFN(*(getattr(layer.mlp, part).weight for part in PARTS))
                    fitted = refit_ffn(
                        ffn, rows, share=shares[index], steps=steps, seed=seed + index, progress=bar.update
                    )
                    _store(work, index, *fitted)
                ffn, error = _stored(work, index, layers.device)
                streams.through_ffn(layer, rows, ffn, bar.update)
            done.append((ffn.threshold, error))
    return done


def _refitted_config(
    config: dict[str, Any], options: Refit, tokens: int, fitted: list[tuple[float, float]]
) -> dict[str, Any]:
    thresholds, errors = map(list, zip(*fitted, strict=True))
    stage = {
        "method": "refit",
        "data": Path(options.data).name if Path(options.data).exists() else options.data,
        "tokens": tokens,
        "target_sparsity": options.target_sparsity,
        "seed": options.seed,
        "held_out_errors": [round(error, 4) for error in errors],
    }
    stage = {key: value for key, value in stage.items() if value is not None}
    changes: dict[str, Any] = {"history": [*(config["stocha"].get("history") or []), stage]}
    if any(thresholds):
        changes |= {"activation": "fatrelu", "inference": "fatrelu", "threshold": thresholds}
    return config | {"stocha": config["stocha"] | changes}


class Streams:
    """The residual streams of the original (h0) and the converted model (h1) at one depth, for all windows.

    float32 [T, hidden_size] each, on the CPU: in memory, or in files of `work` that are mapped into it.
    """

    def __init__(self, layers: Layers, tokens: torch.Tensor, work: Path | None) -> None:
        self.layers, self.shape = layers, (WINDOWS, tokens.shape[1], -1)
        self.batches = len(tokens) // WINDOWS
        first = layers.embed(tokens[:WINDOWS])
        self.rows_per_batch, size = first.shape[0] * first.shape[1], first.shape[2]
        self.original, self.converted, self.inputs, self.targets = (
            self._allocate(name, tokens.numel(), size, work) for name in ("h0", "h1", "inputs", "targets")
        )
        for part, batch in zip(self._parts(), tokens.split(WINDOWS), strict=True):
            self.original[part] = self.converted[part] = layers.embed(batch).flatten(0, 1).cpu()

    @staticmethod
    def _allocate(name: str, rows: int, size: int, work: Path | None) -> torch.Tensor:
        if work is None:
            return torch.empty(rows, size)
        path = work / f"{name}.stream"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * rows * size)  # a full disk now, not a signal later
        return torch.from_file(str(path), shared=True, size=rows * size, dtype=torch.float32).view(rows, size)

    def _parts(self) -> list[slice]:
        return [slice(i * self.rows_per_batch, (i + 1) * self.rows_per_batch) for i in range(self.batches)]

    @torch.no_grad()
    def through_attention(self, layer: Any, index: int, progress: Callable[[], object]) -> Rows:
        """Move h0 through the whole layer and h1 through its attention; the rows to refit the FFN on."""
        layers, device = self.layers, self.layers.device
        weights = torch.empty(len(self.inputs))
        for part in self._parts():
            before = (stream[part].view(self.shape).to(device) for stream in (self.original, self.converted))
            (h0, n0), (h1, n1) = (layers.attention(layer, index, stream) for stream in before)
            with layers.autocast():
                output = layer.mlp(n0)
                added = layers.after_ffn(layer, output)
            after = h0 + added.float()
            # behind a norm of its own, an FFN cannot be asked to move the stream by a given vector
            drift = MIX * (h0 - h1) if added is output else 0.0
            self.original[part] = after.flatten(0, 1).cpu()
            self.converted[part] = h1.flatten(0, 1).cpu()
            self.inputs[part] = n1.flatten(0, 1).cpu()
            self.targets[part] = (output.float() + drift).flatten(0, 1).cpu()
            weights[part] = 1 / after.square().mean(-1).flatten().clamp(min=1e-12).cpu()
            progress()
        if not (self.targets.isfinite().all() and weights.isfinite().all() and self.inputs.isfinite().all()):
            raise StochaError(
                f"layer {index} computes values that are no numbers on the calibration text: expected a model that "
                "runs in float32; check the source's weights"
            )
        return Rows(*(tensor.to(device) for tensor in (self.inputs, self.targets, weights / weights.mean())))

    @torch.no_grad()
    def through_ffn(self, layer: Any, rows: Rows, ffn: FFN, progress: Callable[[], object]) -> None:
        """Move h1 through the refitted FFN."""
        for part in self._parts():
            with self.layers.autocast():
                output = self.layers.after_ffn(layer, ffn(rows.inputs[part]))
            self.converted[part] += output.float().cpu()
            progress()


def layer_file(work: Path, index: int) -> Path:
    return work / f"layer-{index:03d}.safetensors"


def _store(work: Path, index: int, ffn: FFN, error: float) -> None:
    path = layer_file(work, index)
    partial = path.with_suffix(".partial")
    matrices = {part: matrix.cpu() for part, matrix in zip(PARTS, (ffn.gate, ffn.up, ffn.down), strict=True)}
    save_file(matrices, partial, {"threshold": repr(ffn.threshold), "error": repr(error)})
    partial.rename(path)


def _stored(work: Path, index: int, device: str) -> tuple[FFN, float]:
    with safe_open(layer_file(work, index), framework="pt", device=device) as stored:
        figures = stored.metadata()
        gate, up, down = (stored.get_tensor(part) for part in PARTS)
    return FFN(gate, up, down, float(figures["threshold"])), float(figures["error"])


def _open_work(work: Path, folder: Path, config: dict[str, Any], options: Refit) -> None:
    """Empty the work folder of another source or other options."""
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    told = json.dumps([config, files, asdict(options)], sort_keys=True)
    key, note = hashlib.sha256(told.encode()).hexdigest(), work / "key"
    work.mkdir(parents=True, exist_ok=True)
    if not note.exists() or note.read_text() != key:
        for path in work.iterdir():
            path.unlink()
        note.write_text(key)


def _windows(folder: Path, config: dict[str, Any], options: Refit) -> torch.Tensor:
    """Token ids [windows, length]. Raises StochaError where the data has too few of them."""
    width = config["intermediate_size"]
    length = min(WINDOW, config.get("max_position_embeddings") or WINDOW)
    needed, wanted = LEAST_PER_NEURON * width, options.tokens or max(TOKENS, TOKENS_PER_NEURON * width)
    if wanted < needed:
        raise StochaError(
            f"{wanted} calibration tokens are too few for FFNs of width {width}: expected at least {needed}, "
            f"{LEAST_PER_NEURON} a neuron"
        )
    windows = calibration_windows(options.data, folder, wanted, length, options.seed)
    windows = windows[: len(windows) // WINDOWS * WINDOWS]
    if windows.numel() < needed:
        raise StochaError(
            f"{options.data} has {windows.numel()} tokens in whole batches of {WINDOWS} windows of {length}: expected "
            f"at least {needed} for FFNs of width {width}, {LEAST_PER_NEURON} a neuron"
        )
    return windows
