"""A KV cache whose rows each stand at a token of their own, so that a row that is done gives its place to another.

transformers' caches hold a batch that begins and ends together: its rows are padded to the longest prompt and wait for
the longest answer. Here a row is a slot. A prompt's keys and values are put into free slots, a decode step writes at
`positions[row]` and reads the first `reach` places of all rows, and the mask hides what lies behind each row's token.
A step of several tokens a row writes the last at `positions[row]` and the others before it: a model with a fallback
computes them again (cuts_stocha.py).

    cache = SlotCache(rows=64, device=model.device)
    cache.put(slots, prefilled, lengths)  # of a DynamicCache
    cache.aim(positions, ahead=8)         # where the next steps write
    model(ids[:, None], **cache.arguments(model.config, model.dtype))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache

PLACES = 64  # the cache grows by so many tokens at a time, and a step reads a multiple of them


class SlotCache(Cache):
    """Keys and values of `rows` slots, [rows, heads, places, size] for each layer."""

    rewritten = True  # which cuts_stocha.py of folders of before `rewound` asks: a step computed again writes in place

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.held: list[list[torch.Tensor]] = []  # of each layer keys and values
        self.rows = torch.arange(rows, device=device)
        self.positions = torch.zeros_like(self.rows)
        self.written: torch.Tensor | None = None  # bool [rows]: those that a step writes; None: all
        self.aims: dict[int, torch.Tensor] = {}  # by the tokens of a step: where it writes, the same for all layers
        self.reach = self.places = 0
        self.level = False  # whether all rows stand at the last place that is read, so that nothing is to be masked

    def aim(self, positions: list[int], ahead: int) -> None:
        """Let the next `ahead` steps write at `positions` and after them; `advance` moves on."""
        self.positions = torch.tensor(positions, device=self.rows.device)
        self.aims.clear()
        self.level = len(set(positions)) == 1
        self._read(max(positions) + 1)
        self._grow(max(positions) + ahead)

    def advance(self) -> None:
        """Move each row one place on."""
        self.positions = self.positions + 1
        self.aims.clear()
        self._read(self.last + 2)

    def _read(self, places: int) -> None:
        self.last = places - 1
        self.reach = places if self.level else _rounded(places)

    def most(self, length: int) -> int:
        """Return how many tokens can be computed again, the step's own among them, of a text of this length."""
        return length

    @contextmanager
    def rewound(self, count: int, rows: torch.Tensor) -> Iterator[None]:
        """Let a step of `count` tokens write the last places of these rows, bool [rows], and no others' again."""
        self.written, aims, self.aims = rows, self.aims, {}
        try:
            yield
        finally:
            self.written, self.aims = None, aims

    def _grow(self, places: int) -> None:
        """With a place beyond them all, for what is not to be kept."""
        self.places = max(self.places, _rounded(places + 1))
        for layer in self.held:
            for i, part in enumerate(layer):
                if part.shape[2] < self.places:
                    grown = part.new_zeros(*part.shape[:2], self.places, part.shape[3])
                    grown[:, :, : part.shape[2]] = part
                    layer[i] = grown

    def put(self, slots: torch.Tensor, prefilled: DynamicCache, lengths: Sequence[int]) -> None:
        """Put prompts' keys and values, of any cache with whole layers, into these slots from place 0 on.

        What lies behind a prompt's length is padding, which the text's next tokens replace before they see it.
        """
        layers: list[Any] = prefilled.layers  # some kinds of layers hold no keys, but whole ones do
        length = layers[0].keys.shape[2]
        self._grow(length)
        for index, layer in enumerate(layers):
            for held, new in zip(self._layer(index, layer.keys), (layer.keys, layer.values), strict=True):
                held[slots, :, :length] = new

    def keep(self, slots: torch.Tensor) -> None:
        """Forget all slots but these."""
        self.held = [[part[slots] for part in layer] for layer in self.held]
        self.rows = torch.arange(len(slots), device=self.rows.device)

    def arguments(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Return what a model's step of one token a row takes beside the tokens."""
        return {
            "attention_mask": self.masks(config, dtype),
            "position_ids": self.positions[:, None],
            "past_key_values": self,
            "use_cache": True,
        }

    def masks(self, config: Any, dtype: torch.dtype, tokens: int = 1) -> Any:
        """What so many tokens of each row see, [rows, 1, tokens, reach], added to attention's scores.

        As a model of this config takes it, or None for all.
        """
        windows = _windows(config)
        if tokens == 1 and self.level and not any(windows.values()):
            return None
        places = self._last(tokens).clamp(min=0)[:, :, None]  # what stands before a text sees something, not nothing
        at = torch.arange(self.reach, device=self.rows.device)
        hidden = torch.finfo(dtype).min
        masks = {}
        for kind, window in windows.items():
            seen = at <= places
            if window:
                seen &= at > places - window
            masks[kind] = torch.zeros(seen.shape, dtype=dtype, device=at.device).masked_fill_(~seen, hidden)[:, None]
        return masks if hasattr(config, "layer_types") else masks[""]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Write a step's keys and values [rows, heads, tokens, size], and return what it attends to."""
        layer = self._layer(layer_idx, key_states)
        places = self._aim(key_states.shape[2])
        for held, new in zip(layer, (key_states, value_states), strict=True):
            held[self.rows[:, None], :, places] = new.transpose(1, 2)
        return tuple(held[:, :, : self.reach] for held in layer)

    def _aim(self, tokens: int) -> torch.Tensor:
        """Where a step of so many tokens a row writes, [rows, tokens]: what is not kept, at the last place of all."""
        if tokens not in self.aims:
            places = self._last(tokens)
            kept = places >= 0 if self.written is None else (places >= 0) & self.written[:, None]
            self.aims[tokens] = torch.where(kept, places, self.places - 1)
        return self.aims[tokens]

    def _last(self, tokens: int) -> torch.Tensor:
        """The places of the last tokens of each row, [rows, tokens]: below 0 what stands before a text."""
        return self.positions[:, None] + torch.arange(1 - tokens, 1, device=self.positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the places before those that the next step writes, of the row that has most."""
        return self.reach - 1

    def _layer(self, index: int, like: torch.Tensor) -> list[torch.Tensor]:
        while len(self.held) <= index:
            shape = (len(self.rows), like.shape[1], self.places, like.shape[3])
            self.held.append([like.new_zeros(shape), like.new_zeros(shape)])
        return self.held[index]


def _rounded(places: int) -> int:
    return -(-places // PLACES) * PLACES


def _windows(config: Any) -> dict[str, int | None]:
    """Of each kind of attention layer the tokens that it looks back to, None for all; "" where there is one kind."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
