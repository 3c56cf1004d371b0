"""Training as a fallback decodes: a step in doubt is computed without cuts.

A model with a fallback computes a step again without cuts where its likeliest token has less than some probability
(stocha-convert --inputs-fallback). Such a step need not be learned under cuts, and later steps find its keys and
values uncut. In training the teacher says where a step is in doubt: what it predicts is what the model learns to, and
is there before the model runs. Over some words of a large vocabulary (some_words.py) that is an estimate. The tokens
before a doubt, which --inputs-fallback-tokens computes again too, stay cut in training.

The teacher's head runs here, before the model, and again for the KL, inside the model's call: to share its logits a
step would have to hold them for all tokens, of whose size losses.py tells.

    doubts = in_doubt(teacher_hidden, teacher_head, below=0.9)
    cutting.cut_at = cutting.cut_at & ~doubts
"""

from __future__ import annotations

import math
from typing import Any

import torch

from stocha_hf.errors import StochaError
from stocha_hf.training.entry import stocha_model
from stocha_hf.training.losses import chunk_of, log_softmax, widened
from stocha_hf.training.some_words import Words, head_part


def likeliest(logits: torch.Tensor, softcap: float | None, words: Words | None = None) -> torch.Tensor:
    """Return the logarithm of each token's likeliest word's probability; logits [tokens, words] are a head's."""
    return log_softmax(widened(logits, softcap), words).amax(-1)


@torch.no_grad()
def in_doubt(
    hidden: torch.Tensor,
    head: Any,
    below: float,
    *,
    softcap: float | None = None,
    words: Words | None = None,
    likeliest: Any = likeliest,
) -> torch.Tensor:
    """Return the positions whose likeliest next token has less than a probability, bool [batch, seq].

    Args:
        hidden: The teacher's states after the final norm, [batch, seq, width], of any float dtype.
        head: Its head; an nn.Linear with `words`.
        below: The probability, from 0 to 1.
        softcap: Gemma's final_logit_softcapping.
        words: The words to take for all; None: all.
        likeliest: This module's function of that name, or what torch.compile makes of it.
    """
    part = head if words is None else head_part(head, words)
    size = chunk_of(head.weight.shape[0] if words is None else len(words.ids))
    found = [likeliest(part(some), softcap, words) for some in hidden.flatten(0, 1).split(size)]
    return (torch.cat(found) < math.log(below)).view(hidden.shape[:-1])


def check_doubts(share: float, model: Any, taught: bool) -> float:
    """Return the probability below which a model's steps are in doubt. Raise StochaError where it has none.

    Args:
        share: The recipe's uncut_doubts, above 0.
        model: A patched model.
        taught: Whether there is a teacher, which says where a step is in doubt.
    """
    given = f"uncut_doubts is {share} and "
    if not taught:
        raise StochaError(f"{given}there is no teacher, which says what is in doubt: expected one, or no such key")
    fallback = (stocha_model(model).config.stocha.get("inputs") or {}).get("fallback")
    if not fallback:
        raise StochaError(
            f"{given}the model repeats no steps that are in doubt: expected one that does; convert it with "
            "--inputs SHARE --inputs-train --inputs-fallback PROBABILITY"
        )
    return fallback
