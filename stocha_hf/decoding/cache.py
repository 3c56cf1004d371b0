"""A transformers cache as the place where a whole decode step keeps keys and values.

The cache stays what it is: after a step its layers' `keys` and `values` are tensors as they would be. Of a layer that
grows they are views of a larger buffer, so that a token is written behind the others, where transformers copies all of
them each time. A buffer belongs to a layer as long as the layer has the views that were given to it; whatever else
somebody put there, such as other beams, is copied into a new one. Nothing that a view shows is ever written again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from stocha_hf.decoding import structs
from stocha_hf.decoding.plan import Plan

ROOM = 64  # tokens for which a new buffer has room beyond those that it holds, at least


class _GrowingLayer:
    """A DynamicLayer, with a sliding window or without: tokens `begin` to `end` of a buffer are the layer's."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.seen = layer.sliding_window - 1 if layer.is_sliding else None  # tokens that later ones may see
        self._take()

    def _take(self) -> None:
        self.keys, self.values = self.layer.keys, self.layer.values
        self.begin, self.end = 0, self.keys.shape[2]
        self.capacity = self.end  # a tensor of somebody else has no room
        self.shown, self.told = (self.keys, self.values), self.end  # `told`: tokens of the buffer that views show

    def takes(self, new: int, is_padded: bool) -> bool:
        """Return whether new tokens go behind the others, at places that are positions if some begin with padding."""
        if self.seen is None:
            return True
        return not self.layer.record_past and not (is_padded and self.layer.cumulative_length + new - 1 > self.seen)

    def prepare(self, new: int, expected: int) -> bool:
        """Make room for new tokens, and for more if so many are expected; return whether the buffer is another now."""
        if self.layer.keys is not self.shown[0] or self.layer.values is not self.shown[1]:
            self._take()
        if self.end + new <= self.capacity and self.end >= self.told:
            return False
        count = self.end - self.begin
        self.capacity = count + max(new + expected, ROOM, count // 4)
        if self.seen is not None:
            self.capacity = min(self.capacity, 2 * self.seen + ROOM + new)
        self.keys, self.values = (self._moved(part) for part in (self.keys, self.values))
        self.begin, self.end, self.told = 0, count, 0
        return True

    def _moved(self, part: torch.Tensor) -> torch.Tensor:
        shape = list(part.shape)
        shape[2] = self.capacity
        buffer = part.new_empty(shape)
        buffer[:, :, : self.end - self.begin] = part[:, :, self.begin : self.end]
        return buffer

    def advance(self, new: int) -> None:
        self.end += new
        if self.seen is not None:
            self.begin = max(self.begin, self.end - self.seen)
            self.layer.cumulative_length += new

    def most(self, length: int) -> int:
        """Return how many tokens it can forget after a step, of a text of this length: as a cache's Rewindable."""
        held = self.end if self.seen is None else self.layer.cumulative_length
        return length if held == length and (self.seen is None or held - 1 <= self.seen) else 1

    def rewind(self, count: int) -> None:
        """Forget the last tokens, of steps since the buffer was made or no more than `most` says."""
        self.end -= count
        if self.seen is not None:
            self.begin = max(0, self.end - self.seen)
            self.layer.cumulative_length -= count

    def show(self) -> None:
        self.shown = tuple(part[:, :, self.begin : self.end] for part in (self.keys, self.values))
        self.told = self.end
        self.layer.keys, self.layer.values = self.shown


class _StaticLayer:
    """A StaticLayer, or one with a sliding window that is not full: written in place."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.pending = 0  # tokens that `cumulative_length` does not count yet
        self.begin, self.end, self.keys, self.values = 0, int(layer.get_seq_length()), layer.keys, layer.values

    def takes(self, new: int, is_padded: bool) -> bool:
        length = self.end if self.pending else int(self.layer.get_seq_length())
        return length + new <= self.layer.max_cache_len

    def prepare(self, new: int, expected: int) -> bool:
        if not self.pending:
            self.end = int(self.layer.get_seq_length())
        moved = self.keys is not self.layer.keys or self.values is not self.layer.values
        self.keys, self.values = self.layer.keys, self.layer.values
        return moved

    def advance(self, new: int) -> None:
        self.end += new
        self.pending += new

    def most(self, length: int) -> int:
        return length if self.end == length else 1

    def rewind(self, count: int) -> None:
        self.end -= count
        self.pending -= count

    def show(self) -> None:
        self.layer.cumulative_length.add_(self.pending)
        if self.layer.is_sliding:
            self.layer.cumulative_length_int += self.pending
        self.pending = 0


def rows_in(cache: Any, count: int) -> list[Any]:
    """Return what the first `count` layers of a cache keep as places to write to."""
    kind = _StaticLayer if type(cache) is StaticCache else _GrowingLayer
    return [kind(layer) for layer in cache.layers[:count]]


class CacheRows:
    """A cache's layers beside a copy of a plan's structures that point to them: what a step writes and reads. Steps
    with cuts take `cut_model`.
    """

    def __init__(self, plan: Plan, cache: Any) -> None:
        self.plan = plan
        self.rows = rows_in(cache, len(plan.layers))
        self.structs, self.model = _copied(plan.model, plan.layers)
        self.all_structs, self.cut_model = [self.structs], self.model
        if plan.cut_layers is not None:
            cut_structs, self.cut_model = _copied(plan.model, plan.cut_layers)
            self.all_structs.append(cut_structs)
        for some in self.all_structs:
            for row, struct in zip(self.rows, some, strict=True):
                _point(row, struct)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of a cache do not take them along

    def prepare(self, new: int, is_padded: bool, expected: int = 0) -> bool:
        """Make room for a step's new tokens; return False where the cache would keep them in its own way."""
        if not all(row.takes(new, is_padded) for row in self.rows):
            return False
        for row, *some in zip(self.rows, *self.all_structs, strict=True):
            moved = row.prepare(new, expected)
            for struct in some:
                if moved:
                    _point(row, struct)
                struct.length = row.end
        return True

    def advance(self, new: int) -> None:
        """Count tokens that a step wrote."""
        for row in self.rows:
            row.advance(new)

    def rewind(self, count: int) -> None:
        """Forget the last tokens, which steps wrote since `prepare` made room for them all, or which `most` allows."""
        for row in self.rows:
            row.rewind(count)

    def most(self, length: int) -> int:
        """Return how many tokens can be forgotten after a step, its own among them, of a text of this length."""
        return min(row.most(length) for row in self.rows)

    @contextmanager
    def rewound(self, count: int, sequences: torch.Tensor) -> Iterator[None]:
        """Forget the last tokens, which steps then write again; sequences that are not among these keep theirs."""
        others = None if bool(sequences.all()) else [part.clone() for part in self._last(count)]
        self.rewind(count)
        yield
        for part, own in zip(self._last(count), others or (), strict=others is not None):
            part[~sequences] = own[~sequences]

    def _last(self, count: int) -> list[torch.Tensor]:
        """The last tokens' keys and values."""
        return [part[:, :, row.end - count : row.end] for row in self.rows for part in (row.keys, row.values)]

    def show(self) -> None:
        """Let the cache have what was written."""
        for row in self.rows:
            row.show()


def _copied(model: structs.Model, layers: Any) -> tuple[Any, structs.Model]:
    """Copies of a plan's layers, and of its model, which points to them."""
    own, found = type(layers).from_buffer_copy(layers), structs.Model.from_buffer_copy(model)
    found.layers = ctypes.cast(own, ctypes.POINTER(structs.Layer))
    return own, found


def _point(row: Any, struct: structs.Layer) -> None:
    struct.keys, struct.values = (
        structs.Cached(part.data_ptr(), part.stride(0), part.stride(1)) for part in (row.keys, row.values)
    )


def takes(cache: Any) -> bool:
    """Return whether a cache is of a kind that whole steps can read and write."""
    kinds: tuple[type, ...] = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is StaticCache:
        kinds = (StaticLayer, StaticSlidingWindowLayer)
    elif type(cache) is not DynamicCache:
        return False
    return not cache.offloading and all(type(layer) in kinds for layer in cache.layers)


def rows_of(plan: Plan, cache: Any, sequences: int) -> CacheRows | None:
    """Return the rows of a cache that holds tokens of these sequences, None where a step cannot read or write it."""
    layers = cache.layers[: len(plan.layers)]
    if not takes(cache) or len(layers) < len(plan.layers):
        return None
    if not all(layer.is_initialized and len(layer.keys) == sequences for layer in layers):
        return None
    found = cache.__dict__.get("decode_rows")
    if found is None or found.plan is not plan:
        if not all(_fits(plan, part) for layer in layers for part in (layer.keys, layer.values)):
            return None
        found = cache.__dict__["decode_rows"] = CacheRows(plan, cache)
    return found


def _fits(plan: Plan, part: torch.Tensor) -> bool:
    shape = (plan.key_heads, plan.head_dim)
    return part.is_cpu and part.dtype == plan.dtype and (part.shape[1], part.shape[3]) == shape
