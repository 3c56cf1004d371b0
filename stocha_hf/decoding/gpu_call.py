"""A model's call in a decode step on a GPU: one sequence's few tokens, in one replay of a graph.

As step.py on a CPU: what is not the plain case is left to the model's own forward. So assistants' drafts are checked,
and loops of one's own decode.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from stocha_hf.decoding import gpu_plan
from stocha_hf.decoding.cache import takes
from stocha_hf.decoding.conditions import CACHE, FEW, OLD_CACHE
from stocha_hf.decoding.gpu_cache import repeats, rows_of
from stocha_hf.decoding.step import cutting_of, given_to, padding, text_of, tokens_of


def call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CausalLMOutputWithPast | None:
    """Return what a call of a causal language model in eval mode returns; None where its forward is to run."""
    ids: Any = kwargs.get("input_ids", args[0] if args else None)
    if ids.dim() != 2 or len(ids) != 1 or ids.numel() > FEW or torch.is_grad_enabled():
        return None
    cache: Any = kwargs.get(CACHE, kwargs.get(OLD_CACHE))
    if not takes(cache) or not any(layer.is_initialized for layer in cache.layers):
        return None  # a short prompt, for which no plan is to be made: one as other cuts need would lose its graphs
    plan = gpu_plan.of(model)
    if plan is None:
        return None
    given = given_to(model, args, kwargs)
    if given is None or not plan.in_use.acquire(blocking=False):
        return None
    try:
        logits = _logits(plan, given, cutting_of(model, plan, ids.numel()))
    finally:
        plan.in_use.release()
    return None if logits is None else CausalLMOutputWithPast(logits=logits, **{CACHE: given[CACHE]})


def _logits(plan: gpu_plan.GpuPlan, given: dict[str, Any], cutting: Any) -> torch.Tensor | None:
    """Logits of the last tokens asked for, [1, tokens, vocabulary] in the model's type; of one token that is in doubt
    by `cutting`, a model's that falls back, without cuts.
    """
    ids, cache = given["input_ids"][0], given[CACHE]
    rows = rows_of(plan, cache)
    if rows is None or not repeats(plan, cutting):
        return None
    step = plan.step(len(ids))
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    held = int(cache.get_seq_length())
    starts = padding(mask.cpu() if isinstance(mask, torch.Tensor) else mask, 1, held + len(ids))
    places = [held] if positions is None else positions.flatten().tolist()
    if step is None or starts is None or places != list(range(places[0], places[0] + len(places))):
        return None
    length = rows.prepare([step], step.count, int(starts[0]) > 0)
    if length is None:
        return None
    step.set(places[0], length, int(starts[0]))
    step.tokens[: len(ids)] = ids
    step.replay()
    logits = step.logits
    if cutting is not None and cutting.judge(logits) is not None:
        text = text_of(given["input_ids"])
        text, most = (ids[None], 1) if text is None else (text, tokens_of(cutting))
        logits = rows.again(step, text, most, places[0], int(starts[0]), len(ids))
    rows.finish(len(ids))
    kept = given.get("logits_to_keep") or len(ids)
    return logits[None, len(ids) - kept : len(ids)].to(plan.dtype, copy=True)
