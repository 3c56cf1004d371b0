"""generate()'s loop for a model whose steps are one call of the kernels.

transformers' loop takes two milliseconds a token around the model's call, of which a small model's step needs one or
two. This one does what it does: logits processors, stopping criteria, streamers, sampling with the same random
numbers, padding of sequences that have ended, scores and logits. What it saves is what nobody sees meanwhile: the
cache's tensors are set when the loop ends, and criteria on length and end tokens are compared as numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from stocha_hf.decoding import plan as plans
from stocha_hf.decoding import step
from stocha_hf.decoding.cache import rows_of, takes
from stocha_hf.decoding.conditions import CACHE, FEW
from stocha_hf.decoding.ops import available

# generate() has made stopping criteria of a tokenizer before; `transformers serve` always gives it one
KNOWN = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "tokenizer"}


def sample(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Return what GenerationMixin._sample returns for these arguments; None where its own loop is to run."""
    if synced_gpus or not available() or not _is_plain(model, input_ids, generation_config, model_kwargs):
        return None
    plan = plans.of(model)
    if plan is None or not takes(plan, model_kwargs[CACHE]):
        return None
    loop = _Loop(model, plan, input_ids, generation_config, model_kwargs)
    return loop.run(logits_processor, stopping_criteria, streamer)


def _is_plain(model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> bool:
    mask = kwargs.get("attention_mask")
    return (
        input_ids.is_cpu
        and 0 < len(input_ids) <= FEW
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        and not (config.output_attentions or config.output_hidden_states or config.prefill_chunk_size)
        and not (model.config.output_attentions or model.config.output_hidden_states)
        and bool(kwargs.get("use_cache"))
        and kwargs.get(CACHE) is not None
        and (mask is None or (type(mask) is torch.Tensor and mask.dim() == 2))
        and all(name in KNOWN or value is None for name, value in kwargs.items())
    )


class _Loop:
    def __init__(self, model: Any, plan: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> None:
        self.model, self.plan, self.config, self.kwargs = model, plan, config, kwargs
        self.sequences, self.length = input_ids.shape
        self.ids = torch.empty(self.sequences, max(config.max_length or 0, self.length + 256), dtype=torch.int64)
        self.ids[:, : self.length] = input_ids
        self.scores: Any = () if config.return_dict_in_generate and config.output_scores else None
        self.logits: Any = () if config.return_dict_in_generate and config.output_logits else None

    def run(self, processors: Any, criteria: Any, streamer: Any) -> Any:
        decode = self._prefilled()
        has_end = any(hasattr(rule, "eos_token_id") for rule in criteria)
        ended = _ended(criteria, self.sequences)
        unfinished = torch.ones(self.sequences, dtype=torch.int64)
        logits = self.first
        try:
            while True:
                given = self.ids[:, : self.length]
                scores = processors(given, logits) if len(processors) else logits
                if self.scores is not None:
                    self.scores += (scores,)
                if self.logits is not None:
                    self.logits += (logits,)
                if self.config.do_sample:
                    chosen = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
                else:
                    chosen = scores.argmax(-1)
                if has_end and self.sequences > 1:
                    chosen = chosen * unfinished + self.config._pad_token_tensor * (1 - unfinished)
                self._append(chosen)
                done = ended(self.ids[:, : self.length], self.scores)
                if streamer is not None:
                    streamer.put(chosen)
                if isinstance(done, torch.Tensor):
                    unfinished &= ~done
                    done = not unfinished.any()
                if done:
                    break
                logits = decode(chosen)
        finally:
            self.finish()
        return self._result(streamer)

    def _prefilled(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Read the prompt; return what gives the logits [sequences, vocabulary] after one more token each."""
        kwargs = self.kwargs
        outputs = self.model._prefill(
            self.ids[:, : self.length], self.config, kwargs, is_first_iteration=not self.config.is_assistant
        )
        self.first = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        cache, mask, positions = getattr(outputs, CACHE), kwargs.get("attention_mask"), kwargs.get("position_ids")
        at = torch.full((self.sequences, 1), self.length) if positions is None else positions[:, -1:] + 1
        at = at.expand(self.sequences, 1).contiguous()
        starts = step.padding(mask, self.sequences, self.length)
        rows = None if starts is None else rows_of(self.plan, cache, self.sequences)
        self.finish: Callable[[], None] = (lambda: None) if rows is None else rows.show
        expected = self.ids.shape[1] - self.length

        def decode(chosen: torch.Tensor) -> torch.Tensor:
            found = None
            if rows is not None and starts is not None:
                found = step.run(rows, chosen[:, None], at, starts, 1, expected)
            if found is None:
                self.finish()
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
        return self.model(chosen[:, None], use_cache=True, logits_to_keep=1, **known).logits.float()

    def _append(self, chosen: torch.Tensor) -> None:
        if self.length == self.ids.shape[1]:
            self.ids = torch.cat([self.ids, torch.empty_like(self.ids)], 1)
        self.ids[:, self.length] = chosen
        self.length += 1

    def _result(self, streamer: Any) -> Any:
        if streamer is not None:
            streamer.end()
        sequences = self.ids[:, : self.length].clone()
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=self.scores,
            logits=self.logits,
            **{CACHE: self.kwargs.get(CACHE)},
        )


def _ended(criteria: Any, sequences: int) -> Callable[[torch.Tensor, Any], Any]:
    """What tells of the ids so far whether to stop: True, False, or a tensor of one answer a sequence."""
    if sequences > 1 or not all(type(rule) in (MaxLengthCriteria, EosTokenCriteria) for rule in criteria):
        return criteria
    if any(getattr(rule, "max_position_embeddings", None) is not None for rule in criteria):
        return criteria  # which warns
    longest = min((rule.max_length for rule in criteria if type(rule) is MaxLengthCriteria), default=None)
    ends = {
        int(token)
        for rule in criteria
        if type(rule) is EosTokenCriteria
        for token in torch.as_tensor(rule.eos_token_id).flatten()
    }
    return lambda ids, scores: (
        (longest is not None and ids.shape[1] >= longest) or (bool(ends) and int(ids[0, -1]) in ends)
    )
