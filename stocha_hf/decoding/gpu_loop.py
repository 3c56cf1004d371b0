"""generate()'s loop on a GPU, for one sequence of a model whose steps are replays of a graph.

Greedy tokens are chosen on the GPU: the host asks for the next step before it reads the token of this one, so that the
GPU never waits. What a step beyond the last token wrote is not counted. Where logits processors, sampling or other
criteria choose, the host chooses between steps, as in loop.py. So it does where a step in doubt is computed again,
by a graph without cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.generation import MaxLengthCriteria

from stocha_hf.decoding import gpu_plan, step
from stocha_hf.decoding.cache import takes
from stocha_hf.decoding.conditions import CACHE
from stocha_hf.decoding.gpu_cache import repeats, rows_of
from stocha_hf.decoding.gpu_step import RING
from stocha_hf.decoding.loop import Loop, ending

AHEAD = 4  # steps asked for and not read yet, at most
UNKNOWN = -1  # a token that a step has not written yet


def loop(model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> Loop | None:
    """Return the loop for these arguments of generate(), None where transformers' own is to run."""
    if len(input_ids) > 1 or input_ids.device != model.device:
        return None
    plan = gpu_plan.of(model)
    if plan is None or not takes(kwargs[CACHE]) or plan.step(1) is None:
        return None
    if not repeats(plan, step.cutting_of(model, plan, 1)):
        return None
    return GpuLoop(model, plan, input_ids, config, kwargs) if plan.in_use.acquire(blocking=False) else None


class GpuLoop(Loop):
    """One call of generate(), which has the plan's step for itself until it is through."""

    def run(self, processors: Any, criteria: Any, streamer: Any) -> Any:
        """Generate, and return what generate() does."""
        try:
            return super().run(processors, criteria, streamer)
        finally:
            self.plan.in_use.release()

    def _decoder(self, cache: Any, at: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        self.steps, self.at = self._steps(), at
        self.step = self.steps[0]
        self.cutting = step.cutting_of(self.model, self.plan, 1)
        self.left = self.written = 0  # steps that the cache has room for; steps that it does not count yet
        mask = self.kwargs.get("attention_mask")
        starts = step.padding(None if mask is None else mask.cpu(), 1, self.length)
        self.start = 0 if starts is None else int(starts[0])
        self.rows = None if starts is None else rows_of(self.plan, cache)
        self._reserve(max((self.config.max_length or self.length + RING) - self.length - 1, 1))  # but for the last

        def decode(chosen: torch.Tensor) -> torch.Tensor:
            if self.left or self._reserve(RING):
                self.step.tokens.copy_(chosen)
                self._replay()
                found = self._with_fallback().clone()
            else:
                found = self._by_call(chosen, at, cache)[:, 0]
            at.add_(1)
            return found

        return decode

    def _steps(self) -> list[Any]:
        """The plan's steps that the loop takes."""
        return [self.plan.step(1)]

    def _reserve(self, steps: int) -> bool:
        """Make room for so many steps; return whether the plan's next steps are this loop's."""
        self.finish()
        length = None if self.rows is None else self.rows.prepare(self.steps, steps, self.start > 0)
        if length is None:
            return False
        self.place = int(self.at[0, 0]), length
        self.step.set(*self.place, self.start)
        self.left = steps
        return True

    def _with_fallback(self) -> torch.Tensor:
        """The logits [1, vocabulary] of the last step; without cuts if it was in doubt."""
        if self.cutting is None or self.cutting.judge(self.step.logits) is None:
            return self.step.logits
        text, position = self.ids[:, : self.length], self.place[0] + self.written - 1
        most = step.tokens_of(self.cutting)
        return self.rows.again(self.step, text, most, position, self.start, self.written, self.left)

    def _replay(self) -> None:
        self.step.replay()
        self.left -= 1
        self.written += 1

    def finish(self) -> None:
        """Let the cache have what was written."""
        if self.rows is not None and self.written:
            self.rows.finish(self.written)
        self.left = self.written = 0

    def _generate(
        self, decode: Callable[[torch.Tensor], torch.Tensor], processors: Any, criteria: Any, streamer: Any
    ) -> None:
        longest = min((rule.max_length for rule in criteria if type(rule) is MaxLengthCriteria), default=None)
        ended = ending(criteria, 1)
        kept = self.config.do_sample or self.scores is not None or self.logits is not None or self.cutting is not None
        if ended is criteria or longest is None or kept or len(processors) or self.left < longest - self.length - 1:
            super()._generate(decode, processors, criteria, streamer)
            return
        self.ids = self.ids.cpu()
        for token in self._tokens(longest - self.length):
            self._append(token)
            if streamer is not None:
                streamer.put(token)
            if ended(self.ids[:, : self.length], None):
                return

    def _tokens(self, count: int) -> Iterator[torch.Tensor]:
        """The most likely tokens, `count` at most, int64 [1] on the CPU: each while the next step runs."""
        first = self.first.argmax(-1)
        self.step.tokens.copy_(first)
        place, ring = int(self.step.state[1]) + 1, self.step.chosen.numpy()
        asked = 0
        yield first.cpu()
        for read in range(count - 1):
            while asked < min(read + AHEAD, count - 1):
                ring[(place + asked) % RING] = UNKNOWN
                self.step.replay()
                asked += 1
            token = self._told(place + read)
            self.written += 1
            yield torch.tensor([token])

    def _told(self, place: int) -> int:
        """What the step that makes the cache this long tells, once it does."""
        ring = self.step.chosen.numpy()
        while (found := int(ring[place % RING])) == UNKNOWN:
            torch.cuda.current_stream(self.device).query()  # raises what the GPU has failed with
        return found
