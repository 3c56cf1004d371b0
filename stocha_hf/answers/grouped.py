"""Attention of decode steps in which query heads that share keys are rows of one product.

In grouped-query attention several query heads read the same keys. Where there is a mask, transformers copies the
keys for each of them: seven copies of the cache in every step of Qwen2.5-0.5B, which takes longer than all else when
hundreds of rows are decoded. Here the heads of a group, each with a row's few tokens, stand where a longer text's
tokens would.

    with grouped_attention(model.config, model.device):
        model(ids[:, None], attention_mask=mask, past_key_values=cache, ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "stocha_grouped"


@contextmanager
def grouped_attention(config: Any, device: torch.device) -> Iterator[None]:
    """Let a model of this config use it in place of sdpa, in decode steps on a GPU. A CPU has its own fast path."""
    before = config._attn_implementation
    if before == "sdpa" and device.type == "cuda":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with a few tokens of each row.

    Args:
        module: The attention layer.
        query: [rows, heads, tokens, size].
        key: [rows, groups, length, size].
        value: As key.
        attention_mask: [rows, 1, tokens, length], added to the scores, or None.
        scaling: Of the scores.
        **kwargs: What other kinds of attention take.

    Returns:
        [rows, tokens, heads, size], and no weights.
    """
    rows, heads, tokens, size = query.shape
    group = heads // key.shape[1]
    packed = query.reshape(rows, key.shape[1], group * tokens, size)
    mask = attention_mask if attention_mask is None or tokens == 1 else attention_mask.repeat(1, 1, group, 1)
    mixed = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return mixed.reshape(rows, heads, tokens, value.shape[-1]).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
