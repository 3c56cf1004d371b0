"""Scale a block's inputs entry by entry without changing what the model computes.

A threshold for each input of a projection is one threshold for all and a scale s for each input: |x| > s t is |x / s|
> t. A scale needs no multiplication when the model runs, since each input of a projection comes from weights: those of
the norm before it, of v_proj (a scale for each channel of a key head, which its query heads share), or of up_proj.
These are divided by s, and the projection's columns are multiplied by it.

    scale_inputs(block, ("gate_proj", "up_proj"), torch.full((hidden_size,), 2.0))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stocha_hf.measurement.blocks import Block


@torch.no_grad()
def scale_inputs(block: Block, names: tuple[str, ...], factors: torch.Tensor) -> None:
    """Divide what a group of projections reads by factors; the weights before and in it change, in place.

    Args:
        block: The block; its projections are nn.Linear.
        names: One of cuts.SHARED.
        factors: Above 0, float32 [inputs]; of o_proj [key heads * head size].
    """
    columns = factors
    if names == ("o_proj",):
        _divide_rows(block.linears["v_proj"], factors)
        columns = spread_over_heads(block, factors)
    elif names == ("down_proj",):
        _divide_rows(block.linears["up_proj"], factors)
    else:
        _divide_norm(_norm_before(block, names), factors)
    for name in names:
        weight = block.linears[name].weight
        weight.copy_(weight.float() * columns)


def spread_over_heads(block: Block, values: torch.Tensor) -> torch.Tensor:
    """Return values [..., key heads' channels] for the channels of all query heads, which o_proj reads."""
    size: Any = block.module.self_attn.head_dim  # type: ignore[union-attr]
    groups = block.linears["o_proj"].in_features // values.shape[-1]
    return values.unflatten(-1, (-1, 1, size)).repeat_interleave(groups, -2).flatten(-3)


def inputs_of(block: Block, names: tuple[str, ...]) -> int:
    """How many factors a group has."""
    return block.linears["v_proj"].out_features if names == ("o_proj",) else block.linears[names[0]].in_features


def _divide_rows(linear: nn.Linear, factors: torch.Tensor) -> None:
    linear.weight.copy_(linear.weight.float() / factors[:, None])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.float() / factors)


def _norm_before(block: Block, names: tuple[str, ...]) -> Any:
    """The norm that a group reads from; Gemma's has another before the FFN."""
    parts = block.module._modules
    if names[0] == "q_proj":
        return parts["input_layernorm"]
    return parts.get("pre_feedforward_layernorm") or parts["post_attention_layernorm"]


def _divide_norm(norm: Any, factors: torch.Tensor) -> None:
    offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0  # Gemma's scale is 1 + weight
    norm.weight.copy_((norm.weight.float() + offset) / factors - offset)
