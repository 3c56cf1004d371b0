"""Rounds of lossless decoding on a GPU: a graph with cuts for each drafted token, one without for the verification.

Copies are drafted as on a CPU, and by a model without cuts they alone.

The host waits for each drafted token, for it decides with its probability whether to go on: that takes less than a
step that nobody needs. Steps of several tokens write over what drafts wrote, and so over what was not accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stocha_hf.decoding import gpu_draft, gpu_plan
from stocha_hf.decoding.cache import takes
from stocha_hf.decoding.conditions import CACHE
from stocha_hf.decoding.gpu_loop import UNKNOWN, GpuLoop
from stocha_hf.decoding.gpu_step import RING
from stocha_hf.decoding.loop import Loop, ending
from stocha_hf.decoding.rounds import Rounds, first_tokens

SIZES = (1, 2, 4, 8, 16)  # tokens of the steps that verify


def rounds(model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> Loop | None:
    """Return the loop for these arguments of generate(), None where a step must call the model's modules."""
    plan = gpu_plan.of(model) if input_ids.device == model.device else None
    if plan is None or not takes(kwargs[CACHE]):
        return None
    if any(plan.step(size, cuts=False) is None for size in SIZES):
        return None
    if _cuts(plan) and plan.draft(first_tokens(model)) is None:
        return None
    return GpuRounds(model, plan, input_ids, config, kwargs) if plan.in_use.acquire(blocking=False) else None


def _cuts(plan: gpu_plan.GpuPlan) -> bool:
    return any(layer.cuts for layer in plan.weights.layers)


class GpuRounds(Rounds, GpuLoop):
    """Rounds whose steps are replays of graphs, which have the plan's steps for themselves until the text ends."""

    most = SIZES[-1]

    def _steps(self) -> list[Any]:
        steps = [self.plan.step(size, cuts=False) for size in SIZES]
        self.drafts_by_steps = _cuts(self.plan)
        if self.drafts_by_steps:
            self.draft = self.plan.draft(first_tokens(self.model))
            steps.insert(0, self.draft)  # the one that `_told` reads
        return steps

    def _decoder(self, cache: Any, at: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        super()._decoder(cache, at)

        def decode(chosen: torch.Tensor) -> torch.Tensor:
            found = self._by_call(chosen.to(self.device), at, cache)[:, 0]
            at.add_(1)
            return found

        return decode

    def _generate(self, decode: Any, processors: Any, criteria: Any, streamer: Any) -> None:
        kept = self.scores is not None or self.logits is not None
        self.is_plain = not (kept or len(processors) or ending(criteria, 1) is criteria)
        if self.is_plain:  # the host compares numbers
            self.ids = self.ids.cpu()
        super()._generate(decode, processors, criteria, streamer)

    def _start(self) -> None:
        if self.drafts_by_steps:
            self.draft.restart([*self.ids[0, : self.length].tolist(), *self._ends()])

    def _see(self, token: int) -> None:
        if self.drafts_by_steps:
            self.draft.see(token)

    def _reserve(self, steps: int) -> bool:
        """With room for what a last verification may write beyond the text, if there is."""
        return super()._reserve(steps + self.most) or super()._reserve(steps)

    def _has_room(self, tokens: int) -> bool:
        needed = self.plan.step(tokens, cuts=False).count
        return self.left >= needed or self._reserve(needed)

    def _next(self, drafted: list[int]) -> tuple[int, float]:
        position, length = (place + self.written for place in self.place)
        behind = length + len(drafted) + 1
        if not drafted:
            self.draft.set(position, length, self.start, [self._last()])
        self.draft.chosen.numpy()[behind % RING] = UNKNOWN
        self.draft.replay()
        found = gpu_draft.read(self._told(behind))
        if len(self.processors):
            place, listed = self.length + len(drafted), self.draft.looked_at()
            found = self._chosen(self.draft.logits[:, : len(listed)], listed, place)
            self.ids[:, place] = self.draft.tokens[0] = found[0]
        return found

    def _verify(self, drafted: list[int]) -> Callable[[int], bool]:
        position, length = (place + self.written for place in self.place)
        tokens = [self._last(), *drafted]
        step = self.plan.step(len(tokens), cuts=False)
        step.set(position, length, self.start, tokens)
        step.replay()
        logits = step.logits[: len(tokens)]
        if self.is_plain:
            likeliest = logits.argmax(-1).cpu()
            return lambda i: self._settle(likeliest[i : i + 1])
        kept = logits.clone()
        if kept.is_cuda:  # the caller takes the time
            torch.cuda.current_stream(self.device).synchronize()
        return lambda i: self._take(kept[i : i + 1])

    def _keep(self, tokens: int) -> None:
        self.left -= tokens
        self.written += tokens
        self.at.add_(tokens)
