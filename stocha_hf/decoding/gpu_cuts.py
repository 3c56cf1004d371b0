"""Launches of a GPU step's products that cut their inputs, for one token (triton_inputs.py), with their buffers.

A product whose tile has no SPLITS reads its matrices whole, where that is the faster way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from stocha_hf.cuts import PROJECTIONS
from stocha_hf.decoding.gpu_tiles import tiles_for
from stocha_hf.decoding.gpu_weights import LayerWeights, Weights
from stocha_hf.decoding.triton_inputs import cut_hidden_kernel, cut_linear_kernel, whole_kernel

PARTS = {"qkv": PROJECTIONS[:3], "o": PROJECTIONS[3:4], "hidden": PROJECTIONS[4:6], "down": PROJECTIONS[6:]}
WARP_LOAD = 512  # bytes that a warp reads of a row at a time


def listed(size: int) -> set[str]:
    """Return the projections that read the rows of kept inputs only, in a model of this hidden size."""
    tiles = tiles_for(1, size)
    return {part for name, parts in PARTS.items() if "SPLITS" in tiles[f"cut {name}"] for part in parts}


class CutProducts:
    """Of one step: lists of the inputs that are kept, parts of sums, which splits of the inputs leave for the last of
    them, and counters of splits.
    """

    def __init__(
        self, weights: Weights, tiles: dict[str, dict[str, int]], early: bool, options: dict[str, Any]
    ) -> None:
        self.eps, self.early, self.options = weights.eps, early, options
        layer, heads, like = weights.layers[0], weights.heads * weights.head_dim, weights.embedding
        width, size = layer.gate.shape
        rows = {"qkv": [len(part) for part in layer.qkv], "o": [size], "hidden": [width, width], "down": [size]}
        inputs = {"qkv": size, "o": heads, "hidden": size, "down": width}
        self.tiles = {
            name: _tile(tiles[f"cut {name}"], inputs[name], rows[name], like.element_size()) for name in PARTS
        }
        lists, parts = [1], [1]
        for name, tile in self.tiles.items():
            if "SPLITS" in tile:
                blocks = sum(triton.cdiv(each, tile["BLOCK"]) for each in rows[name])
                lists.append(blocks * tile["SPLITS"] * tile["ROOM"])
                parts.append(tile["SPLITS"] * sum(rows[name]))
        self.lists = like.new_empty(max(lists), dtype=torch.int64)
        self.parts = like.new_empty(max(parts), dtype=torch.float32)
        self.arrived = like.new_zeros(max(map(sum, rows.values())), dtype=torch.int32)

    def qkv(self, layer: LayerWeights, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = the three projections of x's norm, side by side."""
        self._linear("qkv", layer, layer.qkv, layer.qkv_bias, x, layer.input_norm, x, out)

    def o(self, layer: LayerWeights, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """out = residual + o x + its bias."""
        bias = None if layer.o_bias is None else [layer.o_bias]
        self._linear("o", layer, [layer.o], bias, x, None, residual, out)

    def down(self, layer: LayerWeights, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """out = residual + down x."""
        self._linear("down", layer, [layer.down], None, x, None, residual, out)

    def _linear(
        self, name: str, layer: LayerWeights, matrices: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None,
        x: torch.Tensor, norm: torch.Tensor | None, residual: torch.Tensor, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """`matrices` lie an output a row."""
        cuts, tile, size = [layer.cuts[part] for part in PARTS[name]], self.tiles[name], x.shape[-1]
        first, second, _ = rows = _three([len(part) for part in matrices])
        limits, has_norm = _three([cut.threshold for cut in cuts]), norm is not None
        sizes = (*limits, first, second, out.shape[-1])
        flags = (size, triton.next_power_of_2(size), len(cuts), has_norm, biases is not None, not has_norm, self.early)
        given = x, x if norm is None else norm, self.eps
        ends = _three(biases or matrices)
        if "SPLITS" in tile:
            blocks = triton.cdiv(out.shape[-1], tile["BLOCK"])
            cut_linear_kernel[(blocks, tile["SPLITS"])](
                *given, *_three([cut.weight for cut in cuts]), *ends, residual, self.lists, self.parts, self.arrived,
                out, *sizes, *flags, **tile, **self.options,
            )  # fmt: skip
        else:
            whole_kernel[(triton.cdiv(sum(rows), tile["ROWS"]),)](
                *given, *_three(matrices), *ends, residual, out, *sizes, 0.0, "", *flags, **tile, **self.options
            )

    def hidden(self, layer: LayerWeights, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = act(gate norm(x)) * (up norm(x))."""
        gate, up = (layer.cuts[part] for part in PARTS["hidden"])
        tile, (width, size) = self.tiles["hidden"], layer.gate.shape
        given, all = (x, layer.ffn_norm, self.eps), triton.next_power_of_2(size)
        limits = gate.threshold, up.threshold
        if "SPLITS" in tile:
            cut_hidden_kernel[(triton.cdiv(width, tile["BLOCK"]), tile["SPLITS"], 2)](
                *given, gate.weight, up.weight, self.lists, self.parts, self.arrived, out, *limits, layer.cut, width,
                layer.activation, size, all, self.early, **tile, **self.options,
            )  # fmt: skip
        else:
            matrices = layer.gate, layer.up, layer.up
            whole_kernel[(triton.cdiv(width, tile["ROWS"]),)](
                *given, *matrices, *matrices, x, out, *limits, 0.0, width, 0, width, layer.cut, layer.activation, size,
                all, 2, True, False, False, self.early, **tile, **self.options,
            )  # fmt: skip


def _three(given: Sequence[Any]) -> list[Any]:
    """Three in the place of one or two, of which a kernel does not read the last ones."""
    return [*given, *[given[-1]] * 2][:3]


def _tile(tile: dict[str, int], inputs: int, rows: Sequence[int], itemsize: int) -> dict[str, Any]:
    """How a product of matrices with so many rows each, which are outputs, is divided."""
    divided = "BLOCK" if "SPLITS" in tile else "ROWS"
    tile = dict(tile)
    while any(each % tile[divided] for each in rows[:-1]):
        tile[divided] //= 2
    if divided == "ROWS":
        return tile | {"BLOCK": min(tile["BLOCK"], triton.next_power_of_2(inputs))}
    block, splits = tile["BLOCK"], tile["SPLITS"]
    return tile | {
        "EVEN": all(each % block == 0 for each in rows),
        "ROOM": triton.next_power_of_2(triton.cdiv(inputs, splits)),
        "ALL_SPLITS": triton.next_power_of_2(splits),
        "ROWS": max(1, tile["num_warps"] * WARP_LOAD // (block * itemsize)),
    }
