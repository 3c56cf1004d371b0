"""A draft's step on a GPU: one token, with cuts, that looks at a part of the vocabulary and tells how sure it is."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import torch
import triton

from stocha_hf.decoding.gpu_step import RING, SLOTS, GpuStep
from stocha_hf.decoding.gpu_weights import Weights
from stocha_hf.decoding.triton_ends import drafted_kernel

MORE = 2048  # tokens beyond the first ones that a text may add
BLOCK = 16384  # logits that are added up at a time


class GpuDraft(GpuStep):
    """A step of one token that finds the logits of the first tokens of the vocabulary, and of those that are added.

    `logits` float32 [1, room] are those of `listed_tokens` int64 [room], where -1 is none. A number of `chosen` has
    the bits of the token's probability among them above the token.
    """

    def __init__(self, weights: Weights, first: int) -> None:
        super().__init__(weights)
        self.first = first
        room = min(first + MORE, self.vocabulary)
        self.logits = self.logits[:, :room].contiguous()
        self.listed_tokens = torch.full((room,), -1, device=self.state.device)
        self.restart(())

    def restart(self, tokens: Iterable[int]) -> None:
        """Look at the first tokens of the vocabulary, and at these."""
        self.added: dict[int, None] = {}
        more = dict.fromkeys(token for token in tokens if token >= self.first)
        self.listed_tokens.fill_(-1)  # type: ignore[union-attr]
        self._put(0, torch.arange(self.first))
        self._look_at(list(more))

    def see(self, token: int) -> None:
        """Look at a token too, if there is room."""
        if token >= self.first and token not in self.added:
            self._look_at([token])

    def looked_at(self) -> torch.Tensor:
        """Return the tokens that the first logits are of."""
        found: torch.Tensor = self.listed_tokens[: self.first + len(self.added)]  # type: ignore[index]
        return found

    def _look_at(self, tokens: list[int]) -> None:
        place = self.first + len(self.added)
        tokens = tokens[: len(self.listed_tokens) - place]  # type: ignore[arg-type]
        self._put(place, torch.tensor(tokens, dtype=torch.int64))
        self.added |= dict.fromkeys(tokens)

    def _put(self, place: int, tokens: torch.Tensor) -> None:
        self.listed_tokens[place : place + len(tokens)] = tokens  # type: ignore[index]

    def _next(self) -> None:
        count = self.logits.shape[1]
        drafted_kernel[(1,)](
            self.best, self.logits, self.state, self.chosen, count, SLOTS, RING, self.early,
            min(BLOCK, triton.next_power_of_2(count)), num_warps=16, **self.options,
        )  # fmt: skip


def read(number: int) -> tuple[int, float]:
    """Return the token and the probability that a number of `chosen` tells."""
    return number & 0xFFFFFFFF, struct.unpack("f", struct.pack("i", number >> 32))[0]
