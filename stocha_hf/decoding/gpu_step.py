"""A whole decode step on a GPU, for 1 to 16 tokens of one sequence: five kernels a layer, recorded as one CUDA graph.

    layer   norm, q, k, v | attention | o, residual | norm, gate, up | down, residual
    ends    embedding and angles | ... | norm, lm_head | of one token: the most likely next, with which it goes on

The step reads weights where the model has them, and keys and values at addresses that stand in a table on the GPU: so
one graph serves any cache. A kernel starts while the one before it ends (triton_products.py). gpu_products.py launches
the products, gpu_cuts.py those that cut their inputs.

    step = GpuStep(weights)                  # gpu_plan.py takes them from a model
    step.use(keys, values)                   # of each layer, [key heads, room, head_dim]
    step.set(position=512, length=512)
    step.tokens.copy_(token)
    step.replay()                            # logits in step.logits; the most likely token is the next step's
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from stocha_hf.decoding.gpu_cuts import CutProducts
from stocha_hf.decoding.gpu_products import WholeProducts, either
from stocha_hf.decoding.gpu_tiles import tiles_for
from stocha_hf.decoding.gpu_weights import LayerWeights, Weights
from stocha_hf.decoding.triton_attention import attention_kernel
from stocha_hf.decoding.triton_ends import embed_kernel, head_kernel, next_kernel
from stocha_hf.decoding.triton_several import several_head_kernel

LEAST = 16  # rows or columns of a tile that tensor cores take
SLOTS = 64  # of maxima, which the head's programs share
RING = 64  # the last tokens that are kept


class GpuStep:
    """The buffers and the graph of one model's steps of so many tokens, a power of two.

    `tokens` int64 [tokens] is what a step reads, `logits` float32 [tokens, vocabulary] what it finds. With one token,
    `chosen` int64 [RING], in the host's memory, gets the most likely tokens by their places in the cache, counted
    round and round: a host that waits for one asks nothing of the GPU.
    """

    def __init__(
        self,
        weights: Weights,
        tokens: int = 1,
        tiles: dict[str, dict[str, int]] | None = None,
        early: bool = True,
        cuts: bool = True,
    ) -> None:
        self.weights, self.count = weights, tokens
        self.graph: torch.cuda.CUDAGraph | None = None
        self.early = early and _can_start_early(weights.embedding)
        self.options: dict[str, Any] = {"launch_pdl": True} if self.early else {}
        self.vocabulary, self.size = weights.head.shape
        self.tiles = tiles_for(tokens, self.size) | (tiles or {})
        self.half = weights.head_dim // 2
        self.columns = max(LEAST, triton.next_power_of_2(self.half))
        self.group = triton.next_power_of_2(tokens * weights.heads // weights.key_heads)
        self._allocate(weights.embedding.new_empty)
        self.whole = WholeProducts(weights, tokens, self.tiles, self.early, self.options)
        cuts = cuts and tokens == 1 and any(layer.cuts for layer in weights.layers)
        self.cut = CutProducts(weights, self.tiles, self.early, self.options) if cuts else None

    def _allocate(self, new: Callable[..., torch.Tensor]) -> None:
        """What the kernels hand on, and what a host reads and writes."""
        weights, count = self.weights, self.count
        rows = (weights.heads + 2 * weights.key_heads) * weights.head_dim
        self.x, self.middle = new(count, self.size), new(count, self.size)
        self.qkv, self.attended = new(count, rows), new(count, weights.heads * weights.head_dim)
        self.hidden, self.angles = new(count, len(weights.layers[0].gate)), new(count, 2, self.half)
        self.counts = new(len(weights.layers), 4, dtype=torch.int32).zero_()  # of neurons that may be active
        self.state = new(3 + count, dtype=torch.int64).zero_()
        self.tokens = self.state[3:]
        self.table = new(len(weights.layers), 4, dtype=torch.int64).zero_()
        self.logits = new(count, self.vocabulary, dtype=torch.float32)
        self.listed_tokens: torch.Tensor | None = None  # a draft's (gpu_draft.py)
        self.best = new(SLOTS, dtype=torch.int64).fill_(-(2**63))
        self.chosen = torch.zeros(RING, dtype=torch.int64, pin_memory=self.x.is_cuda)
        self.arrived = new(weights.key_heads, dtype=torch.int32).zero_()  # splits of attention, and what they leave:
        each = weights.key_heads * self.tiles["attention"]["SPLITS"] * self.group
        self.maxima, self.sums = new(each, dtype=torch.float32), new(each, dtype=torch.float32)
        self.values = new(each, 2 * self.columns, dtype=torch.float32)

    def use(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Let the next steps read and write these: of each layer, [key heads, room, head_dim], rows contiguous."""
        rows = [[k.data_ptr(), v.data_ptr(), k.stride(0), 0] for k, v in zip(keys, values, strict=True)]
        self.table.copy_(torch.tensor(rows))

    def set(self, position: int, length: int, start: int = 0, tokens: Sequence[int] = ()) -> None:
        """Say where the next step is: its first token's position, and `length` tokens in the cache, `start` of which
        are padding; and its first tokens, where they are known.
        """
        self.state[: 3 + len(tokens)].copy_(torch.tensor([position, length, start, *tokens]))

    def replay(self) -> None:
        """Compute a step: its logits, and the most likely token, which becomes the next step's."""
        if self.graph is None:
            self.record()
        with torch.cuda.device(self.state.device):
            self.graph.replay()  # type: ignore[union-attr]

    def record(self) -> None:
        """Build the kernels and record them as a graph, for any cache."""
        with torch.cuda.device(self.state.device), torch.inference_mode(False), torch.no_grad():
            saved = self.state.clone(), self.table.clone()
            room = self.x.new_zeros(2, self.weights.key_heads, self.count, self.weights.head_dim)
            self.use([room[0]] * len(self.weights.layers), [room[1]] * len(self.weights.layers))
            self.state.zero_()
            self.launch()  # compiles
            self.state.copy_(saved[0])
            self.table.copy_(saved[1])
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may use the GPU meanwhile
                self.launch()
            self.graph = graph

    def launch(self) -> None:
        """Launch a step's kernels on the current stream."""
        weights, size = self.weights, self.size
        embed_kernel[(self.count,)](
            self.state, weights.embedding, weights.frequencies, weights.rotary_scaling, self.x, self.angles,
            self.counts, self.counts.numel(), triton.next_power_of_2(self.counts.numel()), size,
            triton.next_power_of_2(size), self.half, triton.next_power_of_2(self.half), num_warps=8,
        )  # fmt: skip
        for layer, table, count in zip(weights.layers, self.table, self.counts, strict=True):
            self._qkv(layer)
            self._attention(layer, table)
            self._o(layer)
            self._ffn(layer, count)
        self._head()
        if self.count == 1:
            self._next()

    def _head(self) -> None:
        weights, tile = self.weights, self.whole.tile("head", self.size)
        rows, has_bias = self.logits.shape[1], weights.head_bias is not None
        grid = (triton.cdiv(rows, tile["ROWS"]),)
        given = (self.x, weights.norm, weights.eps, weights.head, either(weights.head_bias, weights.norm), self.logits)
        sizes = (rows, self.size, self.count, has_bias)
        if self.whole.by_tensor_cores:
            several_head_kernel[grid](*given, *sizes, self.early, **tile)
        else:
            listed = either(self.listed_tokens, self.state)
            is_listed = self.listed_tokens is not None
            head_kernel[grid](*given, self.best, listed, *sizes, SLOTS, is_listed, self.early, **tile)

    def _next(self) -> None:
        next_kernel[(1,)](self.best, self.state, self.chosen, SLOTS, RING, self.early, num_warps=1, **self.options)

    def _qkv(self, layer: LayerWeights) -> None:
        by = self.cut if self.cut is not None and "q_proj" in layer.cuts else self.whole
        by.qkv(layer, self.x, self.qkv)

    def _attention(self, layer: LayerWeights, table: torch.Tensor) -> None:
        weights, tile = self.weights, self.tiles["attention"]
        norms = layer.head_norms or (self.angles, self.angles)
        attention_kernel[(weights.key_heads, tile["SPLITS"])](
            self.qkv, *norms, self.angles, self.state, table, self.maxima, self.sums, self.values, self.arrived,
            self.attended, layer.scaling, weights.eps, layer.window, self.count, weights.heads, weights.key_heads,
            self.half, self.columns, self.group, max(LEAST, self.group), layer.head_norms is not None, self.early,
            **tile, **self.options,
        )  # fmt: skip

    def _o(self, layer: LayerWeights) -> None:
        by = self.cut if self.cut is not None and "o_proj" in layer.cuts else self.whole
        by.o(layer, self.attended, self.x, self.middle)

    def _ffn(self, layer: LayerWeights, count: torch.Tensor) -> None:
        if self.cut is not None and "gate_proj" in layer.cuts:
            self.cut.hidden(layer, self.middle, self.hidden)
        elif layer.coarse is None or self.count > 1:  # several tokens would list most neurons
            self.whole.hidden(layer, self.middle, self.hidden)
        else:
            self.whole.predicted(layer, layer.coarse, count, self.middle, self.hidden)
        down = None if self.cut is None else layer.cuts.get("down_proj")
        if layer.down_t is not None:
            threshold = 0.0 if down is None else down.threshold
            self.whole.sparse_down(layer.down_t, threshold, self.hidden, self.middle, self.x)
        elif self.cut is not None and down is not None:
            self.cut.down(layer, self.hidden, self.middle, self.x)
        else:
            self.whole.down(layer, self.hidden, self.middle, self.x)


def _can_start_early(like: torch.Tensor) -> bool:
    """Whether a kernel's programs can start while the kernel before it ends: from Hopper on."""
    return like.is_cuda and torch.version.cuda is not None and torch.cuda.get_device_capability(like.device)[0] >= 9
