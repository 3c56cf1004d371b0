"""Continue many prompts, a batch of rows at a time, where a row that is done makes room for the next prompt.

A decode step of a small model on a GPU takes as long for one row as for hundreds, so it must not run half empty. All
but a prompt's last token are read in a forward without logits, together with other new prompts', padded on the right;
its last token is its first decode step's. The tokens of STRIDE steps are looked at together, so that the device does
not wait for Python after each of them; a row that ends in between has computed a few tokens for nothing. On a CPU a
few rows are continued by whole steps of the kernels, where the model has them (aligned.py).

    for i, tokens in continue_prompts(model, prompts, new=256, ends={2}, rows=64):
        print(tokenizer.decode(prompts[i] + tokens))
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from stocha_hf.answers.aligned import AlignedCache
from stocha_hf.answers.choosing import Choice, numbers
from stocha_hf.answers.grouped import grouped_attention
from stocha_hf.answers.slots import SlotCache
from stocha_hf.decoding.conditions import FEW
from stocha_hf.decoding.step import has_whole_steps, tokens_of
from stocha_hf.errors import StochaError

STRIDE = 8
PREFILL = {"cuda": 32_768, "cpu": 4_096}  # tokens of prompts that are read together


def continue_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new: int,
    ends: Collection[int],
    rows: int,
    choice: Choice | None = None,
    keys: Sequence[int] | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
    repeated: dict[int, int] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continue each prompt until it ends.

    Args:
        model: A CausalLM in eval mode.
        prompts: Token ids of each, at least one. They are begun in this order.
        new: Tokens of a continuation at most.
        ends: Token ids that end one; it keeps them.
        rows: Prompts in work at a time; half as many where memory does not suffice.
        choice: How a token is chosen; None is greedy.
        keys: A number of 64 bits for each prompt: what is drawn for it follows from that, also in another batch, up to
            rounding. None draws anything.
        stop: Called now and then with a prompt's number and its new tokens so far; true ends the row, maybe some
            tokens late.
        repeated: Gets, by a prompt's number, how many of its continuation's steps, one a token, were computed again by
            a model with a fallback. What a row computes beyond its end is not counted.

    Yields:
        The number of a prompt and its continuation's token ids, as they are done.

    Raises:
        StochaError: the model's logits are NaN or infinite.
    """
    left = set(range(len(prompts)))
    while left:
        batch = _Batch(model, prompts, sorted(left), min(rows, len(left)), choice or Choice(), keys)
        try:
            for row in batch.run(new, frozenset(ends), stop):
                if repeated is not None:
                    repeated[row.prompt] = row.repeated
                yield row.prompt, row.tokens
                left.discard(row.prompt)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
        del batch
        if left and model.device.type == "cuda":
            torch.cuda.empty_cache()


class _Row:
    """A prompt in work: `repeated` counts its steps that were computed again."""

    def __init__(self, prompt: int, length: int) -> None:
        self.prompt, self.begun, self.repeated = prompt, length - 1, 0
        self.tokens: list[int] = []

    @property
    def position(self) -> int:
        """Where its next step writes."""
        return self.begun + len(self.tokens)


class _Batch:
    def __init__(
        self, model: Any, prompts: Any, order: list[int], rows: int, choice: Choice, keys: Sequence[int] | None
    ) -> None:
        self.model, self.prompts, self.choice, self.keys = model, prompts, choice, keys
        self.waiting = deque(order)
        self.rows: list[_Row | None] = [None] * rows
        self.cutting = getattr(model, "cutting", None)
        known = 1 if self.cutting is None else tokens_of(self.cutting)
        whole = rows <= FEW and known == 1 and has_whole_steps(model)
        self.cache: Any = AlignedCache(rows) if whole else SlotCache(rows, model.device)
        self.ids = torch.zeros(rows, known, dtype=torch.int64, device=model.device)  # the last ones of each row

    def run(self, new: int, ends: frozenset[int], stop: Callable[[int, list[int]], bool] | None) -> Iterator[_Row]:
        while self.waiting or any(self.rows):
            self._arrange()
            tokens, doubted = self._steps()
            ended: Any = np.isin(tokens, list(ends))
            about = zip(tokens.tolist(), ended.any(1).tolist(), doubted.sum(1).tolist(), strict=True)
            for slot, (found, end, repeated) in enumerate(about):
                if (row := self.rows[slot]) is None:
                    continue
                before = len(row.tokens)
                row.tokens += found
                row.repeated += repeated
                if end or len(row.tokens) >= new:
                    kept = min(int(ended[slot].argmax()) + 1 if end else STRIDE, new - before)
                    row.repeated -= int(doubted[slot, kept:].sum())
                    del row.tokens[before + kept :]
                elif stop is None or not stop(row.prompt, row.tokens):
                    continue
                self.rows[slot] = None
                yield row

    def _arrange(self) -> None:
        """Give free slots to waiting prompts, or drop them where none waits."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        taken = len(self.rows) - len(free)
        if not self.waiting:
            if taken <= len(self.rows) // 2:
                kept = [slot for slot, row in enumerate(self.rows) if row is not None]
                slots = torch.tensor(kept, device=self.model.device)
                self.cache.keep(slots)
                self.ids, self.rows = self.ids[slots], [self.rows[slot] for slot in kept]
        elif len(free) >= min(len(self.waiting), 1 + len(self.rows) // 16):  # a few at a time fill no forward
            self._read(free[: len(self.waiting)])

    def _read(self, slots: list[int]) -> None:
        """Read the next prompts into these slots, those of like lengths together, as many as PREFILL allows."""
        new = [_Row(i, len(self.prompts[i])) for i in (self.waiting.popleft() for _ in slots)]
        new.sort(key=lambda row: row.position, reverse=True)
        while new:
            count = max(PREFILL[self.model.device.type] // max(new[0].position, 1), 1)
            self._prefill(slots[:count], new[:count])
            slots, new = slots[count:], new[count:]

    @torch.no_grad()
    def _prefill(self, slots: list[int], rows: list[_Row]) -> None:
        at, longest = torch.tensor(slots, device=self.model.device), rows[0].position
        if longest > 0:
            padded = torch.zeros(len(rows), max(longest, 2), dtype=torch.int64)  # of one it would be a decode step
            for row, ids in zip(rows, padded, strict=True):
                ids[: row.position] = torch.tensor(self.prompts[row.prompt][:-1], dtype=torch.int64)
            prefilled = DynamicCache()
            self.model.base_model(padded.to(self.model.device), past_key_values=prefilled, use_cache=True)
            self.cache.put(at, prefilled, [row.position for row in rows])
        known = self.ids.shape[1]
        last = [[0] * known + list(self.prompts[row.prompt][-known:]) for row in rows]
        self.ids[at] = torch.tensor([ids[-known:] for ids in last], device=self.model.device)
        for slot, row in zip(slots, rows, strict=True):
            self.rows[slot] = row

    @torch.no_grad()
    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """STRIDE steps of all rows, [rows, STRIDE]: their tokens, and which of the steps were computed again."""
        positions = [0 if row is None else row.position for row in self.rows]
        self.cache.aim(positions, STRIDE)
        found, largest, doubted, known = [], [], [], self.ids.shape[1]
        self._doubted()  # what was before
        drawing = self._numbers()
        for i in range(STRIDE):
            step = self.ids[:, -1:]
            if self.cutting is not None and known > 1:
                self.cutting.tell(step, self.ids, self.cache.masks(self.model.config, self.model.dtype, known))
            with grouped_attention(self.model.config, self.model.device):
                logits = self.model(step, **self.cache.arguments(self.model.config, self.model.dtype)).logits[:, -1]
            largest.append(logits.amax(-1))
            doubted.append(self._doubted())
            found.append(self.choice(logits, None if drawing is None else drawing[:, i]))
            self.ids = torch.cat([self.ids[:, 1:], found[-1][:, None]], 1)
            self.cache.advance()
        if not torch.stack(largest).isfinite().all():
            raise StochaError(
                "the model's logits are NaN or infinite: expected whole weights, in a dtype that their numbers fit; "
                "try --dtype float32, or convert or train it again"
            )
        return torch.stack(found, 1).cpu().numpy(), torch.stack(doubted, 1).cpu().numpy()

    def _numbers(self) -> torch.Tensor | None:
        """Those that draw the next tokens, [rows, STRIDE]."""
        if self.keys is None or not self.choice.temperature:
            return None
        keys = [0 if row is None else self.keys[row.prompt] for row in self.rows]
        places = [0 if row is None else len(row.tokens) for row in self.rows]
        return numbers(keys, places, STRIDE).to(self.model.device)

    def _doubted(self) -> torch.Tensor:
        """Which rows' last step was computed again since this was asked last, bool [rows]."""
        if self.cutting is None or self.cutting.doubted is None:
            return torch.zeros_like(self.ids[:, 0], dtype=torch.bool)
        found, self.cutting.doubted = self.cutting.doubted, None
        return found
