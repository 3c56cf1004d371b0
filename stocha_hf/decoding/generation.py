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
    plan = None if synced_gpus else plan_of(model, input_ids, generation_config, model_kwargs)
    if plan is None:
        return None
    loop = Loop(model, plan, input_ids, generation_config, model_kwargs)
    return loop.run(logits_processor, stopping_criteria, streamer)


def plan_of(model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> Any:
    """Return the plan of a model whose steps from this prompt on a loop here can take, or None."""
    if not available() or not _is_plain(model, input_ids, config, kwargs):
        return None
    plan = plans.of(model)
    return plan if plan is not None and takes(plan, kwargs[CACHE]) else None


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


class Loop:
    """One call of generate(): the ids so far, and the cache as rows that steps write."""

    def __init__(self, model: Any, plan: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> None:
        self.model, self.plan, self.config, self.kwargs = model, plan, config, kwargs
        self.sequences, self.length = input_ids.shape
        self.ids = torch.empty(self.sequences, max(config.max_length or 0, self.length + 256), dtype=torch.int64)
        self.ids[:, : self.length] = input_ids
        self.unfinished = torch.ones(self.sequences, dtype=torch.int64)
        self.scores: Any = () if config.return_dict_in_generate and config.output_scores else None
        self.logits: Any = () if config.return_dict_in_generate and config.output_logits else None

    def run(self, processors: Any, criteria: Any, streamer: Any) -> Any:
        """Decode until the criteria say stop; return what generate() returns."""
        self.begin(processors, criteria, streamer)
        logits = self.prefilled()
        try:
            while not self.take(logits):
                logits = self.decode()
        finally:
            self.finish()
        return self.result()

    def begin(self, processors: Any, criteria: Any, streamer: Any) -> None:
        self.processors, self.streamer = processors, streamer
        self.has_end = any(hasattr(rule, "eos_token_id") for rule in criteria)
        self.ended = _ended(criteria, self.sequences)

    def processed(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        """Return the scores of logits [sequences, vocabulary] behind so many ids."""
        return self.processors(self.ids[:, :length], logits) if len(self.processors) else logits

    def take(self, logits: torch.Tensor) -> bool:
        """Choose the next token of each sequence by logits [sequences, vocabulary]; return whether it is the last."""
        scores = self.processed(logits, self.length)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.config.do_sample:
            chosen = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            chosen = scores.argmax(-1)
        if self.has_end and self.sequences > 1:
            chosen = chosen * self.unfinished + self.config._pad_token_tensor * (1 - self.unfinished)
        self.make_room(1)
        self.ids[:, self.length] = chosen
        self.length += 1
        done = self.ended(self.ids[:, : self.length], self.scores)
        if self.streamer is not None:
            self.streamer.put(chosen)
        if isinstance(done, torch.Tensor):
            self.unfinished &= ~done
            done = not self.unfinished.any()
        return bool(done)

    def prefilled(self) -> torch.Tensor:
        """Read the prompt; return the logits [sequences, vocabulary] of what follows."""
        kwargs = self.kwargs
        outputs = self.model._prefill(
            self.ids[:, : self.length], self.config, kwargs, is_first_iteration=not self.config.is_assistant
        )
        self.cache, positions = getattr(outputs, CACHE), kwargs.get("position_ids")
        at = torch.full((self.sequences, 1), self.length) if positions is None else positions[:, -1:] + 1
        self.at = at.expand(self.sequences, 1).contiguous()
        self.starts = step.padding(kwargs.get("attention_mask"), self.sequences, self.length)
        self.rows = None if self.starts is None else rows_of(self.plan, self.cache, self.sequences)
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32)

    def decode(self) -> torch.Tensor:
        """Return the logits [sequences, vocabulary] behind the last token of each sequence."""
        chosen, found = self.ids[:, self.length - 1 : self.length].contiguous(), None
        if self.rows is not None and self.starts is not None:
            expected = self.ids.shape[1] - self.length
            found = step.run(self.rows, chosen, self.at, self.starts, 1, expected)
        if found is None:
            self.finish()
            found = self._by_call(chosen)
        self.at.add_(1)
        return found[:, 0]

    def finish(self) -> None:
        """Let the cache show what was written."""
        if self.rows is not None:
            self.rows.show()

    def make_room(self, tokens: int) -> None:
        """Let `ids` have room for more tokens."""
        if self.length + tokens > self.ids.shape[1]:
            self.ids = torch.cat([self.ids, torch.empty_like(self.ids)], 1)

    def _by_call(self, chosen: torch.Tensor) -> torch.Tensor:
        """The same by the model's own call."""
        mask = self.kwargs.get("attention_mask")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(self.sequences, self.length - mask.shape[1])], 1)
        known = {"attention_mask": mask, "position_ids": self.at, CACHE: self.cache}
        return self.model(chosen, use_cache=True, logits_to_keep=1, **known).logits.float()

    def result(self) -> Any:
        """Return what generate() returns."""
        if self.streamer is not None:
            self.streamer.end()
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
