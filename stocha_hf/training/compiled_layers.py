"""What makes a training step fast on a GPU: one compiled layer for all, and a residual stream of half the bytes.

StochaTrainer calls both, the first where `torch_compile` is true; docs/experiments/training.md says what they gain.
"""

from __future__ import annotations

from typing import Any

import torch

from stocha_hf.modeling_stocha import stocha_mlps


def narrow_stream(model: Any) -> None:
    """Under autocast, run a model's residual stream in autocast's dtype, as inference does, and not in the weights'.

    The float32 embeddings of a model with float32 master weights would make the stream float32: every norm and
    residual addition would move twice the bytes.
    """

    def narrow(module: Any, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        kind = embedded.device.type
        return embedded.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else embedded

    model.get_input_embeddings().register_forward_hook(narrow)


def compile_layers(model: Any, **options: Any) -> None:
    """Compile the decoder layers of a patched model in place, as one function that all of them share.

    `options` are torch.compile's. An activation compiles once (once more where sparsity is recorded) however many
    layers there are: seconds for 30 layers on a GPU, where the whole model took minutes in every phase.
    """
    # one function serves all activations of a schedule, recorded or not, and the teacher
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, **options)  # layer.compile would compile what hooks do as well


def decoder_layers(model: Any) -> list[Any]:
    """The layers of a patched model, from the first to the last: the modules with an FFN in them."""
    mlps = set(stocha_mlps(model))
    return [layer for layer in model.modules() if mlps & set(layer.children())]
