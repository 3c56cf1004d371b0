"""Lossless decoding of a model that cuts inputs: with the cuts it drafts, without them it verifies its own drafts.

The text is what the model writes without cuts, token by token; the weights are the same, in one copy. A round drafts
some tokens in steps of one, forgets their keys and values, and computes all of them at once in a step that reads the
weights once (Leviathan et al., arXiv 2211.17192). rounds.py says the round, pace.py how many tokens it drafts. A model
without cuts drafts what its text repeats.

transformers' assisted generation would do the same with a copy of the model as its assistant; its two loops, two
caches and calls take longer than a small model's draft saves.

    model.generate(**inputs, custom_generate=lossless, do_sample=False)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from stocha_hf.decoding import step
from stocha_hf.decoding.generation import is_plain_call, loop_on_cpu
from stocha_hf.decoding.loop import Loop
from stocha_hf.decoding.ops import available
from stocha_hf.decoding.rounds import Rounds, first_tokens
from stocha_hf.decoding.structs import ABOUT, is_cut
from stocha_hf.errors import StochaError


def lossless(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Write what a model writes without input cuts; they draft, and copies: for generate's `custom_generate`.

    Where its steps are not single calls of the kernels or single graphs of a GPU's, as with hooks, it writes the same
    without drafts. A step of several tokens may round otherwise than one of one token: of 16-bit logits that are as
    good as equal, it may choose another. A text that repeats little takes longer than by plain steps.

    Args:
        model: A converted model, with input cuts or without.
        input_ids: int64 [1, length].
        logits_processor: As generate() made it; so are the other arguments.

    Returns:
        What generate() returns.

    Raises:
        StochaError: For several sequences, sampling or beams.
    """
    if generation_config.do_sample or generation_config.num_beams != 1 or len(input_ids) != 1:
        raise StochaError(
            f"lossless decoding was asked of {len(input_ids)} sequences, {generation_config.num_beams} beams and "
            f"do_sample={generation_config.do_sample}: expected one sequence, one beam and do_sample=False"
        )
    make = None if synced_gpus else LOOPS.get(input_ids.device.type)
    loop = None if make is None else make(model, input_ids, generation_config, model_kwargs)
    with _uncut(model):
        if loop is None:
            return model._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        return loop.run(logits_processor, stopping_criteria, streamer)


def _cuts(model: Any) -> bool:
    return any(is_cut(module) for module in model.modules())


def _uncut(model: Any) -> AbstractContextManager[Any]:
    return model.cut_inputs("never") if _cuts(model) else nullcontext()


class CpuRounds(Rounds):
    """Rounds whose steps are calls of the CPU's kernels, which are told for each whether it cuts."""

    def _start(self) -> None:
        self.drafts_by_steps = _cuts(self.model)
        some = torch.arange(first_tokens(self.model))
        self.listed = torch.cat([some, self.ids[0, : self.length], torch.tensor(self._ends()).long()]).unique()

    def _see(self, token: int) -> None:
        at = int(torch.searchsorted(self.listed, token))
        if at == len(self.listed) or self.listed[at] != token:
            self.listed = torch.cat([self.listed[:at], torch.tensor([token]), self.listed[at:]])

    def _best(self, logits: torch.Tensor) -> tuple[int, float]:
        """By numpy, which takes a third of PyTorch's time."""
        values = logits.numpy()[0]
        place = int(values.argmax())
        return place, 1 / float(np.exp(values - values[place]).sum())

    def _has_room(self, tokens: int) -> bool:
        """All in one buffer."""
        if self.rows is None or self.starts is None:
            return False
        found: bool = self.rows.prepare(tokens, bool(self.starts.any()), self.ids.shape[1] - self.length)
        return found

    def _next(self, drafted: list[int]) -> tuple[int, float]:
        place = self.length + len(drafted)
        logits = self._run(place - 1, 1, cuts=True, listed=self.listed, wanted=ABOUT)[:, -1]
        found = self._chosen(logits, self.listed, place)
        self.ids[:, place] = found[0]
        return found

    def _verify(self, drafted: list[int]) -> Callable[[int], bool]:
        logits = self._run(self.length - 1, len(drafted) + 1, cuts=False, wanted=self._wanted_logits())[0]
        return lambda i: self._take(logits[i : i + 1])

    def _keep(self, tokens: int) -> None:
        self.rows.advance(tokens)
        self.at.add_(tokens)

    def _run(self, first: int, tokens: int, **options: Any) -> torch.Tensor:
        """The logits [1, tokens, vocabulary] of a step of the ids from `first` on, none of which the cache counts."""
        drafted = first - self.length + 1
        ids = self.ids[:, first : first + tokens].contiguous()
        positions = self.at + drafted + torch.arange(tokens)
        self.rows.advance(drafted)
        found: Any = step.run(self.rows, ids, positions, self.starts, tokens, **options)  # type: ignore[arg-type]
        self.rows.rewind(drafted + tokens)
        return found


def _on_cpu(model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> Loop | None:
    with _uncut(model):
        return loop_on_cpu(model, input_ids, config, kwargs, CpuRounds)


def _on_gpu(model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> Loop | None:
    if not available("cuda") or not is_plain_call(model, input_ids, config, kwargs):
        return None
    from stocha_hf.decoding import gpu_lossless  # which needs Triton

    # with cuts, steps of one token draft, and those of several verify
    with model.cut_inputs("decode", fallback=0) if _cuts(model) else nullcontext():
        return gpu_lossless.rounds(model, input_ids, config, kwargs)


LOOPS: dict[str, Callable[..., Loop | None]] = {"cpu": _on_cpu, "cuda": _on_gpu}  # what makes one, or None
