"""Refit: a ReLU conversion without training. Layer by layer, each FFN is fitted to what the original model computes.

Swapping SiLU for ReLU breaks a model. Here calibration text runs through the original model (stream h0) and through
the converted one (stream h1) side by side, one layer in memory at a time. For each layer the FFN, fed with h1, is
refitted (refit_ffn.py) so that the stream after it returns to h0: target = FFN_0(h0) + MIX * (h0 - h1), both
streams after attention. MIX = 1 would undo all drift at once, 0 ignores it. A token's error counts relative to the
mean square of its stream, which the next norm divides by. Nothing is backpropagated through the model.

From folder to folder, a finished layer is written (refit_store.py) to a work folder beside the output (refit_work.py),
and every minute the streams are, so that a killed run goes on there and ends with the same weights. refit_model.py
refits a model in memory.

    stocha-convert SOURCE OUTPUT --activation relu --refit DATA [--target-sparsity 0.8]
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from stocha_hf.checkpoints.entry import read_entry, with_entry, with_stage
from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.checkpoints.names import public_name
from stocha_hf.checkpoints.quantized import refuse_quantized
from stocha_hf.checkpoints.tensors import Tensors
from stocha_hf.conversion.layerwise import Layers
from stocha_hf.conversion.refit_ffn import BATCH, FFN, PARTS, Fitted, refit_ffn
from stocha_hf.conversion.refit_shares import allocate
from stocha_hf.conversion.refit_store import LayerFiles, Store
from stocha_hf.conversion.refit_streams import KEPT, WINDOWS, Streams
from stocha_hf.conversion.refit_work import Refit, layers_folder
from stocha_hf.conversion.source import Source
from stocha_hf.cuts import LEARNED_INPUTS
from stocha_hf.data import calibration_windows
from stocha_hf.errors import StochaError
from stocha_hf.progress import Progress
from stocha_hf.spec import StochaConfig

DEFAULT_TOKENS = 98_304  # or TOKENS_PER_NEURON x the FFN's width if that is more
TOKENS_PER_NEURON = 8
LEAST_PER_NEURON = 4  # with fewer, the normal equations fit noise
WINDOW = 1024  # tokens
KEEP_EVERY = 60  # seconds
PASSES = 2  # over the tokens, for the local fit


class Figures(NamedTuple):
    """Of a finished layer: its threshold, and the error and share of zeros of its FFN on held-out text."""

    threshold: float
    error: float
    zeros: float

    @classmethod
    def of(cls, fitted: Fitted) -> Figures:
        return cls(fitted.ffn.threshold, fitted.error, fitted.zeros)


@dataclass(frozen=True)
class Refitted:
    """The result: the converted model's config.json, and the new FFN weights by layer."""

    layers: LayerFiles
    config: dict[str, Any]

    def apply_to(self, checkpoint: Path) -> None:
        """Overwrite the FFN weights of a copy of the source."""
        tensors = Tensors(checkpoint)
        for index in range(self.config["num_hidden_layers"]):
            names, ffn = tensors.layer(index), self.layers[index].ffn
            for part, matrix in ffn.parts.items():
                tensors.overwrite(names[f"mlp.{part}.weight"], matrix)


def refit_checkpoint(source: Source, config: dict[str, Any], options: Refit, work: Path) -> Refitted:
    """Refit the FFNs of `source`, of which `config` is the converted config.json; keeps what is done in `work`.

    Layers of the same source, text and options that are in `work` are taken from there. Runs on the GPU where there is
    one. Raises StochaError for a source that does not infer with its base activation any more or has FFN biases, too
    few tokens, activations that are not finite, and normal equations without a solution.
    """
    refuse_quantized(source.config, source.id, "a refit")
    if "stocha" in source.config:
        check_original(read_entry(source.config, source.id), source.id)
    native = source.config | {source.architecture.act_key: config["stocha"]["base"]}
    length = min(WINDOW, config.get("max_position_embeddings") or WINDOW)
    windows = calibration_windows(
        options.data, source.folder, wanted_tokens(options, native, length), length, options.seed
    )
    tokens = whole_batches(windows, native, str(options.data))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = Layers(Tensors(source.folder), native, device)
    try:
        folder = layers_folder(work, _key(source, native, options, tokens))
        store = LayerFiles(folder, device)
        figures = refit_layers(layers, tokens, options, store, folder)
    except (OSError, SafetensorError) as error:
        raise StochaError(
            f"cannot write {work} ({error}): free space and start again with the same command, which continues from "
            "the finished layers there"
        ) from error
    stocha = refitted_entry(read_entry(config, source.id), options, tokens.numel(), figures)
    return Refitted(LayerFiles(folder), with_entry(config, stocha))


def check_original(entry: StochaConfig, where: str) -> None:
    fitted = any(stage.get("method") != LEARNED_INPUTS for stage in entry.history or [])
    if fitted and entry.inference != entry.base:
        raise StochaError(
            f"{where} was trained or refitted for {entry.inference} already: expected a model that runs {entry.base}, "
            "the original or one trained with it"
        )


def wanted_tokens(options: Refit, config: dict[str, Any], length: int) -> int:
    """How many tokens of text to refit on, in windows of this length. Raises StochaError for too few."""
    width, batch = config["intermediate_size"], WINDOWS * length
    needed = -(-LEAST_PER_NEURON * width // batch) * batch
    wanted = options.tokens or max(DEFAULT_TOKENS, TOKENS_PER_NEURON * width)
    if wanted < needed:
        raise StochaError(
            f"{wanted} calibration tokens are too few for FFNs of width {width}: expected at least {needed}, "
            f"{LEAST_PER_NEURON} a neuron in whole batches of {WINDOWS} windows of {length}"
        )
    return wanted


def whole_batches(windows: torch.Tensor, config: dict[str, Any], data: str) -> torch.Tensor:
    """Token ids [windows, length] in whole batches. Raises StochaError where they are too few."""
    width, length = config["intermediate_size"], windows.shape[1]
    windows = windows[: len(windows) // WINDOWS * WINDOWS]
    if windows.numel() < (needed := LEAST_PER_NEURON * width):
        raise StochaError(
            f"{data} has {windows.numel()} tokens in whole batches of {WINDOWS} windows of {length}: expected "
            f"at least {needed} for FFNs of width {width}, {LEAST_PER_NEURON} a neuron"
        )
    return windows


def refit_layers(
    layers: Layers, tokens: torch.Tensor, options: Refit, store: Store, work: Path | None = None
) -> list[Figures]:
    """The figures of each layer, whose weights are then in `store`; goes on after what `work` has."""
    layers.check_no_biases()
    kept = work / KEPT if work is not None else None
    streams = Streams(layers, tokens, work if options.on_disk else None)
    finished = next((index for index in range(len(layers)) if index not in store), len(layers))
    resumed = streams.resume(kept, finished) if kept is not None else None
    shares, passed = resumed or (_shares(layers, tokens, options), 0)
    last = time.monotonic()
    steps = PASSES * tokens.numel() // BATCH
    done = []
    with Progress(total=len(layers) * (steps + 2 * streams.batches), desc="Refitting", unit="step") as bar:
        for index in range(len(layers)):
            if index < passed:
                done.append(Figures.of(store[index]))
                bar.update(steps + 2 * streams.batches)
                continue
            with layers.load(index) as layer:
                rows = streams.through_attention(layer, index, bar.update)
                if index in store:
                    bar.update(steps)
                else:
                    ffn, seed = FFN(*(getattr(layer.mlp, part).weight for part in PARTS)), options.seed + index
                    store[index] = refit_ffn(
                        ffn, rows, share=shares[index], steps=steps, seed=seed, progress=bar.update
                    )
                fitted = store[index]
                streams.through_ffn(layer, rows, fitted.ffn, bar.update)
            done.append(Figures.of(fitted))
            if kept is not None and time.monotonic() - last >= KEEP_EVERY:
                streams.keep(kept, index + 1, shares)
                last = time.monotonic()
    return done


def _shares(layers: Layers, tokens: torch.Tensor, options: Refit) -> list[float | None]:
    """The share of zeros to fit each layer for; None for what plain ReLU makes."""
    if options.target_sparsity is None:
        return [None] * len(layers)
    return [*allocate(layers, tokens[:WINDOWS], options.target_sparsity)]


def refitted_entry(entry: StochaConfig, options: Refit, tokens: int, figures: list[Figures]) -> StochaConfig:
    """The entry of a refitted model: what it runs, and one more stage of its history."""
    thresholds = [layer.threshold for layer in figures]
    stage = {
        "method": "refit",
        "data": public_name(str(options.data)),
        "tokens": tokens,
        "target_sparsity": options.target_sparsity,
        "seed": options.seed,
        "zeros": round(statistics.fmean(layer.zeros for layer in figures), 4),
        "held_out_errors": [round(layer.error, 4) for layer in figures],
    }
    if any(thresholds):
        entry = replace(entry, activation="fatrelu", inference="fatrelu", threshold=thresholds)
    return with_stage(entry, stage)


def _key(source: Source, config: dict[str, Any], options: Refit, tokens: torch.Tensor) -> str:
    """A hash of all that decides the refitted layers."""
    text = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    told = json.dumps([config, weights_hash(source.folder), asdict(options), text], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
