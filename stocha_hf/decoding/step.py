"""A model's call in a decode step: all of it in one call of the kernels, where nothing in it must be called by itself.

Whatever is not the plain case, such as output_attentions, labels, a mask of other than padding on the left, another
kind of cache or a hook, is left to the model's own forward, and gives the same results.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from stocha_hf.decoding import plan as plans
from stocha_hf.decoding.build import kernels
from stocha_hf.decoding.cache import CacheRows, rows_of
from stocha_hf.decoding.conditions import CACHE, FEW, OLD_CACHE
from stocha_hf.decoding.ops import available
from stocha_hf.decoding.structs import ALL, Call, pointer

UNSET = ("inputs_embeds", "labels", "output_attentions", "output_hidden_states")
KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    CACHE,
    "use_cache",
    "logits_to_keep",
    "return_dict",
}


def call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CausalLMOutputWithPast | None:
    """Return what a call of a causal language model in eval mode returns; None where its forward is to run."""
    given = given_to(model, args, kwargs)
    if given is None or not given["input_ids"].is_cpu or not available() or (plan := plans.of(model)) is None:
        return None
    ids, cache = given["input_ids"], given[CACHE]
    sequences, tokens = ids.shape
    starts = padding(given.get("attention_mask"), sequences, cache.get_seq_length() + tokens)
    if starts is None:
        return None
    rows = rows_of(plan, cache, sequences)
    if rows is None:
        return None
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(tokens) + int(cache.get_seq_length())
    positions = positions.expand(sequences, tokens).contiguous()
    kept = given.get("logits_to_keep") or tokens
    logits = with_fallback(model, rows, ids.contiguous(), positions, starts, kept, text=text_of(ids))
    if logits is None:
        return None
    rows.show()
    return CausalLMOutputWithPast(logits=logits.to(plan.dtype), **{CACHE: cache})


def has_whole_steps(model: Any) -> bool:
    """Return whether the CPU's kernels compute a step of this model in one call."""
    return model.device.type == "cpu" and available() and plans.of(model) is not None


def with_fallback(
    model: Any,
    rows: CacheRows,
    ids: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    kept: int,
    expected: int = 0,
    text: torch.Tensor | None = None,
    wanted: int = ALL,
) -> torch.Tensor | None:
    """Compute a step as `run` does, and sequences in doubt again without cuts, as a Cutting of cuts_stocha.py does.

    `text`, int64 [sequences, length], is what the step's tokens end, where that is known.
    """
    cutting = cutting_of(model, rows.plan, ids.shape[1])
    sums = None if cutting is None else torch.empty(len(ids))
    below = 1.0 if cutting is None else cutting.fallback
    logits = run(rows, ids, positions, starts, kept, expected, wanted=wanted, sums=sums, below=below)
    doubted = None if logits is None or sums is None else judged(cutting, sums)
    if doubted is None or logits is None:
        return logits
    count = 1 if text is None else min(tokens_of(cutting), rows.most(text.shape[1]))
    ids = ids if text is None else text[:, -count:]
    positions = (positions + torch.arange(1 - count, 1)).clamp(min=0)
    again: Any = None
    with rows.rewound(count, doubted):
        for part, at in zip(*(some.split(FEW // len(ids), 1) for some in (ids, positions)), strict=True):
            again = run(rows, part.contiguous(), at.contiguous(), starts, 1, expected, cuts=False, wanted=wanted)
    return torch.where(doubted[:, None, None], again, logits)


def judged(cutting: Any, sums: torch.Tensor) -> torch.Tensor | None:
    """Count a step as `cutting.judge` does of its logits; return which sequences are in doubt, None where none is.

    `sums` [sequences] are those of e^(logit - the greatest). Where none is in doubt, as is the rule, few of PyTorch's
    operations are called: behind a step, which leaves nothing of them in the caches, each takes tens of microseconds.
    A folder's own Cutting is asked only where one may be: its rule is this one in every published copy.
    """
    if not all(cutting.fallback * total <= 1 for total in sums.tolist()):  # NaN is judged below
        found: torch.Tensor | None = cutting.judge(few_logits(sums))
        return found
    cutting.steps, cutting.doubted = cutting.steps + len(sums), torch.zeros(len(sums), dtype=torch.bool)
    return None


def few_logits(sums: torch.Tensor) -> torch.Tensor:
    """Return logits [sequences, few] of which a Cutting judges as of all: 0, the greatest, and others that are alike.

    `sums` [sequences] are those of e^(logit - the greatest). PyTorch's logsumexp over a vocabulary of 152k takes 2 ms.
    """
    most = float(sums.nan_to_num(1, 1).max())
    others = math.ceil(most - 1) if most > 2 else 1  # so many that none of them is above the greatest
    alike = ((sums - 1) / others).log()[:, None].expand(-1, others)
    return torch.cat([torch.zeros(len(sums), 1), alike], 1)


def text_of(ids: torch.Tensor) -> torch.Tensor | None:
    """Return the text that a step's ids end, int64 [sequences, length], where generate() has told it with them."""
    text = getattr(ids, "stocha_text", None)
    return None if text is None else text.ids


def tokens_of(cutting: Any) -> int:
    """Return how many tokens a step in doubt computes again: one in folders of before there were more."""
    found: int = getattr(cutting, "tokens", 1)
    return found


def cutting_of(model: Any, plan: Any, tokens: int) -> Any:
    """Return the Cutting that judges steps of so many tokens; None where they do not cut, or have no fallback."""
    cutting = model.__dict__.get("cutting")
    return cutting if cutting is not None and cutting.fallback and tokens == 1 and plan.cuts(1) else None


def run(
    rows: CacheRows,
    ids: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    kept: int,
    expected: int = 0,
    cuts: bool | None = None,
    listed: torch.Tensor | None = None,
    wanted: int = ALL,
    sums: torch.Tensor | None = None,
    below: float = 1.0,
) -> torch.Tensor | None:
    """Compute a step and write its tokens behind those of the cache, whose tensors show them after `rows.show()`.

    Args:
        rows: Of the cache.
        ids: int64 [sequences, tokens], contiguous.
        positions: The same, counted from 0.
        starts: int64 [sequences], the first place in the cache that is no padding.
        kept: The last so many tokens of each sequence have logits.
        expected: Tokens that will follow, for which the cache may make room now.
        cuts: Whether projections cut their inputs; None: as the model says.
        listed: int64, rising and contiguous: tokens whose logits are computed; None: all.
        wanted: ALL logits; or the GREATEST one of each token, where others may be minus infinity; or all ABOUT as
            large as they are. The latter two read less where lm_head is in two planes, and are ALL otherwise.
        sums: float32 [sequences, kept], to be filled with sums of e^(logit - the greatest); not where ABOUT is wanted.
        below: A probability. Where the GREATEST are wanted, sums need not be those of all logits: one over a sum, the
            greatest's probability, is below where that of all is.

    Returns:
        Logits, float32 [sequences, kept, vocabulary or number of `listed`], rounded to the model's type. None where
        the cache would not keep the tokens behind the others, such as a static one with a window that is full.
    """
    sequences, tokens = ids.shape
    if not rows.prepare(tokens, bool(starts.any()), expected):
        return None
    logits = torch.empty(sequences, kept, rows.plan.vocabulary if listed is None else len(listed))
    pointers = (ids.data_ptr(), positions.data_ptr(), starts.data_ptr())
    cuts = rows.plan.cuts(tokens) if cuts is None else cuts
    told = (None, 0) if listed is None else (listed.data_ptr(), len(listed))
    step = Call(*pointers, sequences, tokens, kept, logits.data_ptr(), cuts, *told, wanted, pointer(sums), 1 / below)
    model = rows.cut_model if cuts else rows.model
    kernels().stocha_step(ctypes.byref(model), ctypes.byref(step), torch.get_num_threads())  # type: ignore[union-attr]
    rows.advance(tokens)
    return logits


def given_to(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return a decode step's arguments by name, None if it is none, or asks for what only the forward gives."""
    if len(args) > 1 or torch.is_grad_enabled() or torch.jit.is_tracing():
        return None
    given = {CACHE if name == OLD_CACHE else name: value for name, value in kwargs.items()}
    if args:
        given["input_ids"] = args[0]
    ids, cache = given.get("input_ids"), given.get(CACHE)
    kept, config = given.get("logits_to_keep", 0), model.config
    plain = (
        type(ids) is torch.Tensor
        and not torch.is_autocast_enabled(ids.device.type)
        and ids.dim() == 2
        and 0 < ids.numel() <= FEW
        and ids.dtype == torch.int64
        and cache is not None
        and type(kept) is int
        and 0 <= kept <= ids.shape[1]
        and given.get("use_cache", True) is not False
        and given.get("return_dict", True) is not False
        and all(given.get(name) in (None, False) for name in UNSET)
        and all(name in KNOWN or given[name] is None for name in given if name not in UNSET)
        and not (config.output_attentions or config.output_hidden_states)
        and config.return_dict is not False
        and not torch.nn.modules.module._has_any_global_hook()
    )
    return given if plain and _fits(given, model.config.vocab_size) else None


def _fits(given: dict[str, Any], vocabulary: int) -> bool:
    ids, positions = given["input_ids"], given.get("position_ids")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        return False  # the embedding says so
    if positions is None:
        return True
    return positions.device == ids.device and positions.dim() == 2 and positions.dtype == torch.int64


def padding(mask: Any, sequences: int, length: int) -> torch.Tensor | None:
    """Return how many tokens of padding each sequence begins with, int64 [sequences]; None for any other mask."""
    if mask is None:
        return torch.zeros(sequences, dtype=torch.int64)
    if type(mask) is not torch.Tensor or mask.shape != (sequences, length):
        return None
    mask = mask != 0
    starts = length - mask.sum(1)
    is_left = (torch.arange(length) >= starts[:, None]) == mask
    return starts if bool(is_left.all()) and bool((starts < length).all()) else None
