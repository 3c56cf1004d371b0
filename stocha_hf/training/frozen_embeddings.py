"""Training that leaves embeddings as they are, and a head that is tied to them: `train_embeddings: false`.

What little text teaches the words in it is lost for all others. Frozen weights have no gradient and no state of the
optimizer; checkpoints hold them as they were.

    close = freeze_embeddings(model)     # before the optimizer is made
    close()                              # they take gradients again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stocha_hf.errors import StochaError


def check_frozen(adapter: bool) -> None:
    """Raise StochaError where a run is told to freeze what it would not train."""
    if adapter:
        raise StochaError(
            "train_embeddings is false and use_peft true: an adapter names the modules that it trains, and the others "
            "stay as they are; expected no train_embeddings, or use_peft: false"
        )


def freeze_embeddings(model: Any) -> Callable[[], None]:
    """Freeze the input embeddings of a model; return the function that undoes it.

    What they give still asks for a gradient, which nobody takes: so the first layer is to a compiler like all others,
    and a reentrant checkpoint of it passes gradients on.
    """
    embeddings = model.get_input_embeddings()
    frozen = [weight for weight in embeddings.parameters() if weight.requires_grad]

    def ask(module: Any, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded.requires_grad_() if torch.is_grad_enabled() else embedded

    hook = embeddings.register_forward_hook(ask)
    for weight in frozen:
        weight.requires_grad_(False)

    def close() -> None:
        hook.remove()
        for weight in frozen:
            weight.requires_grad_()

    return close
