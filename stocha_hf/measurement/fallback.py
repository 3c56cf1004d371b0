"""What a model with a fallback predicts and reads: a decode step in doubt counts twice, the second time as a full one.

Text that is read at once has no steps, so their doubts are found in a first pass, with cuts at every token. In a
second pass the tokens in doubt are not cut, nor those before them that a step in doubt computes again; its predictions
count. But a token that is computed again for its keys and values alone was predicted from before, with cuts: there
the first pass counts, whose context has no renewed tokens, so the estimate is low. In decoding, a step that was
computed again can take the doubt from a later one, or raise it, and where a window is full it computes its own token
alone; two passes leave that out. A step in doubt reads what one with cuts does, and then all blocks and lm_head: an
upper bound where the FFN is sparse by its gate.

    with cutting_everywhere(model):
        logits = predictions(model, windows)
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from stocha_hf.cuts_stocha import cut_inputs, cut_projections
from stocha_hf.decoding.step import tokens_of
from stocha_hf.measurement.bytes_read import ReadMeter
from stocha_hf.measurement.records import BytesRead, Fallback
from stocha_hf.modeling_stocha import holding

ROWS = 512  # tokens whose logits are float32 at a time


def fallback_of(model: Any) -> float:
    """Return the probability below which a step of a model in eval mode is in doubt, 0 if none is."""
    cutting = _cutting(model)
    return 0.0 if cutting is None or model.training else cutting.fallback


def doubts(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """Return where logits [..., vocabulary] are in doubt, bool [...]."""
    rows = [_cutting(model).doubts(part) for part in logits.flatten(0, -2).split(ROWS)]
    return torch.cat(rows).view(logits.shape[:-1])


def renewed(model: Any, doubted: torch.Tensor) -> torch.Tensor:
    """Return the tokens that steps in doubt compute again, bool [batch, seq]: their own and some before them."""
    count = tokens_of(_cutting(model))
    ahead = torch.nn.functional.pad(doubted, (0, count - 1))
    return ahead.unfold(1, count, 1).any(-1)


def uncut(model: Any, where: torch.Tensor | None) -> AbstractContextManager[None]:
    """A context in which the tokens `where`, bool [batch, seq], are not cut; None: as the model says."""
    return nullcontext() if where is None else holding([_cutting(model)], cut_at=~where)


def predictions(
    model: Any, tokens: torch.Tensor, kept: int = 0, real: torch.Tensor | None = None, **given: torch.Tensor
) -> torch.Tensor:
    """Return the logits of the last `kept` of tokens [batch, seq], 0: all; those in doubt read again without cuts.

    `real`, bool [batch, seq], is False at padding, None where there is none: no step is in doubt there.
    """
    return _predictions(model, tokens, kept, real, None, **given)[0]


def answer_predictions(model: Any, tokens: torch.Tensor, prompt: int) -> tuple[torch.Tensor, int]:
    """Return the logits of an answer's tokens, [batch, answer, vocabulary], and how many steps were in doubt.

    The `prompt` first of tokens [batch, seq] are not cut. The last of them predicts the answer's first token, in full;
    the answer's last token predicts nothing.
    """
    whole = (torch.arange(tokens.shape[1], device=tokens.device) < prompt).expand_as(tokens)
    real = torch.ones_like(whole)
    real[:, -1] = False
    logits, doubted = _predictions(model, tokens, tokens.shape[1] - prompt + 1, real, whole)
    return logits[:, :-1], 0 if doubted is None else int(doubted.sum())


def _predictions(
    model: Any, tokens: torch.Tensor, kept: int, real: torch.Tensor | None, whole: torch.Tensor | None, **given: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Those of the last `kept` tokens, and where steps were in doubt, bool [batch, seq]; None: it has no doubts.

    `whole`, bool [batch, seq], are tokens that are never cut, and so never in doubt.
    """
    with uncut(model, whole if _cutting(model) else None):
        logits = model(tokens, use_cache=False, logits_to_keep=kept, **given).logits
    if not fallback_of(model):
        return logits, None
    doubted = torch.nn.functional.pad(doubts(model, logits), (tokens.shape[1] - logits.shape[1], 0))
    doubted = doubted if real is None else doubted & real
    doubted = doubted if whole is None else doubted & ~whole
    where = renewed(model, doubted) if whole is None else renewed(model, doubted) | whole
    early = (where & ~doubted)[:, -logits.shape[1] :]
    first = logits[early]
    del logits  # gigabytes
    with uncut(model, where):
        found = model(tokens, use_cache=False, logits_to_keep=kept, **given).logits
    found[early] = first
    return found, doubted


def with_repeated(model: Any, read: BytesRead, steps: int, repeated: int) -> tuple[BytesRead, Fallback]:
    """Return what a step reads on average, and how often one was computed again, where one with cuts reads `read`."""
    share = repeated / steps if steps else 0.0
    blocks, head = round(read.blocks + share * read.dense_blocks), round((1 + share) * read.lm_head)
    whole = BytesRead(blocks + head, blocks, head, read.dense_blocks, blocks / read.dense_blocks)
    return whole, Fallback(fallback_of(model), steps, repeated, share, read.share, tokens_of(_cutting(model)))


@torch.no_grad()
def read_of_texts(model: Any, texts: list[tuple[list[int], int]]) -> BytesRead:
    """Count what a step reads where texts are written, with the cuts if there are any.

    Args:
        model: A model in eval mode.
        texts: Token ids of each, and how many of them are its prompt's, whose last token is the first step's.
    """
    first, cuts = 0, bool(cut_projections(model))
    meter = ReadMeter(model, start=lambda length: first)
    try:
        with cut_inputs(model, "always") if cuts else nullcontext():
            for ids, prompt in texts:
                first = prompt - 1
                prompts = torch.arange(len(ids), device=model.device)[None] < first
                with uncut(model, prompts if cuts else None):
                    model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        meter.close()
    return meter.read()


def _cutting(model: Any) -> Any:
    return next((module.cutting for module in cut_projections(model)), None)
