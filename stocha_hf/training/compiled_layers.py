"""What makes a training step fast on a GPU: one compiled layer for all, and a residual stream of half the bytes.

StochaTrainer calls both for the time of a run, the first where `torch_compile` is true. Each returns the function that
undoes it, so that a model leaves training as it came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stocha_hf.modeling_stocha import stocha_mlps

RECOMPILES = 32  # of one layer: every activation of a schedule, with and without its zeros counted, and the teacher


def narrow_stream(model: Any) -> Callable[[], None]:
    """Under autocast, run a model's residual stream in autocast's dtype, as inference does, and not in the weights'.

    The float32 embeddings of a model with float32 master weights would make the stream float32: every norm and
    residual addition would move twice the bytes. Returns the function that undoes it.
    """

    def narrow(module: Any, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        kind = embedded.device.type
        return embedded.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else embedded

    return model.get_input_embeddings().register_forward_hook(narrow).remove


def compile_layers(model: Any, **options: Any) -> Callable[[], None]:
    """Compile the decoder layers of a patched model in place, as one function that all of them share.

    `options` are torch.compile's. An activation compiles once (once more where sparsity is recorded) however many
    layers there are: seconds for 30 layers on a GPU, where the whole model took minutes in every phase. Returns the
    function that undoes it.
    """
    layers, dynamo = decoder_layers(model), torch._dynamo.config
    limit, splits = dynamo.recompile_limit, dynamo.optimize_ddp
    before = [layer.__dict__.get("forward") for layer in layers]
    dynamo.recompile_limit = max(limit, RECOMPILES)
    # Inside DDP's forward the compiler would split each layer at the bounds of DDP's buckets, for gradients to be
    # reduced while others are computed. Between layers they are anyway; and thresholds are constants in a split layer:
    # every layer would compile by itself, and anew when thresholds move, until the limit leaves all others uncompiled.
    dynamo.optimize_ddp = False
    for layer in layers:
        layer.forward = torch.compile(layer.forward, **options)  # layer.compile would compile what hooks do as well

    def undo() -> None:
        dynamo.recompile_limit, dynamo.optimize_ddp = limit, splits
        for layer, forward in zip(layers, before, strict=True):
            set_forward(layer, forward)

    return undo


def set_forward(module: Any, forward: Callable[..., Any] | None) -> None:
    """Give a module this forward of its own, or with None its class's again."""
    module.__dict__.pop("forward", None)
    if forward is not None:
        module.forward = forward


def decoder_layers(model: Any) -> list[Any]:
    """The layers of a patched model, from the first to the last: the modules with an FFN in them."""
    mlps = set(stocha_mlps(model))
    return [layer for layer in model.modules() if mlps & set(layer.children())]
