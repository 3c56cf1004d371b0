"""generate()'s loop for a model whose steps are one call of the CPU's kernels.

It does what transformers' does: logits processors, stopping criteria, streamers, sampling with the same random
numbers, padding of sequences that have ended, scores and logits. What it saves is what nobody sees meanwhile: the
cache's tensors are set when the loop ends, and criteria on length and end tokens are compared as numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from stocha_hf.decoding import step
from stocha_hf.decoding.cache import rows_of
from stocha_hf.decoding.conditions import CACHE
from stocha_hf.decoding.structs import ALL, GREATEST


class Loop:
    """One call of generate(), on a CPU."""

    rows: Any  # of the cache, or None where steps cannot write it

    def __init__(self, model: Any, plan: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> None:
        self.model, self.plan, self.config, self.kwargs = model, plan, config, kwargs
        self.sequences, self.length = input_ids.shape
        self.device = input_ids.device
        self.ids = input_ids.new_empty(self.sequences, max(config.max_length or 0, self.length + 256))
        self.ids[:, : self.length] = input_ids
        self.scores: Any = () if config.return_dict_in_generate and config.output_scores else None
        self.logits: Any = () if config.return_dict_in_generate and config.output_logits else None

    def run(self, processors: Any, criteria: Any, streamer: Any) -> Any:
        """Generate, and return what generate() does."""
        cache, at = self._prefilled()
        decode = self._decoder(cache, at)
        try:
            self._generate(decode, processors, criteria, streamer)
        finally:
            self.finish()
        return self._result(streamer)

    def _generate(
        self, decode: Callable[[torch.Tensor], torch.Tensor], processors: Any, criteria: Any, streamer: Any
    ) -> None:
        self._begin(processors, criteria, streamer)
        logits = self.first
        while not self._take(logits):
            logits = decode(self.ids[:, self.length - 1].contiguous())

    def _begin(self, processors: Any, criteria: Any, streamer: Any) -> None:
        self.processors, self.streamer = processors, streamer
        self.has_end = any(hasattr(rule, "eos_token_id") for rule in criteria)
        self.ended = ending(criteria, self.sequences)
        self.unfinished = torch.ones(self.sequences, dtype=torch.int64, device=self.device)

    def _wanted_logits(self) -> int:
        """What of a step's logits tokens are chosen by, and the caller is given."""
        asks = self.config.do_sample or len(self.processors) or self.scores is not None or self.logits is not None
        return ALL if asks else GREATEST

    def _processed(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        """The scores of logits [sequences, vocabulary] behind so many ids."""
        return self.processors(self.ids[:, :length], logits) if len(self.processors) else logits

    def _take(self, logits: torch.Tensor) -> bool:
        """Choose the next token of each sequence by logits [sequences, vocabulary]; return whether it is the last."""
        scores = self._processed(logits, self.length)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.config.do_sample:
            chosen = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            chosen = greatest(scores)
        return self._settle(chosen)

    def _settle(self, chosen: torch.Tensor) -> bool:
        """Make these, int64 [sequences], the next tokens; return whether they are the last."""
        if self.has_end and self.sequences > 1:
            chosen = chosen * self.unfinished + self.config._pad_token_tensor * (1 - self.unfinished)
        self._append(chosen)
        done = self.ended(self.ids[:, : self.length], self.scores)
        if self.streamer is not None:
            self.streamer.put(chosen.cpu())
        if isinstance(done, torch.Tensor):
            self.unfinished &= ~done
            done = not self.unfinished.any()
        return bool(done)

    def _prefilled(self) -> tuple[Any, torch.Tensor]:
        """Read the prompt; return the cache, and each sequence's next position, int64 [sequences, 1]."""
        outputs = self.model._prefill(
            self.ids[:, : self.length], self.config, self.kwargs, is_first_iteration=not self.config.is_assistant
        )
        self.first = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        positions = self.kwargs.get("position_ids")
        at = self.ids.new_full((self.sequences, 1), self.length) if positions is None else positions[:, -1:] + 1
        return getattr(outputs, CACHE), at.expand(self.sequences, 1).contiguous()

    def _decoder(self, cache: Any, at: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what gives the logits [sequences, vocabulary] after one more token each."""
        self.at = at
        self.starts = starts = step.padding(self.kwargs.get("attention_mask"), self.sequences, self.length)
        self.rows = rows = None if starts is None else rows_of(self.plan, cache, self.sequences)
        self.finish: Callable[[], None] = (lambda: None) if rows is None else rows.show
        expected = self.ids.shape[1] - self.length

        def decode(chosen: torch.Tensor) -> torch.Tensor:
            found = None
            if self.rows is not None and starts is not None:
                given = self.rows, chosen[:, None], at, starts, 1, expected
                found = step.with_fallback(self.model, *given, self.ids[:, : self.length], self._wanted_logits())
            if found is None:
                self.finish()
                self.rows, self.finish = None, lambda: None  # the cache goes on alone: no step takes it back
                found = self._by_call(chosen, at, cache)
            at.add_(1)
            return found[:, 0]

        return decode

    def _by_call(self, chosen: torch.Tensor, at: torch.Tensor, cache: Any) -> torch.Tensor:
        """The same by the model's own call."""
        mask = self.kwargs.get("attention_mask")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(self.sequences, self.length - mask.shape[1])], 1)
        known = {"attention_mask": mask, "position_ids": at, CACHE: cache}
        ids = chosen[:, None]
        if tell := getattr(self.model.__dict__.get("cutting"), "tell", None):  # which not each published copy has
            tell(ids, self.ids[:, : self.length].to(self.device), mask)
        return self.model(ids, use_cache=True, logits_to_keep=1, **known).logits.float()

    def _append(self, chosen: torch.Tensor) -> None:
        self._make_room(1)
        self.ids[:, self.length] = chosen
        self.length += 1

    def _make_room(self, tokens: int) -> None:
        if self.length + tokens > self.ids.shape[1]:
            self.ids = torch.cat([self.ids, torch.empty_like(self.ids)], 1)

    def _result(self, streamer: Any) -> Any:
        if streamer is not None:
            streamer.end()
        sequences = self.ids[:, : self.length].to(self.device, copy=True)
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=self.scores,
            logits=self.logits,
            **{CACHE: self.kwargs.get(CACHE)},
        )


def greatest(scores: torch.Tensor) -> torch.Tensor:
    """Return argmax(-1) of scores [sequences, vocabulary]; on a CPU by numpy, which is ten times as fast."""
    if not scores.is_cpu or scores.dtype != torch.float32:
        return scores.argmax(-1)
    return torch.from_numpy(scores.numpy().argmax(-1))


def ending(criteria: Any, sequences: int) -> Callable[[torch.Tensor, Any], Any]:
    """What tells of the ids so far whether to stop: True, False, or a tensor of one answer a sequence."""
    if sequences > 1 or not all(type(rule) in (MaxLengthCriteria, EosTokenCriteria) for rule in criteria):
        return criteria
    limits = [(rule.max_length, rule.max_position_embeddings) for rule in criteria if type(rule) is MaxLengthCriteria]
    if any(known is not None and length > known + 1 for length, known in limits):
        return criteria  # which warns
    longest = min((length for length, _ in limits), default=None)
    ends = {
        int(token)
        for rule in criteria
        if type(rule) is EosTokenCriteria
        for token in torch.as_tensor(rule.eos_token_id).flatten()
    }
    return lambda ids, scores: (
        (longest is not None and ids.shape[1] >= longest) or (bool(ends) and int(ids[0, -1]) in ends)
    )
