"""Launches of a GPU step's products that cut their inputs, for one token (triton_inputs.py), with their buffers."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton

from stocha_hf.decoding.gpu_weights import CutWeights, LayerWeights, Weights
from stocha_hf.decoding.triton_inputs import cut_hidden_kernel, cut_linear_kernel


class CutProducts:
    """Of one step: parts of sums, which splits of the inputs leave for the last of them, and counters of splits."""

    def __init__(
        self, weights: Weights, tiles: dict[str, dict[str, int]], early: bool, options: dict[str, Any]
    ) -> None:
        self.eps, self.tiles, self.early, self.options = weights.eps, tiles, early, options
        layer, new = weights.layers[0], weights.embedding.new_empty
        (width, size), rows = layer.gate.shape, sum(map(len, layer.qkv))
        most = {"cut qkv": rows, "cut o": size, "cut hidden": 2 * width, "cut down": size}
        self.parts = new(max(tiles[name]["SPLITS"] * each for name, each in most.items()), dtype=torch.float32)
        self.arrived = new(max(most.values()), dtype=torch.int32).zero_()

    def qkv(self, layer: LayerWeights, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = the three projections of x's norm, side by side."""
        parts = [layer.cuts[name] for name in ("q_proj", "k_proj", "v_proj")]
        first, second = (part.weight.shape[1] for part in parts[:2])
        self._linear(parts, layer.qkv_bias, x, layer.input_norm, x, out, "cut qkv", gcd(first, second))

    def add(
        self, part: CutWeights, bias: torch.Tensor | None, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor,
        name: str,
    ) -> None:  # fmt: skip
        """out = residual + W x + bias."""
        self._linear([part] * 3, None if bias is None else [bias] * 3, x, None, residual, out, f"cut {name}", 0)

    def _linear(
        self, parts: list[CutWeights], biases: Any, x: torch.Tensor, norm: torch.Tensor | None,
        residual: torch.Tensor, out: torch.Tensor, name: str, divides: int,
    ) -> None:  # fmt: skip
        is_one, rows, size = norm is None, out.shape[-1], x.shape[-1]
        matrices, cuts = [part.weight for part in parts], [part.threshold for part in parts]
        tile = dict(self.tiles[name])
        while divides % tile["BLOCK"]:
            tile["BLOCK"] //= 2
        first, second = (rows, 0) if is_one else (matrices[0].shape[1], matrices[1].shape[1])
        cut_linear_kernel[(triton.cdiv(rows, tile["BLOCK"]), tile["SPLITS"])](
            x, x if norm is None else norm, self.eps, *matrices, *(biases or matrices), residual, self.parts,
            self.arrived, out, *cuts, first, second, rows, size, triton.next_power_of_2(size), 1 if is_one else 3,
            not is_one, biases is not None, is_one, self.early, **tile, **self.options,
        )  # fmt: skip

    def hidden(self, layer: LayerWeights, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = act(gate norm(x)) * (up norm(x))."""
        gate, up = layer.cuts["gate_proj"], layer.cuts["up_proj"]
        tile, (size, width) = self.tiles["cut hidden"], gate.weight.shape
        cut_hidden_kernel[(triton.cdiv(width, tile["BLOCK"]), tile["SPLITS"], 2)](
            x, layer.ffn_norm, self.eps, gate.weight, up.weight, self.parts, self.arrived, out, gate.threshold,
            up.threshold, layer.cut, width, layer.activation, size, triton.next_power_of_2(size), self.early, **tile,
            **self.options,
        )  # fmt: skip
