"""The residual streams of the original and the converted model, side by side at one depth, for all calibration text.

A refit moves both through the layers one after the other (refit.py says why).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stocha_hf.conversion.layerwise import Layers, autocast
from stocha_hf.conversion.refit_ffn import FFN, Rows
from stocha_hf.errors import StochaError

KEPT = "streams.safetensors"
MIX = 0.7  # share of the streams' distance that a layer's target undoes
WINDOWS = 8  # in a batch


def kept_shares(path: Path) -> list[float | None]:
    """The shares of zeros that a file of streams was kept with."""
    with safe_open(path, framework="pt") as kept:
        return json.loads(kept.metadata()["shares"])


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

    def keep(self, path: Path, layers: int, shares: Sequence[float | None]) -> None:
        """Write the streams to a file, for a run that goes on after so many layers; nothing where there is no room."""
        partial = path.with_suffix(".partial")
        told = {"layers": str(layers), "shares": json.dumps(shares)}
        try:
            save_file({"original": self.original, "converted": self.converted}, partial, told)
            partial.rename(path)
        except (OSError, SafetensorError):
            partial.unlink(missing_ok=True)

    def go_on(self, path: Path) -> int:
        """Take the streams that were kept in a file; return the number of layers that they have passed."""
        with safe_open(path, framework="pt") as kept:
            self.original.copy_(kept.get_tensor("original"))
            self.converted.copy_(kept.get_tensor("converted"))
            return int(kept.metadata()["layers"])

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
            with autocast(device):
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
                f"layer {index} computes values that are not finite on the calibration text: expected a model that "
                "runs in float32; check the source's weights"
            )
        return Rows(*(tensor.to(device) for tensor in (self.inputs, self.targets, weights / weights.mean())))

    @torch.no_grad()
    def through_ffn(self, layer: Any, rows: Rows, ffn: FFN, progress: Callable[[], object]) -> None:
        """Move h1 through the refitted FFN."""
        for part in self._parts():
            with autocast(self.layers.device):
                output = self.layers.after_ffn(layer, ffn(rows.inputs[part]))
            self.converted[part] += output.float().cpu()
            progress()
