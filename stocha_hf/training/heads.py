"""A model's forward with a function in the place of its lm_head's call, so that no logits are made but where wanted.

The function runs inside the model's own forward, so autocast, DDP, FSDP and peft treat it as they treat the head:

    close = open_head(model)                # before wrapping
    call_open(model, inputs, lambda hidden, head: head(hidden[:, -1:]))
    close()
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stocha_hf.errors import StochaError
from stocha_hf.training.compiled_layers import set_forward


def open_head(model: nn.Module) -> Callable[[], None]:
    """Let `model(**inputs, in_place_of_head=f)` return f(final hidden states, lm_head module) instead of logits.

    Without the keyword the forward is the old one. Call it before accelerate, DDP or FSDP wrap the model (peft may
    have wrapped it already), so that their autocast and hooks surround f as well. Returns the function that undoes it.
    """
    inner = causal_lm(model)
    before, forward = inner.__dict__.get("forward"), inner.forward

    @functools.wraps(type(inner).forward)  # generate() and Trainer read the signature
    def opened(self: Any, *args: Any, in_place_of_head: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if in_place_of_head is None:
            return forward(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        return in_place_of_head(hidden, self.get_output_embeddings())

    inner.forward = types.MethodType(opened, inner)
    inner.head_is_open = True

    def close() -> None:
        set_forward(inner, before)
        del inner.head_is_open

    return close


def call_open(model: nn.Module, inputs: Mapping[str, Any], function: Callable[..., Any]) -> Any:
    """The model's forward of its inputs, `labels` left out, with the function in the place of its head."""
    if not getattr(causal_lm(model), "head_is_open", False):
        raise StochaError(f"the {type(model).__name__} runs its own lm_head: call open_head on it before wrapping it")
    return model(**{key: value for key, value in inputs.items() if key != "labels"}, in_place_of_head=function)


def final_hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """What the lm_head would see, [batch, seq, hidden], after the final norm; the head itself does not run.

    The model, or the one inside the wrapper, went through open_head.
    """
    return call_open(model, inputs, lambda hidden, head: hidden)


def causal_lm(model: nn.Module) -> Any:
    """The transformers model with a head, inside whatever wraps it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise StochaError(f"the model is a {type(model).__name__} without an lm_head: expected a causal language model")
