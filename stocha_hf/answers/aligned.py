"""A KV cache of a few texts that all end at its last place, so that the CPU's kernels compute their step in one call.

The kernels write a step's tokens of all rows at one place and know padding on the left (decoding/step.py). So a text
that joins is put to the end of what the cache holds, and what lies before its first token is hidden. Places that no
text needs any more are dropped. Larger batches, and those on a GPU, have slots of their own length (slots.py).

    cache = AlignedCache(rows=8)
    cache.put(slots, prefilled, lengths)
    cache.aim(positions, ahead=8)
    model(ids[:, None], **cache.arguments(model.config, model.dtype))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

PLACES = 64  # so many that no text needs are dropped at a time


class AlignedCache:
    """Keys and values of `rows` texts in a DynamicCache, the last token of each at its last place."""

    def __init__(self, rows: int) -> None:
        self.cache = DynamicCache()
        self.count = rows
        self.positions = torch.zeros(rows, dtype=torch.int64)

    def aim(self, positions: list[int], ahead: int) -> None:
        """Let the next steps continue texts of so many tokens, of which the cache may drop what none of them has."""
        self.positions = torch.tensor(positions)
        spare = self.cache.get_seq_length() - max(positions)
        if spare >= PLACES:
            layers: list[Any] = self.cache.layers
            for layer in layers:
                layer.keys, layer.values = layer.keys[:, :, spare:], layer.values[:, :, spare:]

    def advance(self) -> None:
        """Count the token that a step has written to each row."""
        self.positions = self.positions + 1

    def put(self, slots: torch.Tensor, prefilled: DynamicCache, lengths: Sequence[int]) -> None:
        """Let these rows hold prompts of so many tokens, which `prefilled` has padded on the right."""
        layers: list[Any] = prefilled.layers  # some kinds of layers hold no keys, but whole ones do
        for index, new in enumerate(layers):
            if index == len(self.cache.layers):
                empty = new.keys.new_zeros(self.count, new.keys.shape[1], 0, new.keys.shape[3])
                self.cache.update(empty, empty.clone(), index)
            layer: Any = self.cache.layers[index]
            missing = max(max(lengths) - layer.keys.shape[2], 0)
            layer.keys, layer.values = (F.pad(part, (0, 0, missing, 0)) for part in (layer.keys, layer.values))
            end = layer.keys.shape[2]
            for row, (slot, length) in enumerate(zip(slots.tolist(), lengths, strict=True)):
                layer.keys[slot, :, end - length :] = new.keys[row, :, :length]
                layer.values[slot, :, end - length :] = new.values[row, :, :length]

    def keep(self, slots: torch.Tensor) -> None:
        """Forget all rows but these."""
        self.cache.batch_select_indices(slots)
        self.count = len(slots)

    def arguments(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Return what a model's step of one token a row takes beside the tokens."""
        length = self.cache.get_seq_length() + 1
        seen = torch.arange(length) >= length - 1 - self.positions[:, None]
        return {
            "attention_mask": seen.to(torch.int64),
            "position_ids": self.positions[:, None],
            "past_key_values": self.cache,
            "use_cache": True,
        }
