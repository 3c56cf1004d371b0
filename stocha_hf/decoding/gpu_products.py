"""Launches of a GPU step's products that cut no inputs, with their buffers: of matrices, and of rows of neurons.

They run the kernels of triton_products.py; for more than two tokens the FFN's of triton_several.py, by tensor cores;
where gates are predicted, for one token, those of triton_prediction.py. gpu_cuts.py launches those that cut.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from stocha_hf.decoding.gpu_weights import LayerWeights, Weights
from stocha_hf.decoding.packed_gate import PackedGate
from stocha_hf.decoding.triton_prediction import list_kernel, listed_kernel
from stocha_hf.decoding.triton_products import down_kernel, hidden_kernel, linear_kernel
from stocha_hf.decoding.triton_several import several_hidden_kernel


class WholeProducts:
    """Of one step of `count` tokens: lists of active neurons, parts of sums, which splits of the sparse down product
    leave for the last of them, and counters of splits.
    """

    def __init__(
        self, weights: Weights, count: int, tiles: dict[str, dict[str, int]], early: bool, options: dict[str, Any]
    ) -> None:
        self.count, self.tiles, self.early, self.options = count, tiles, early, options
        self.by_tensor_cores = count > 2  # for 2 tokens multiply-adds are faster
        self.eps, self.head_dim = weights.eps, weights.head_dim
        (self.width, self.size), new = weights.layers[0].gate.shape, weights.embedding.new_empty
        down = self.tiles["down"]
        self.blocks = triton.cdiv(self.size, down["BLOCK"])
        self.splits = triton.next_power_of_2(max(1, min(down["PROGRAMS"] // self.blocks, self.width // down["TILE"])))
        self.share = triton.cdiv(self.width, self.splits)
        self.listed = new(self.splits * self.blocks, triton.next_power_of_2(self.share), dtype=torch.int32)
        self.parts = new(self.splits, count, self.size, dtype=torch.float32)
        self.arrived = new(self.blocks, dtype=torch.int32).zero_()
        self.candidates = new(self.width, dtype=torch.int32)

    def tile(self, name: str, size: int, divides: int = 0) -> dict[str, Any]:
        """How a product is tiled, for rows of this size, of which there are so many, or any number."""
        tile = self.tiles[name]
        rows = tile.get("ROWS", 1)
        while divides % rows:
            rows //= 2
        columns = {key: min(tile[key], triton.next_power_of_2(size)) for key in ("BLOCK", "UP") if key in tile}
        return tile | ({"ROWS": rows} if "ROWS" in tile else {}) | columns | self.options

    def qkv(self, layer: LayerWeights, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = the three projections of x's norm, side by side."""
        q, k, v = layer.qkv
        tile = self.tile("qkv", self.size, divides=self.head_dim)
        biases = layer.qkv_bias or layer.qkv
        linear_kernel[(triton.cdiv(out.shape[1], tile["ROWS"]),)](
            x, layer.input_norm, self.eps, q, k, v, *biases, x, out, len(q), len(k), out.shape[1], self.size,
            self.count, 3, True, layer.qkv_bias is not None, False, self.by_tensor_cores, self.early, **tile,
        )  # fmt: skip

    def o(self, layer: LayerWeights, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """out = residual + o x + its bias."""
        self._add(layer.o, layer.o_bias, x, residual, out, "o")

    def down(self, layer: LayerWeights, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """out = residual + down x."""
        self._add(layer.down, None, x, residual, out, "dense down")

    def _add(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, residual: torch.Tensor,
        out: torch.Tensor, name: str,
    ) -> None:  # fmt: skip
        """out = residual + W x + bias."""
        rows, size = weight.shape
        tile = self.tile(name, size)
        linear_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x, x, 0.0, weight, weight, weight, *[either(bias, weight)] * 3, residual, out, 0, 0, rows, size,
            self.count, 1, False, bias is not None, True, self.by_tensor_cores, self.early, **tile,
        )  # fmt: skip

    def hidden(self, layer: LayerWeights, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = act(gate norm(x)) * (up norm(x)), where down is sparse of the neurons that act leaves."""
        is_sparse = layer.down_t is not None
        tile = self.tile("hidden" if is_sparse else "dense", self.size)
        kernel = several_hidden_kernel if self.by_tensor_cores else hidden_kernel
        kernel[(triton.cdiv(self.width, tile["ROWS"]),)](
            x, layer.ffn_norm, self.eps, layer.gate, layer.up, out, layer.cut, self.width, layer.activation,
            is_sparse, self.size, self.count, self.early, **tile,
        )  # fmt: skip

    def predicted(
        self, layer: LayerWeights, coarse: PackedGate, count: torch.Tensor, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        """The same of the neurons that the gate's 4-bit copy lists; `count` gets how many these are."""
        tile = self.tiles["list"]
        list_kernel[(triton.cdiv(self.width, tile["TOTAL"]),)](
            x, layer.ffn_norm, self.eps, coarse.codes, coarse.steps, coarse.slack, out, self.candidates, count,
            layer.cut, self.width, self.size, self.early, _has_dp4a(x), BLOCK=triton.next_power_of_2(self.size // 8),
            **tile, **self.options,
        )  # fmt: skip
        tile = self.tile("listed", self.size)
        listed_kernel[(min(tile.pop("PROGRAMS"), self.width),)](
            x, layer.ffn_norm, self.eps, layer.gate, layer.up, out, self.candidates, count, layer.cut,
            layer.activation, self.size, self.early, **tile,
        )  # fmt: skip

    def sparse_down(
        self, down_t: torch.Tensor, threshold: float, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor
    ) -> None:
        """out = residual + down x, by rows of neurons above the threshold."""
        tile = {name: value for name, value in self.tiles["down"].items() if name != "PROGRAMS"}
        down_kernel[(self.blocks, self.splits)](
            x, down_t, residual, self.listed, self.parts, self.arrived, out, threshold, self.width, self.share,
            self.size, self.count, self.splits, triton.next_power_of_2(self.share), self.early, **tile,
            **self.options,
        )  # fmt: skip


def either(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel's pointer that it does not read where there is no tensor."""
    return other if tensor is None else tensor


def _has_dp4a(like: torch.Tensor) -> bool:
    """Whether the GPU multiplies four bytes by four in one instruction: each of Nvidia's that Triton compiles for."""
    return like.is_cuda and torch.version.cuda is not None
